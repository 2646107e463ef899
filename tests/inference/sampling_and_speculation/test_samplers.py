"""Samplers: against transformers' processors, and vLLM's rules as measured."""

from __future__ import annotations

import pytest
import torch

from llmlab.inference.sampling_and_speculation import (
    ORDERS,
    PROCESSORS,
    SamplerConfig,
    process,
)
from tests.models.hugging_face import make, theirs

NOTHING = torch.zeros(1, 5, dtype=torch.long)


def kept(p, steps):
    """Which tokens of one distribution stay."""
    none = torch.zeros(1, len(p), dtype=torch.long)
    logits = process(torch.tensor([p]).log(), steps, none, none)
    return logits[0].isfinite().nonzero()[:, 0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.7),
        ("top_k", 5),
        ("top_k", 999),
        ("top_p", 0.7),
        ("top_p", 1e-6),
        ("top_p", 1.0),
        ("min_p", 0.2),
        ("min_p", 1.0),
        ("typical_p", 0.6),
        ("typical_p", 0.99),
        ("repetition_penalty", 1.7),
        ("repetition_penalty", 0.6),
    ],
)
def test_each_processor_is_that_of_transformers(name, value, dtype):
    from transformers import generation as hf

    their_class = {
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
        "typical_p": hf.TypicalLogitsWarper,
        "repetition_penalty": hf.RepetitionPenaltyLogitsProcessor,
    }[name]
    torch.manual_seed(0)
    logits = 2 * torch.randn(3, 37, dtype=dtype)
    logits[1] = logits[1].round()  # ties, also with the last one that stays
    logits[2, 5:9] = -torch.inf  # what an earlier processor has taken out
    ids = torch.randint(0, 37, (3, 11))
    seen = torch.stack([torch.bincount(row, minlength=37) for row in ids])
    before = logits.clone()
    ours = process(logits, [(name, value)], seen, torch.zeros_like(seen))
    argument = 1.0 - 1e-9 if (name, value) == ("typical_p", 1.0) else value
    torch.testing.assert_close(ours, their_class(argument)(ids, logits.clone()))
    assert torch.equal(logits, before)


def test_all_at_once_in_the_order_of_transformers():
    model = make()
    hf = theirs(model)
    settings = {
        "temperature": 0.8,
        "top_k": 30,
        "top_p": 0.9,
        "min_p": 0.02,
        "typical_p": 0.95,
        "repetition_penalty": 1.4,
    }
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    torch.manual_seed(1)
    found = hf.generate(
        ids,
        do_sample=True,
        max_new_tokens=4,
        pad_token_id=0,
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
        **settings,
    )
    config = SamplerConfig(**settings)
    assert [name for name, _ in config.steps] == list(ORDERS["transformers"])
    for i, (logits, scores) in enumerate(zip(found.logits, found.scores, strict=True)):
        tokens = found.sequences[0, : 5 + i].tolist()
        p = config.probabilities(logits, tokens, prompt=5)
        torch.testing.assert_close(p, scores.double().softmax(-1), atol=1e-6, rtol=0)


def test_ties_and_borders_as_measured_in_both_libraries():
    assert kept([0.5, 0.3, 0.2], [("top_p", 0.5)]) == [0]
    assert kept([0.5, 0.3, 0.2], [("top_p", 0.8)]) == [0, 1]
    assert len(kept([0.5, 0.25, 0.25], [("top_p", 0.75)])) == 2
    assert kept([0.4, 0.4, 0.4, 0.1], [("top_k", 2)]) == [0, 1, 2]
    assert kept([0.5, 0.25, 0.25], [("min_p", 0.5)]) == [0, 1, 2]


def test_the_two_orders_keep_different_tokens():
    p = [0.5, 0.2, 0.15, 0.1, 0.05]
    both = {"top_p": 0.8, "min_p": 0.25}
    orders = {name: SamplerConfig(order=name, **both).steps for name in ORDERS}
    assert orders["transformers"] == [("top_p", 0.8), ("min_p", 0.25)]
    assert orders["vllm"] == [("min_p", 0.25), ("top_p", 0.8)]
    assert kept(p, orders["transformers"]) == [0, 1, 2]
    assert kept(p, orders["vllm"]) == [0, 1]


def test_penalties_count_what_vllm_counts():
    """Repetition: prompt and output. Presence and frequency: output."""
    config = SamplerConfig(
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        order="vllm",
    )
    logits = torch.tensor([[2.0, -2.0, 1.0, 1.0]])
    counts = [torch.tensor([[1, 1, 0, 0]]), torch.tensor([[0, 0, 1, 0]])]
    found = process(logits, config.steps, *counts)
    torch.testing.assert_close(found, torch.tensor([[1.0, -4.0, -0.25, 1.0]]))
    p = config.probabilities(logits, [0, 1, 2], prompt=2)
    torch.testing.assert_close(p, found.double().softmax(-1))
    twice = config.probabilities(logits, [0, 1, 2, 2], prompt=2)
    expected = torch.tensor([[1.0, -4.0, -0.5, 1.0]]).double().softmax(-1)
    torch.testing.assert_close(twice, expected)


def test_drafted_tokens_count_for_the_positions_after_them():
    config = SamplerConfig(repetition_penalty=2.0, frequency_penalty=1.0, order="vllm")
    torch.manual_seed(0)
    logits = torch.randn(4, 9)
    text, drafted = [1, 2, 2], [5, 5, 7]
    rows = config.probabilities(logits, text, drafted, prompt=1)
    for i in range(4):
        alone = config.probabilities(logits[i : i + 1], text + drafted[:i], prompt=1)
        torch.testing.assert_close(rows[i], alone[0])


def test_greedy_is_one_hot_after_the_penalties():
    config = SamplerConfig(temperature=0, repetition_penalty=10.0)
    p = config.probabilities(torch.tensor([[3.0, 2.0, 1.0]]), [0])
    assert p.tolist() == [[0.0, 1.0, 0.0]]
    assert SamplerConfig().steps == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"typical_p": 0.0}, "typical_p=0.0"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"order": "hf"}, "order='hf'"),
        ({"presence_penalty": 0.5}, "presence_penalty=0.5 needs another order"),
        ({"typical_p": 0.5, "order": "vllm"}, "typical_p=0.5 needs another order"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**changes)


def test_an_unknown_processor_is_named():
    with pytest.raises(ValueError, match="'top_q'"):
        process(torch.zeros(1, 5), [("top_q", 1.0)], NOTHING, NOTHING)
    assert set(PROCESSORS) == {name for order in ORDERS.values() for name in order}
