"""The kernels as functions of tensors, on a GPU or in Triton's interpreter.

It imports `triton`, which settles then whether it compiles or interprets
(TRITON_INTERPRET=1): so this file is imported by its name, not with the room.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from llmlab.compilers.triton_kernels.kernels import (
    attention_tile,
    mlp_tile,
    softmax_rows,
)


@dataclass(frozen=True)
class Tile:
    """Sizes of an mlp's tile, and how many rows of tiles are a group."""

    rows: int = 64
    cols: int = 64
    depth: int = 32
    group: int = 8

    def __post_init__(self) -> None:
        for name in ("rows", "cols", "depth"):
            power_of_2(name, getattr(self, name))
        if self.group < 1:
            raise ValueError(f"group={self.group} must be 1 at least")


def power_of_2(name: str, value: int) -> None:
    """
    Raises:
        ValueError: it is none.
    """
    if value < 1 or value & (value - 1):
        raise ValueError(f"{name}={value} must be a power of 2")


def interpreted() -> bool:
    """Whether the kernels were defined for Triton's interpreter."""
    return not isinstance(mlp_tile, triton.runtime.JITFunction)


def check_device(tensor: Tensor) -> None:
    """
    Raises:
        RuntimeError: no GPU, and the interpreter was not asked for in time.
    """
    if not tensor.is_cuda and not interpreted():
        raise RuntimeError(
            "Triton was imported for a GPU, and these tensors are on the CPU: set"
            " TRITON_INTERPRET=1 before anything imports triton"
            f" (it is {os.environ.get('TRITON_INTERPRET')!r} now)"
        )


def softmax(x: Float[Tensor, "T d"]) -> Float[Tensor, "T d"]:
    """Softmax of each row, which is read once and stays on the chip.

    Raises:
        ValueError: the numbers of a row do not lie side by side.
        RuntimeError: see `check_device`.
    """
    if x.stride(1) != 1:
        raise ValueError(f"x has strides {x.stride()}: the numbers of a row must touch")
    check_device(x)
    T, d = x.shape
    y = x.new_empty(T, d)
    softmax_rows[(T,)](x, y, d, x.stride(0), COLS=triton.next_power_of_2(d))
    return y


def mlp(
    x: Float[Tensor, "T d"],
    w: Float[Tensor, "d f"],
    b: Float[Tensor, "f"],
    tile: Tile | None = None,
) -> Float[Tensor, "T f"]:
    """GELU(x w + b), the GELU in its tanh form; in x's dtype.

    Raises:
        RuntimeError: see `check_device`.
    """
    check_device(x)
    tile = tile or Tile()
    x, w, b = x.contiguous(), w.contiguous(), b.contiguous()
    y = x.new_empty(len(x), w.shape[1])
    mlp_tile[mlp_grid(x, w, tile)](*mlp_arguments(x, w, b, y, tile))
    return y


def mlp_grid(x: Tensor, w: Tensor, tile: Tile) -> tuple[int]:
    """One program per tile of the result."""
    return (math.ceil(len(x) / tile.rows) * math.ceil(w.shape[1] / tile.cols),)


def mlp_arguments(x: Tensor, w: Tensor, b: Tensor, y: Tensor, tile: Tile) -> tuple:
    """What `mlp_tile` takes, in its order."""
    sizes = (len(x), w.shape[1], w.shape[0])
    blocks = (tile.rows, tile.cols, tile.depth, tile.group)
    return (x, w, b, y, *sizes, *blocks, interpreted())


def attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    causal: bool = True,
    rows: int = 32,
    cols: int = 32,
) -> Float[Tensor, "B H T D"]:
    """softmax(q kᵀ / √D) v, in q's dtype; a query that sees no key gets 0.

    With `causal`, the last query stands at the last key.

    Raises:
        ValueError: tiles of another size, or heads that do not fit.
        RuntimeError: see `check_device`.
    """
    power_of_2("rows", rows)
    power_of_2("cols", cols)
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    if H % K:
        raise ValueError(f"{H} query heads must be a multiple of {K} key heads")
    check_device(q)
    q, k, v = (x.contiguous() for x in (q, k, v))
    o = torch.empty_like(q)
    grid = (math.ceil(T * H // K / rows), B * K)
    attention_tile[grid](
        q,
        k,
        v,
        o,
        T,
        S,
        D**-0.5,
        D=D,
        G=H // K,
        ROWS=rows,
        COLS=cols,
        WIDTH=max(16, triton.next_power_of_2(D)),
        CAUSAL=causal,
        WIDE=interpreted(),
    )
    return o
