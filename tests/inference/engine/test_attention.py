"""Attention over blocks in C is the lesson's."""

from __future__ import annotations

import pytest
import torch

from llmlab.inference import paged_attention as paged
from llmlab.inference.engine import attention

needs_compiler = pytest.mark.skipif(
    attention.library() is None, reason="no C compiler here"
)


def inputs(rows, heads, kv_heads, dim, size, longest, seed=0):
    torch.manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (rows,))
    lengths[0] = longest
    width = -(-longest // size)
    blocks = rows * width
    keys = torch.randn(blocks, size, kv_heads, dim)
    values = torch.randn(blocks, size, kv_heads, dim)
    tables = torch.randperm(blocks).view(rows, width)
    for row, length in enumerate(lengths.tolist()):
        # what stands beyond the text must not be read
        flat = tables[row, (torch.arange(width * size)) // size]
        beyond = torch.arange(width * size) >= length
        keys[flat[beyond], (torch.arange(width * size) % size)[beyond]] = torch.nan
        values[flat[beyond], (torch.arange(width * size) % size)[beyond]] = torch.nan
    q = 3 * torch.randn(rows, heads, dim)
    return q, keys, values, tables, lengths


@needs_compiler
@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 64, 1),  # one token attends to itself
        (4, 9, 3, 64, 37),  # the real model's heads
        (2, 8, 1, 128, 70),  # MQA
        (3, 5, 5, 6, 33),  # MHA, and a width that fills no register
        (2, 4, 2, 7, 19),
    ],
)
def test_it_is_the_lessons(shape, size):
    given = inputs(*shape[:4], size, shape[4])
    before = [each.clone() for each in given]
    found = attention.paged_attention(*given)
    torch.testing.assert_close(
        found, paged.paged_attention(*given), atol=2e-5, rtol=1e-5
    )
    for each, was in zip(given, before, strict=True):
        assert torch.equal(each.nan_to_num(), was.nan_to_num())


@needs_compiler
def test_large_scores_do_not_overflow():
    q, keys, values, tables, lengths = inputs(2, 4, 2, 64, 4, 30)
    given = (100 * q, keys, values, tables, lengths)
    found = attention.paged_attention(*given)
    assert found.isfinite().all()
    torch.testing.assert_close(
        found, paged.paged_attention(*given), atol=1e-4, rtol=1e-4
    )


@needs_compiler
def test_what_lies_otherwise_in_memory():
    q, keys, values, tables, lengths = inputs(3, 4, 2, 8, 4, 9)
    wanted = paged.paged_attention(q, keys, values, tables, lengths)
    strided = q.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.cat([tables, tables], dim=1)[:, : tables.shape[1]]
    assert not wide.is_contiguous() or tables.shape[1] == 1
    found = attention.paged_attention(strided, keys, values, wide, lengths)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_numbers_take_the_lessons_function(dtype):
    q, keys, values, tables, lengths = inputs(2, 4, 2, 8, 4, 9)
    given = (q.to(dtype), keys.to(dtype), values.to(dtype), tables, lengths)
    assert torch.equal(attention.paged_attention(*given), paged.paged_attention(*given))


def test_without_a_compiler_too(monkeypatch):
    given = inputs(2, 4, 2, 8, 4, 9)
    monkeypatch.setattr(attention, "library", lambda: None)
    assert torch.equal(attention.paged_attention(*given), paged.paged_attention(*given))


def test_what_would_be_read_outside_is_refused():
    q, keys, values, tables, lengths = inputs(2, 4, 2, 8, 4, 9)
    for block in (-1, len(keys)):
        wrong = tables.clone()
        wrong[0, 0] = block
        with pytest.raises(ValueError, match="tables must name blocks from 0 to 5"):
            attention.paged_attention(q, keys, values, wrong, lengths)
    with pytest.raises(ValueError, match="lengths="):
        attention.paged_attention(q, keys, values, tables, lengths + 8)
    with pytest.raises(ValueError, match="no multiple"):
        attention.paged_attention(q[:, :3], keys, values, tables, lengths)
