"""The forward pass as a Triton kernel: what `forward` does, for a GPU.

One program per block of queries and head, all of them at the same time. It has its
block of Q, and m, l and O, in registers and fast memory; K and V pass by in tiles.

Without a GPU Triton can interpret a kernel: one program after another, in NumPy. That
is decided when `triton` is imported, by the environment variable TRITON_INTERPRET=1.
The interpreter is right for fp32 and fp16. **Its products of bf16 tiles are wrong**
(3.7.1: it works on the bit patterns), and nothing warns; so there a tile is converted
to fp32 after it was loaded, `wide=True`. A GPU multiplies bf16 itself, `wide=False`.

    T, S      queries, keys           ROWS, COLS   sizes of a tile, powers of 2
    H, K      query and key heads     WIDTH        head_dim D, up to a power of 2
"""

from __future__ import annotations

import math
import os

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor


@triton.jit
def flash_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    T,
    S,
    H,
    K,
    scale,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One block of queries of one head. All tensors are contiguous."""
    block = tl.program_id(0)
    head = tl.program_id(1)  # b · H + h
    key_head = (head // H) * K + (head % H) // (H // K)

    row = block * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    row_there = row < T
    there = row_there[:, None] & (channel < D)[None, :]
    place = (head * T + row)[:, None] * D + channel[None, :]
    q = tl.load(q_ptr + place, mask=there, other=0.0)
    if WIDE:
        q = q.to(tl.float32)

    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, WIDTH], tl.float32)

    # behind the last key that the last query of the block may see
    end = tl.minimum(S, S - T + (block + 1) * ROWS) if CAUSAL else S
    for begin in range(0, end, COLS):
        col = begin + tl.arange(0, COLS)
        key_there = (col < S)[:, None] & (channel < D)[None, :]
        key_place = (key_head * S + col)[:, None] * D + channel[None, :]
        k = tl.load(k_ptr + key_place, mask=key_there, other=0.0)
        v = tl.load(v_ptr + key_place, mask=key_there, other=0.0)
        if WIDE:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        # "ieee": fp32 tiles are not rounded to TF32 on the way
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        visible = (col < S)[None, :]
        if CAUSAL:
            visible = visible & (col[None, :] <= S - T + row[:, None])
        s = tl.where(visible, s, float("-inf"))

        m_new = tl.maximum(m, tl.max(s, 1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp(m - base)
        p = tl.exp(s - base[:, None])
        l = alpha * l + tl.sum(p, 1)
        o = alpha[:, None] * o + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = m_new

    safe_l = tl.where(l == 0.0, 1.0, l)  # 0 where no key was seen
    lse = tl.where(l == 0.0, float("-inf"), m + tl.log(safe_l))
    tl.store(o_ptr + place, o / safe_l[:, None], mask=there)
    tl.store(lse_ptr + head * T + row, lse, mask=row_there)


def interpreted() -> bool:
    """Whether the kernel was defined for the interpreter."""
    return not isinstance(flash_forward, triton.runtime.JITFunction)


def forward(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    causal: bool = True,
    rows: int = 64,
    cols: int = 64,
    wide: bool | None = None,
) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B H T"]]:
    """O, in q's dtype, and the log-sum-exp in fp32.

    Args:
        rows, cols: powers of 2, at least 16 on a GPU.
        wide: tiles are converted to fp32 before they are multiplied. None: where the
            interpreter runs, for it is wrong for bf16.
    Raises:
        ValueError: tiles of another size, or heads that do not fit.
        RuntimeError: no GPU, and the interpreter was not asked for in time.
    """
    for name, value in (("rows", rows), ("cols", cols)):
        if value < 1 or value & (value - 1):
            raise ValueError(f"{name}={value} must be a power of 2")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads must be a multiple of {k.shape[1]} key heads"
        )
    if not q.is_cuda and not interpreted():
        raise RuntimeError(
            "Triton was imported for a GPU, and these tensors are on the CPU: set"
            " TRITON_INTERPRET=1 before anything imports triton"
            f" (it is {os.environ.get('TRITON_INTERPRET')!r} now)"
        )
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    q, k, v = (x.contiguous() for x in (q, k, v))
    out = torch.empty_like(q)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    grid = (math.ceil(T / rows), B * H)
    flash_forward[grid](
        q,
        k,
        v,
        out,
        lse,
        T,
        S,
        H,
        K,
        D**-0.5,
        D=D,
        ROWS=rows,
        COLS=cols,
        WIDTH=max(16, triton.next_power_of_2(D)),
        CAUSAL=causal,
        WIDE=interpreted() if wide is None else wide,
    )
    return out, lse
