"""Attention of one new token per sequence over keys and values that lie in blocks.

    o = Σ_j a_j v_j,   a = softmax(q kᵀ / √D),   token j in block table[j // b]

    B  sequences, each with its own length
    H  query heads, G of them for each of
    K  key/value heads
    D  head_dim
    N  blocks in all
    b  block_size
    M  blocks in the longest table; shorter ones are filled up with any block

`paged_attention` gathers the blocks and computes as usual. `paged_attention_by_blocks`
reads one block of every sequence at a time, as the kernels do, and keeps a running
softmax. Both give the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def as_tensor(tables: Sequence[Sequence[int]]) -> Int[Tensor, "B M"]:
    """Tables of unequal lengths as one tensor, filled up with block 0."""
    width = max(len(table) for table in tables)
    rows = [[*table, *[0] * (width - len(table))] for table in tables]
    return torch.tensor(rows, dtype=torch.long)


def check_shapes(q: Tensor, keys: Tensor, tables: Tensor, lengths: Tensor) -> None:
    """Raises ValueError where the four do not fit, naming the two that differ."""
    if q.shape[1] % keys.shape[2]:
        raise ValueError(
            f"q has {q.shape[1]} heads, which is no multiple of the {keys.shape[2]}"
            " key heads"
        )
    room = tables.shape[1] * keys.shape[1]
    if len(lengths) != len(q) or int(lengths.min()) < 1 or int(lengths.max()) > room:
        raise ValueError(
            f"lengths={lengths.tolist()} must hold {len(q)} numbers between 1 and"
            f" {room}, the tokens that a table has room for"
        )


def paged_attention(
    q: Float[Tensor, "B H D"],
    keys: Float[Tensor, "N b K D"],
    values: Float[Tensor, "N b K D"],
    tables: Int[Tensor, "B M"],
    lengths: Int[Tensor, "B"],
) -> Float[Tensor, "B H D"]:
    """One query per sequence over the first `lengths` tokens of its table.

    Raises:
        ValueError: heads that do not divide, or lengths that do not fit the tables.
    """
    check_shapes(q, keys, tables, lengths)
    B, H, D = q.shape
    K = keys.shape[2]
    k = keys[tables].flatten(1, 2)  # (B, M, b, K, D) → (B, M·b, K, D)
    v = values[tables].flatten(1, 2)  # (B, M·b, K, D)
    q = q.view(B, K, H // K, D)  # (B, K, G, D)
    scores = torch.einsum("bkgd,bskd->bkgs", q, k) * D**-0.5
    beyond = torch.arange(k.shape[1]) >= lengths[:, None]  # (B, M·b)
    scores = scores.masked_fill(beyond[:, None, None], -torch.inf)
    # what stands beyond the text may be anything, also NaN, and 0 · NaN is NaN
    v = v.masked_fill(beyond[:, :, None, None], 0.0)
    out = torch.einsum("bkgs,bskd->bkgd", scores.softmax(-1), v)
    return out.reshape(B, H, D)


def paged_attention_by_blocks(
    q: Float[Tensor, "B H D"],
    keys: Float[Tensor, "N b K D"],
    values: Float[Tensor, "N b K D"],
    tables: Int[Tensor, "B M"],
    lengths: Int[Tensor, "B"],
) -> Float[Tensor, "B H D"]:
    """The same, block by block: m, l and O are a running maximum, sum and output.

    Raises:
        ValueError: heads that do not divide, or lengths that do not fit the tables.
    """
    check_shapes(q, keys, tables, lengths)
    B, H, D = q.shape
    b, K = keys.shape[1:3]
    q = q.view(B, K, H // K, D)  # (B, K, G, D)
    m = q.new_full(q.shape[:3], -torch.inf)  # (B, K, G)
    l = q.new_zeros(q.shape[:3])
    O = torch.zeros_like(q)
    for j in range(tables.shape[1]):
        k, v = keys[tables[:, j]], values[tables[:, j]]  # (B, b, K, D)
        beyond = j * b + torch.arange(b) >= lengths[:, None]  # (B, b)
        S = torch.einsum("bkgd,bskd->bkgs", q, k) * D**-0.5
        S = S.masked_fill(beyond[:, None, None], -torch.inf)
        v = v.masked_fill(beyond[:, :, None, None], 0.0)
        # every sequence has a token in its first block, so m is finite from there on
        m_new = torch.maximum(m, S.amax(-1))
        alpha = (m - m_new).exp()
        P = (S - m_new[..., None]).exp()
        l = alpha * l + P.sum(-1)
        O = alpha[..., None] * O + torch.einsum("bkgs,bskd->bkgd", P, v)
        m = m_new
    return (O / l[..., None]).reshape(B, H, D)
