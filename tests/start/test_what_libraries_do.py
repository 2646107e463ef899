"""Where `generate` of transformers and PyTorch's FLOP counter do what one would not
guess.
"""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from llmlab.models import course_model
from llmlab.models.accounting import forward_flops
from llmlab.models.generation import keep_top_k, probabilities, sample
from tests.libraries import seen_in

PROMPT = torch.arange(2, 7)[None]


@pytest.fixture(scope="module")
def theirs() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(
        course_model.MODEL, dtype=torch.float32
    ).eval()


def can_come(model: LlamaForCausalLM, **settings) -> int:
    """How many of the 2,048 tokens a call of `generate` can give."""
    out = model.generate(
        PROMPT,
        max_new_tokens=1,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    return int(out.scores[0].isfinite().sum())


@seen_in("transformers", "5.23.0")
def test_sampling_draws_from_the_50_likeliest_unless_told_otherwise(theirs):
    assert can_come(theirs, do_sample=True) == 50
    assert can_come(theirs, do_sample=True, top_k=0) == 2048
    logits = theirs(PROMPT).logits[:, -1]
    assert (probabilities(logits) > 0).sum() == 2048


@seen_in("transformers", "5.23.0")
def test_the_config_does_not_say_so():
    """It reads None; the 50 is filled in inside `generate`."""
    config = GenerationConfig()
    assert config.top_k is None
    assert config.temperature is None
    assert config.do_sample is None
    assert config.max_length is None


@seen_in("transformers", "5.23.0")
def test_top_k_keeps_ties(theirs):
    """Ours does so, too: with equal logits nothing is cut off."""
    indifferent = copy.deepcopy(theirs)
    torch.nn.init.zeros_(indifferent.model.norm.weight)
    assert can_come(indifferent, do_sample=True) == 2048
    assert can_come(indifferent, do_sample=True, top_k=1) == 2048
    assert keep_top_k(torch.zeros(1, 8), 2).isfinite().all()


@seen_in("transformers", "5.23.0")
def test_temperature_0_is_an_error_where_one_draws(theirs):
    """In ours it is greedy. A tiny one is greedy in both."""
    with pytest.raises(ValueError, match="strictly positive float"):
        theirs.generate(PROMPT, do_sample=True, temperature=0.0, max_new_tokens=1)
    logits = theirs(PROMPT).logits[:, -1]
    greedy = theirs.generate(PROMPT, max_new_tokens=1)[0, -1]
    tiny = theirs.generate(PROMPT, do_sample=True, temperature=1e-6, max_new_tokens=1)
    assert tiny[0, -1] == greedy
    assert sample(logits, 0.0) == greedy


@seen_in("transformers", "5.23.0")
def test_a_temperature_alone_draws_nothing(theirs, caplog, monkeypatch):
    """It is greedy, and a line in the log, the first time, is all that says so."""
    transformers_logging.set_verbosity_warning()
    transformers_logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    greedy = theirs.generate(PROMPT, max_new_tokens=8)
    hot = theirs.generate(PROMPT, temperature=5.0, max_new_tokens=8)
    assert torch.equal(hot, greedy)
    assert "temperature" in caplog.text
    caplog.clear()
    theirs.generate(PROMPT, temperature=5.0, max_new_tokens=1)
    assert not caplog.text


@seen_in("transformers", "5.23.0")
def test_without_a_length_20_tokens_come(theirs):
    """After the prompt, with a warning."""
    with pytest.warns(UserWarning, match="max_length"):
        out = theirs.generate(PROMPT, eos_token_id=None)
    assert out.shape == (1, PROMPT.shape[1] + 20)


@seen_in("torch", "2.13.0")
def test_flops_of_attention_are_not_counted_on_a_cpu():
    """The kernel that PyTorch takes there is not in its table; the plain one is."""
    model, ids = course_model.load(), torch.zeros(1, 256, dtype=torch.long)
    config, T = model.config, ids.shape[1]
    with torch.no_grad(), FlopCounterMode(display=False) as usual:
        model(ids)
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as plain,
    ):
        model(ids)
    width = config.num_attention_heads * config.head_dim
    missed = 4 * config.num_hidden_layers * T * T * width
    assert plain.get_total_flops() - usual.get_total_flops() == missed
    assert plain.get_total_flops() == forward_flops(config, 1, T)
