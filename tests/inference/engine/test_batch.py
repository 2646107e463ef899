"""One pass over many requests gives each its own logits."""

from __future__ import annotations

import sys
from copy import deepcopy

import pytest
import torch

from llmlab.inference.engine import Chunk, attention, compute
from llmlab.inference.engine.fused import FusedBlock, fuse
from llmlab.inference.engine.packed import PackedLinear, library, packed
from llmlab.inference.paged_attention import BlockManager, PagedCache
from tests.inference.engine.models import VOCAB, make, plain, small

MODEL = make()


def cache_of(model, size=4) -> PagedCache:
    return PagedCache(model.config, BlockManager(60, size), torch.float32)


def texts(*lengths) -> list[list[int]]:
    torch.manual_seed(0)
    return [torch.randint(VOCAB, (length,)).tolist() for length in lengths]


@pytest.mark.parametrize("size", [1, 3, 16])
def test_each_row_is_what_the_text_alone_gives(size):
    """Stored beginnings, of which the rest comes in one pass: 1, 3, 20 and 9 tokens,
    the last from nothing, in an order of their own.
    """
    cache = cache_of(MODEL, size)
    starts = [7, 12, 5, 0]
    asked = texts(8, 15, 25, 9)
    tables = []
    with torch.inference_mode():
        for text, start in zip(asked, starts, strict=True):
            sequence, _ = cache.manager.add(text)
            tables.append(cache.manager.tables[sequence])
            if start:
                first = Chunk(text[:start], 0, tables[-1], 0)
                none = compute(MODEL, cache, [first], attention.unchecked)
                assert none.shape == (0, VOCAB)
        wanted = [1, 3, 1, 2]
        chunks = [
            Chunk(text[start:], start, table, count)
            for text, start, table, count in zip(
                asked, starts, tables, wanted, strict=True
            )
        ]
        found = compute(MODEL, cache, chunks, attention.unchecked)
        rows = [
            MODEL(torch.tensor([text]))[0, -count:]
            for text, count in zip(asked, wanted, strict=True)
        ]
    torch.testing.assert_close(found, torch.cat(rows), atol=1e-5, rtol=1e-4)


def test_only_rows_that_are_asked_for_meet_the_vocabulary():
    cache = cache_of(MODEL)
    seen = []
    hook = MODEL.lm_head.register_forward_hook(
        lambda module, inputs, out: seen.append(len(inputs[0]))
    )
    try:
        text, other = texts(30, 12)
        tables = [
            cache.manager.tables[cache.manager.add(each)[0]] for each in (text, other)
        ]
        chunks = [Chunk(text, 0, tables[0], 1), Chunk(other, 0, tables[1], 0)]
        compute(MODEL, cache, chunks, attention.unchecked)
    finally:
        hook.remove()
    assert seen == [1]


needs_c = pytest.mark.skipif(library() is None, reason="no C compiler here")
PACKED = {
    "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "one key for all": {"num_key_value_heads": 1},
    "an odd width": {"head_dim": 10, "intermediate_size": 37, "hidden_size": 21},
}


@needs_c
@pytest.mark.parametrize("first", [lambda model: model, fuse], ids=["plain", "fused"])
@pytest.mark.parametrize("shape", PACKED)
def test_packed_weights_give_the_same(shape, first):
    model = make(1, **PACKED[shape])
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=1.0)
    given = first(deepcopy(model))
    before = {name: type(module) for name, module in given.named_modules()}
    fast = packed(given)
    assert {name: type(module) for name, module in given.named_modules()} == before
    kinds = [type(module) for module in fast.modules()]
    assert kinds.count(FusedBlock) == 2
    assert kinds.count(PackedLinear) == 4 * 2 + 1
    assert torch.nn.Linear not in kinds
    ids = torch.tensor(texts(9, 9))
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    with torch.inference_mode():
        for more in ({}, {"attention_mask": mask}):
            torch.testing.assert_close(
                fast(ids, **more), model(ids, **more), atol=1e-4, rtol=1e-4
            )
    assert torch.equal(fast.lm_head.weight, given.lm_head.weight)
    asked = texts(30, 3, 8)
    written = small(fast).generate(asked)
    assert written == [plain(model, prompt, 16) for prompt in asked]


@needs_c
def test_packed_products():
    """Each number of rows, with a panel that is full and one that is not."""
    torch.manual_seed(0)
    for rows in range(1, 30):
        weight, bias = torch.randn(45, 7), torch.randn(45)
        x = torch.randn(7, rows).T  # not in the order of memory
        found = PackedLinear(weight, bias)(x)
        wanted = torch.nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@needs_c
def test_other_linears_stay_what_they_are():
    """As a quantised one; the rest of their layer is packed."""

    class Other(torch.nn.Linear):
        pass

    model = make(1)
    model.model.layers[0].mlp.up_proj = Other(24, 40, bias=False)
    model.model.layers[1].self_attn.o_proj = Other(24, 24, bias=False)
    kinds = [type(module) for module in packed(model).modules()]
    assert kinds.count(Other) == 2
    ids = torch.tensor(texts(5))
    with torch.inference_mode():
        torch.testing.assert_close(packed(model)(ids), model(ids), atol=1e-4, rtol=1e-4)
    half = make(1).bfloat16()
    assert packed(half) is half


def test_without_a_compiler_the_model_stays(monkeypatch):
    module = sys.modules[PackedLinear.__module__]
    monkeypatch.setattr(module, "library", lambda: None)
    assert packed(MODEL) is MODEL
