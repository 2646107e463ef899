"""The ways to batch write the same tokens; they differ in rows."""

from __future__ import annotations

import pytest
import torch

from llmlab.inference.continuous_batching import serve_trace
from llmlab.inference.paged_attention import BlockManager, OutOfBlocks, PagedCache
from llmlab.models import course_model
from llmlab.models.generation import generate

OUTPUTS = [9, 1, 3, 7, 2, 4]


@pytest.fixture(scope="module")
def model():
    return course_model.load()


@pytest.fixture(scope="module")
def prompts():
    torch.manual_seed(0)
    return [torch.randint(5, 900, (n,)).tolist() for n in (3, 11, 6, 1, 9, 4)]


@pytest.fixture(scope="module")
def alone(model, prompts):
    """Each request by itself, over a cache in one piece."""
    return [
        generate(model, torch.tensor([ids]), n)[0, len(ids) :].tolist()
        for ids, n in zip(prompts, OUTPUTS, strict=True)
    ]


@pytest.mark.parametrize("way", ["alone", "static", "continuous"])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_tokens_are_those_of_one_by_one(model, prompts, alone, way, slots):
    cache = PagedCache(model.config, BlockManager(60, 4))
    run = serve_trace(model, cache, prompts, OUTPUTS, way, slots)
    assert run.tokens == alone
    assert cache.manager.used == 0
    cache.manager.check()
    assert max(map(len, run.rows)) <= slots


def test_tokens_are_those_of_transformers_generate_batch(model, prompts, alone):
    from transformers import (
        ContinuousBatchingConfig,
        GenerationConfig,
        LlamaForCausalLM,
        logging,
    )

    logging.set_verbosity_error()
    theirs = LlamaForCausalLM.from_pretrained(course_model.MODEL)
    options = GenerationConfig(
        do_sample=False, max_new_tokens=4, eos_token_id=-1, pad_token_id=0
    )
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16)
    found = theirs.generate_batch(
        prompts,
        generation_config=options,
        continuous_batching_config=small,
        progress_bar=False,
    )
    cache = PagedCache(model.config, BlockManager(60, 4))
    ours = serve_trace(model, cache, prompts, [4] * 6, slots=3).tokens
    assert [found[f"req_{i}"].generated_tokens for i in range(6)] == ours


def test_rows_of_a_static_batch(model, prompts):
    """Three at a time: 8 and 6 passes, whatever the shorter ones need."""
    cache = PagedCache(model.config, BlockManager(60, 4))
    run = serve_trace(model, cache, prompts, OUTPUTS, "static", 3)
    assert len(run.rows) == (9 - 1) + (7 - 1)
    assert all(len(row) == 3 for row in run.rows)
    wanted = sum(OUTPUTS) - len(OUTPUTS)  # first tokens come from the prompts
    assert run.busy == wanted / (3 * 14)
    assert run.rows[0] == [0, -1, 2]
    assert run.rows[-1] == [3, -1, -1]


def test_rows_of_a_continuous_batch(model, prompts):
    """No row is for nobody, and as soon as one leaves the next is there."""
    cache = PagedCache(model.config, BlockManager(60, 4))
    run = serve_trace(model, cache, prompts, OUTPUTS, "continuous", 3)
    assert run.busy == 1.0
    # request 1 has its only token from its prompt: 3 is there at once
    assert run.rows[0] == [0, 2, 3]
    assert run.rows[2] == [0, 3, 4]
    assert len(run.rows) == 8
    wanted = sum(OUTPUTS) - len(OUTPUTS)
    assert sum(map(len, run.rows)) == wanted


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"way": "dynamic"}, "way='dynamic'"),
        ({"slots": 0}, "slots=0"),
        ({"outputs": [1]}, "outputs="),
        ({"outputs": [1, 0, 1, 1, 1, 1]}, "outputs="),
    ],
)
def test_refusals(model, prompts, changes, says):
    cache = PagedCache(model.config, BlockManager(60, 4))
    arguments = {"outputs": OUTPUTS, **changes}
    with pytest.raises(ValueError, match=says):
        serve_trace(model, cache, prompts, **arguments)


def test_a_cache_that_is_too_small_is_left_empty(model, prompts):
    cache = PagedCache(model.config, BlockManager(5, 4))
    with pytest.raises(OutOfBlocks):
        serve_trace(model, cache, prompts, OUTPUTS, "continuous", 3)
    assert cache.manager.used == 0
