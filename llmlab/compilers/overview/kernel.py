"""The functions of the part as Triton kernels, to be read rather than run.

Triton is written by hand where others start from a graph: one *program* computes one
tile, and says which addresses it reads. The names of values survive into TTIR.

    R × C   the tile of one program       K   columns of x that it reads at once

Shapes must be multiples of the tile: masks come in the lesson on Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mlp(
    x,
    w,
    b,
    y,
    d: tl.constexpr,
    f: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
):
    """One tile of GELU(x w + b)."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    product = tl.full((R, C), 0, tl.float32)
    for start in range(0, d, K):
        depth = start + tl.arange(0, K)
        x_tile = tl.load(x + row[:, None] * d + depth[None, :])
        w_tile = tl.load(w + depth[:, None] * f + column[None, :])
        product = tl.dot(x_tile, w_tile, product)
    bias = product + tl.load(b + column)[None, :]
    # tanh(u) = 1 - 2 / (exp(2 u) + 1): Triton has exp and no tanh of its own
    gelu = 0.7978845608 * (bias + 0.044715 * bias * bias * bias)
    gelu = 1 - 2 / (tl.exp(2 * gelu) + 1)
    gelu = 0.5 * bias * (1 + gelu)
    tl.store(y + row[:, None] * f + column[None, :], gelu)


@triton.jit
def attention_row(q, k, v, y, S: tl.constexpr, D: tl.constexpr):
    """softmax(q kᵀ / √D) v, all keys in one program."""
    key = tl.arange(0, S)
    column = tl.arange(0, D)
    where = key[:, None] * D + column[None, :]
    query = tl.load(q + column)
    score = tl.sum(tl.load(k + where) * query[None, :], 1)
    scale = score / D**0.5
    softmax = tl.exp(scale - tl.max(scale, 0))
    softmax = softmax / tl.sum(softmax, 0)
    average = tl.sum(softmax[:, None] * tl.load(v + where), 0)
    tl.store(y + column, average)
