"""How a group of parameters is cut into p equal pieces, one per rank.

This is the bookkeeping under ZeRO and FSDP. There are two layouts, each a pair of pure
functions, `cut` and `join`, that undo each other:

    flat   ZeRO (section 5), FSDP1: join all parameters end to end, pad to a multiple
           of p, cut. One padding per group; a boundary falls anywhere, also inside a
           row of a matrix.
    rows   FSDP2 (`fully_shard`): cut each parameter by its dimension 0, pad each. One
           padding per parameter; a rank holds whole rows of every parameter, under
           the parameter's own name.

    p  ranks
    Ψ  elements of the group
    s  elements of a rank's piece, padding included (p·s ≥ Ψ)

`cut` gives a matrix (p, s): row r is rank r's piece. A reduce-scatter along its
dimension 0 leaves each rank its row of the sum; an all-gather of rows gives the matrix
back. Padding is zero, so it adds nothing to a norm, and Adam leaves it zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

Shape = tuple[int, ...]


def shard_bounds(n: int, p: int, rank: int) -> tuple[int, int]:
    """First and one past the last of the n elements that `rank` owns: ⌈n/p⌉ each, fewer
    (or none) for the last ranks.
    """
    if p < 1 or not 0 <= rank < p or n < 0:
        raise ValueError(
            f"n={n}, p={p}, rank={rank}: n ≥ 0 elements are cut over ranks 0 … p − 1"
        )
    s = -(-n // p)
    return min(rank * s, n), min((rank + 1) * s, n)


def cut_flat(tensors: Sequence[Tensor], p: int) -> Float[Tensor, "p s"]:
    """All tensors end to end, padded with zeros, in p pieces."""
    flat = torch.cat([t.reshape(-1) for t in tensors])  # (Ψ,)
    return torch.nn.functional.pad(flat, (0, -len(flat) % p)).view(p, -1)


def join_flat(pieces: Float[Tensor, "p s"], shapes: Sequence[Shape]) -> list[Tensor]:
    """The tensors of these shapes again."""
    sizes = [prod(shape) for shape in shapes]
    parts = pieces.reshape(-1)[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _row_sizes(shapes: Sequence[Shape], p: int) -> list[tuple[int, int]]:
    """(rows, numbers per row) of each parameter's piece."""
    return [
        (-(-shape[0] // p), prod(shape[1:])) if shape else (1, 1) for shape in shapes
    ]


def cut_rows(tensors: Sequence[Tensor], p: int) -> Float[Tensor, "p s"]:
    """Each tensor's dimension 0 in p blocks of ⌈rows/p⌉, the last padded with zeros.

    Rank r's blocks end to end.
    """
    sizes = _row_sizes([tuple(t.shape) for t in tensors], p)
    blocks = []
    for t, (rows, width) in zip(tensors, sizes, strict=True):
        flat = t.reshape(-1)  # (rows in all · width,)
        blocks.append(
            torch.nn.functional.pad(flat, (0, p * rows * width - len(flat))).view(p, -1)
        )
    return torch.cat(blocks, 1)


def join_rows(pieces: Float[Tensor, "p s"], shapes: Sequence[Shape]) -> list[Tensor]:
    """The tensors of these shapes again."""
    p = len(pieces)
    widths = [rows * width for rows, width in _row_sizes(shapes, p)]
    blocks = pieces.split(widths, 1)  # each (p, rows · width)
    return [
        b.reshape(-1)[: prod(shape)].view(shape)
        for b, shape in zip(blocks, shapes, strict=True)
    ]


LAYOUTS = {"flat": (cut_flat, join_flat), "rows": (cut_rows, join_rows)}


def padding(shapes: Sequence[Shape], p: int, layout: str) -> int:
    """Elements of padding that a layout adds to a group, over all ranks together."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be one of {', '.join(LAYOUTS)}")
    elements = sum(prod(shape) for shape in shapes)
    if layout == "flat":
        return -elements % p
    return p * sum(rows * width for rows, width in _row_sizes(shapes, p)) - elements
