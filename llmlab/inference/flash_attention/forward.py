"""The forward pass of FlashAttention, tile by tile.

    O = softmax(Q Kᵀ / √D) V        L = log Σ_j e^{S_j}

Dao et al. 2022, https://arxiv.org/abs/2205.14135, in the loop order of FlashAttention-2
(Dao 2023, https://arxiv.org/abs/2307.08691, algorithm 1): a block of queries stays, and
the blocks of keys pass by. So m, l and O of the block live in the fast memory, and each
row of O is written once. The largest matrix of scores is rows × cols.

Queries stand at the end of the keys: query i of T has position S − T + i, and under the
causal mask it sees the keys j ≤ S − T + i. That is "bottom right", as in flash-attn
since 2.1. PyTorch's `is_causal=True` is "top left": j ≤ i.

A tile in which no query may see a key is skipped; one in which every query sees every
key needs no mask; only those on the diagonal are masked.

    B        batch                          T, S   queries, keys
    H, K     query heads, key/value heads   G      H / K
    D        head_dim                       rows, cols: B_r and B_c of the paper

Simplified: no dropout, no ALiBi. Products are in fp32; a GPU takes 16-bit tiles and
sums in fp32.
"""

from __future__ import annotations

from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from llmlab.inference.flash_attention.online_softmax import (
    finish,
    online_softmax,
    start,
)
from llmlab.models.attention import Mask

# Queries r0 … r1 − 1, keys c0 … c1 − 1, and whether the tile needs a mask.
Tile = tuple[int, int, int, int, bool]


def causal_tiles(T: int, S: int, rows: int, cols: int) -> list[Tile]:
    """The tiles that causal attention computes: (r0, r1, c0, c1, masked).

    By blocks of queries, and in each from the first key to the last. `masked` is True
    where some of the tile's pairs may be seen and some may not.

    >>> causal_tiles(4, 4, 2, 2)
    [(0, 2, 0, 2, True), (2, 4, 0, 2, False), (2, 4, 2, 4, True)]
    """
    plan = []
    for r0 in range(0, T, rows):
        r1 = min(r0 + rows, T)
        first = S - T + r0  # the last key that the first query of the block sees
        last = S - T + r1 - 1  # … and the last query
        for c0 in range(0, min(S, last + 1), cols):
            c1 = min(c0 + cols, S)
            plan.append((r0, r1, c0, c1, c1 - 1 > first))
    return plan


def all_tiles(T: int, S: int, rows: int, cols: int, mask: Mask | None) -> list[Tile]:
    """The tiles of attention that is not causal, or has a mask of its own."""
    plan = []
    for r0 in range(0, T, rows):
        for c0 in range(0, S, cols):
            tile = (r0, min(r0 + rows, T), c0, min(c0 + cols, S))
            if mask is None or (seen(mask[..., tile[0] : tile[1], tile[2] : tile[3]])):
                plan.append((*tile, mask is not None))
    return plan


def seen(mask: Mask) -> bool:
    """Whether anything may be seen of a tile."""
    return bool((mask if mask.dtype == torch.bool else mask > -torch.inf).any())


def forward(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    mask: Mask | None = None,
    causal: bool = True,
    rows: int = 64,
    cols: int = 64,
) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B H T"]]:
    """O, in q's dtype, and the log-sum-exp L, in fp32 at least.

    Args:
        mask: where a query may look, or what is added to its scores; then `causal` is
            not looked at.
    Raises:
        ValueError: shapes that do not fit, or tiles of no size.
    """
    check(q, k, v, mask, rows, cols)
    q, k, v = grouped(q, k, v)
    *heads, T, _ = q.shape
    S = k.shape[-2]
    plan = tiles(T, S, rows, cols, mask, causal)
    out = q.new_zeros(*heads, T, v.shape[-1], dtype=wide(q))
    lse = out.new_full((*heads, T), -torch.inf)
    # a block of queries that sees nothing has no tiles: its output stays 0
    for (r0, r1), block in groupby(plan, key=lambda tile: tile[:2]):
        state = start(out[..., r0:r1, :].shape, out)
        for tile in block:
            values = v[..., tile[2] : tile[3], :].to(out.dtype)
            state = online_softmax(*state, tile_scores(q, k, mask, tile), values)
        out[..., r0:r1, :], lse[..., r0:r1] = finish(*state)
    # (B, K, G, T, D) → (B, H, T, D) and (B, K, G, T) → (B, H, T)
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def tiles(
    T: int, S: int, rows: int, cols: int, mask: Mask | None, causal: bool
) -> list[Tile]:
    """What is computed at all."""
    if causal and mask is None:
        return causal_tiles(T, S, rows, cols)
    return all_tiles(T, S, rows, cols, mask)


def tile_scores(
    q: Float[Tensor, "B K G T D"],
    k: Float[Tensor, "B K 1 S D"],
    mask: Mask | None,
    tile: Tile,
) -> Float[Tensor, "B K G rows cols"]:
    """Scaled scores of one tile in fp32 at least; −∞ where a query may not look."""
    r0, r1, c0, c1, masked = tile
    T, D = q.shape[-2:]
    S = k.shape[-2]
    q_tile = q[..., r0:r1, :].to(wide(q)) * D**-0.5
    scores = q_tile @ k[..., c0:c1, :].to(wide(q)).transpose(-1, -2)
    if not masked:
        return scores
    if mask is None:
        positions = torch.arange(S - T + r0, S - T + r1, device=q.device)
        keys = torch.arange(c0, c1, device=q.device)
        return scores.masked_fill(keys > positions[:, None], -torch.inf)
    part = mask[..., r0:r1, c0:c1]
    # (B or 1, H or 1, rows, cols) → (B or 1, K or 1, G or 1, rows, cols)
    part = part.unflatten(1, (k.shape[1] if part.shape[1] > 1 else 1, -1))
    if part.dtype == torch.bool:
        return scores.masked_fill(~part, -torch.inf)
    return scores + part


def grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, T, D) → (B, K, G, T, D): query head h uses key head h // G.

    Keys and values get an axis of 1 for G, (B, K, 1, S, D), and are not copied.
    """
    return q.unflatten(1, (k.shape[1], -1)), k[:, :, None], v[:, :, None]


def wide(x: Tensor) -> torch.dtype:
    """fp32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def check(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: int, cols: int
) -> None:
    """Refuses what cannot be meant."""
    if rows < 1 or cols < 1:
        raise ValueError(f"rows={rows} and cols={cols} must be at least 1")
    if q.dim() != 4 or k.dim() != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: they must"
            " be (B, H, T, D), (B, K, S, D) and (B, K, S, any)"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q is {tuple(q.shape)} and k {tuple(k.shape)}: batch and head_dim must be"
            " the same"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads must be a multiple of {k.shape[1]} key heads"
        )
    if mask is None:
        return
    wanted = (q.shape[2], k.shape[2])
    fits = mask.dim() == 4 and tuple(mask.shape[2:]) == wanted
    fits = fits and mask.shape[0] in (1, q.shape[0])
    if not fits or mask.shape[1] not in (1, q.shape[1]):
        raise ValueError(
            f"mask is {tuple(mask.shape)}: it must be (B or 1, H or 1, T, S), here"
            f" T={wanted[0]}, S={wanted[1]}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"mask is {mask.dtype}: it must be boolean (True: may look) or floating"
            " (added to the scores)"
        )
