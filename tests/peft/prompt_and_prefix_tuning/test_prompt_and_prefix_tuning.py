"""Prompt Tuning and Prefix Tuning against what their papers say; parity with `peft` is
in test_virtual_tokens.py.
"""

import pytest
import torch

from llmlab.peft.prompt_and_prefix_tuning import (
    prefix_tuning,
    prompt_tuning,
    virtual_tokens,
)
from llmlab.peft.prompt_and_prefix_tuning.prefix_tuning import PrefixTuningConfig
from llmlab.peft.prompt_and_prefix_tuning.prompt_tuning import PromptTuningConfig
from tests.peft.conftest import make_hf, make_llama
from tests.peft.prompts import logits_of

TEXT = (7, 3, 11, 3)


def with_text(model, tokens):
    """The logits of `tokens` when TEXT really stands before them."""
    before = torch.tensor([TEXT]).expand(len(tokens), -1)
    return logits_of(model, torch.cat([before, tokens], 1))[:, len(TEXT) :]


@pytest.mark.parametrize("make", [make_llama, make_hf])
def test_a_soft_prompt_that_starts_from_a_text_is_that_text(make, tokens):
    model = make()
    expected = with_text(model, tokens)
    prompt_tuning.apply(
        model, PromptTuningConfig(len(TEXT), init="text", init_tokens=TEXT)
    )
    torch.testing.assert_close(logits_of(model, tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [make_llama, make_hf])
def test_a_prefix_that_starts_from_a_text_is_that_text(make, tokens):
    model = make()
    expected = with_text(model, tokens)
    prefix_tuning.apply(
        model, PrefixTuningConfig(len(TEXT), False, init="text", init_tokens=TEXT)
    )
    torch.testing.assert_close(logits_of(model, tokens), expected, rtol=0, atol=1e-5)


def test_a_second_prefix_from_text_is_computed_by_the_plain_base(tokens):
    model = make_llama()
    expected = with_text(model, tokens)
    prompt_tuning.apply(model, PromptTuningConfig(3, init="random"), "other")
    prefix_tuning.apply(
        model, PrefixTuningConfig(len(TEXT), False, init="text", init_tokens=TEXT)
    )
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-5)


def test_a_prefix_reaches_what_no_soft_prompt_can(tokens):
    """A soft prompt's keys and values above layer 0 are what the frozen layers make of
    it; a prefix chooses them all.
    """
    model = make_llama()
    prefix_tuning.apply(model, PrefixTuningConfig(2, False))
    before = model(tokens)
    width = virtual_tokens.shape_of(model).deep_width // 2  # numbers of one layer
    with torch.no_grad():
        # layer 1 alone
        model.virtual_tokens.encoders["default"].embedding[:, width:].zero_()
    assert not torch.allclose(model(tokens), before)


def test_zero_is_not_neutral(tokens):
    model = make_llama()
    plain = model(tokens)
    prefix_tuning.apply(model, PrefixTuningConfig(2, False, init="zero"))
    assert not model.virtual_tokens.encoders["default"].embedding.any()
    assert (model(tokens) - plain).abs().max() > 1e-2


def test_vocab_starts_from_frequent_rows_and_copies_them():
    model = make_llama()
    rows = model.model.embed_tokens.weight
    prompt = prompt_tuning.start(
        rows, PromptTuningConfig(50, most_frequent=4), torch.Generator().manual_seed(0)
    )
    found = [int((rows == row).all(-1).nonzero()[0, 0]) for row in prompt]
    assert set(found) == {0, 1, 2, 3}
    prompt.zero_()
    assert rows.any(-1).all()


def test_random_is_uniform_on_half():
    prompt = prompt_tuning.start(
        torch.zeros(3, 100), PromptTuningConfig(100, init="random")
    )
    assert (
        prompt.abs().max() <= 0.5 < prompt.abs().max() + 0.01
        and abs(prompt.mean()) < 0.02
    )


def test_a_text_is_repeated_or_cut():
    rows = torch.arange(12.0).view(12, 1)

    def start(p, ids):
        return (
            prompt_tuning.start(rows, PromptTuningConfig(p, "text", ids))
            .flatten()
            .tolist()
        )

    assert start(5, (4, 9)) == [4, 9, 4, 9, 4]
    assert start(2, (4, 9, 1)) == [4, 9]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: PromptTuningConfig(0),
            "num_virtual_tokens must be an integer of at least 1, not 0",
        ),
        (
            lambda: PromptTuningConfig(init="best"),
            "init='best' must be one of 'vocab', 'text', 'random'",
        ),
        (lambda: PromptTuningConfig(init="text"), "needs init_tokens"),
        (lambda: PrefixTuningConfig(2.0), "num_virtual_tokens must be an integer"),
        (lambda: PrefixTuningConfig(hidden=0), "hidden must be an integer"),
        (lambda: PrefixTuningConfig(init="zero"), "init='zero' needs projection=False"),
        (
            lambda: PrefixTuningConfig(3, False, init="text", init_tokens=(1,)),
            "1 init_tokens for num_virtual_tokens=3",
        ),
        (
            lambda: prompt_tuning.apply(
                make_llama(), PromptTuningConfig(2, "text", (99,))
            ),
            r"init_tokens=\(99,\) must be ids below the vocabulary's 61",
        ),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
