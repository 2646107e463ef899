"""Attention over blocks equals attention over one piece."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.inference.paged_attention import (
    as_tensor,
    paged_attention,
    paged_attention_by_blocks,
)
from llmlab.models.attention import sdpa

WAYS = pytest.mark.parametrize("way", [paged_attention, paged_attention_by_blocks])


def scattered(lengths, block_size, K=2, D=4, dtype=torch.float32, seed=0):
    """Dense keys and values of each sequence, and the same in shuffled blocks.

    All that is not a token is NaN.
    """
    random = torch.Generator().manual_seed(seed)
    dense = [
        torch.randn(2, K, n, D, generator=random, dtype=torch.float32).to(dtype)
        for n in lengths
    ]
    needed = [-(-n // block_size) for n in lengths]
    order = torch.randperm(sum(needed) + 2, generator=random).tolist()
    store = torch.full((2, len(order), block_size, K, D), torch.nan, dtype=dtype)
    tables = []
    for each, blocks in zip(dense, needed, strict=True):
        table = [order.pop() for _ in range(blocks)]
        for i in range(each.shape[2]):
            store[:, table[i // block_size], i % block_size] = each[:, :, i]
        tables.append(table)
    return dense, store[0], store[1], as_tensor(tables), torch.tensor(lengths)


def one_by_one(q, dense):
    """PyTorch's attention, a sequence at a time."""
    rows = [
        sdpa(each[None, :, None], k[None], v[None], None)[0, :, 0]
        for each, (k, v) in zip(q, dense, strict=True)
    ]
    return torch.stack(rows)


@WAYS
@given(
    lengths=st.lists(st.integers(1, 19), min_size=1, max_size=4),
    block_size=st.integers(1, 7),
    heads=st.sampled_from([(2, 2), (6, 2), (3, 1)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_equals_dense_for_odd_lengths_block_sizes_and_shared_heads(
    way, lengths, block_size, heads, seed
):
    H, K = heads
    dense, *paged = scattered(lengths, block_size, K, seed=seed)
    q = torch.randn(len(lengths), H, 4, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(way(q, *paged), one_by_one(q, dense))


@WAYS
def test_scores_in_the_hundreds_and_bf16(way):
    dense, *paged = scattered([5, 9], 4)
    q = 300 * torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(way(q, *paged), one_by_one(q, dense))
    dense, *paged = scattered([5, 9], 4, dtype=torch.bfloat16)
    q = (q / 300).bfloat16()
    out = way(q, *paged)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, one_by_one(q, dense), atol=3e-2, rtol=3e-2)


@WAYS
def test_a_block_that_two_tables_share_is_read_by_both(way):
    dense, keys, values, tables, _ = scattered([8], 4)
    shared = tables.repeat(2, 1)
    q = torch.randn(2, 2, 4)
    out = way(q, keys, values, shared, torch.tensor([8, 6]))
    shorter = [dense[0], dense[0][:, :, :6]]
    torch.testing.assert_close(out, one_by_one(q, shorter))


@WAYS
def test_refuses_heads_and_lengths_that_do_not_fit(way):
    _, keys, values, tables, lengths = scattered([5, 3], 2)
    q = torch.randn(2, 4, 4)
    with pytest.raises(ValueError, match="q has 3 heads"):
        way(q[:, :3], keys, values, tables, lengths)
    for wrong in ([5], [0, 3], [7, 3]):
        with pytest.raises(ValueError, match="between 1 and 6"):
            way(q, keys, values, tables, torch.tensor(wrong))


def test_tables_of_unequal_lengths():
    assert as_tensor([[3], [5, 1, 2], [4, 4]]).tolist() == [
        [3, 0, 0],
        [5, 1, 2],
        [4, 4, 0],
    ]
