"""Kernels in Triton: softmax of rows, the part's mlp, attention, and one product.

This file imports Triton and nothing else, so that it can be compiled without PyTorch.
`launching` has the functions that take tensors. Whether Triton compiles or interprets
is settled when it is imported, by TRITON_INTERPRET=1.

The interpreter multiplies tiles of bf16 as if their bits were whole numbers (3.7.1), so
there tiles are converted to fp32 after they are loaded: WIDE.

    T  rows          d  columns in       f  columns out
    S  keys          D  width of a head  G  query heads that share a key head
    ROWS, COLS, DEPTH, WIDTH   sizes of blocks, powers of 2
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softmax_rows(x_ptr, y_ptr, d, stride, COLS: tl.constexpr):
    """One program per row. Rows of x lie `stride` apart; y is contiguous."""
    row = tl.program_id(0)
    col = tl.arange(0, COLS)
    there = col < d
    x = tl.load(x_ptr + row * stride + col, mask=there, other=float("-inf"))
    e = tl.exp(x.to(tl.float32) - tl.max(x.to(tl.float32), axis=0))
    y = e / tl.sum(e, axis=0)
    tl.store(y_ptr + row * d + col, y, mask=there)


@triton.jit
def grouped(pid, down, across, GROUP: tl.constexpr):
    """Tile (i, j) of program `pid`: down GROUP rows of tiles first, then on."""
    per_group = GROUP * across
    first = pid // per_group * GROUP
    height = tl.minimum(down - first, GROUP)  # the last group may be lower
    i = first + pid % per_group % height
    j = pid % per_group // height
    return i, j


@triton.jit
def mlp_tile(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    T,
    f,
    d,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of GELU(x w + b). All tensors are contiguous."""
    pid = tl.program_id(0)
    i, j = grouped(pid, tl.cdiv(T, ROWS), tl.cdiv(f, COLS), GROUP)
    row = i * ROWS + tl.arange(0, ROWS)[:, None]
    col = j * COLS + tl.arange(0, COLS)[None, :]
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for k in range(0, d, DEPTH):
        # the same depths, along the columns of x and along the rows of w
        e = k + tl.arange(0, DEPTH)[None, :]
        x = tl.load(x_ptr + row * d + e, mask=(row < T) & (e < d), other=0.0)
        e = k + tl.arange(0, DEPTH)[:, None]
        w = tl.load(w_ptr + e * f + col, mask=(e < d) & (col < f), other=0.0)
        if WIDE:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    b = tl.load(b_ptr + col, mask=col < f, other=0.0)
    y = acc + b.to(tl.float32)
    # GELU, tanh form: y/2 · (1 + tanh u) is y · sigmoid(2u), and e never overflows
    u = 0.7978845608 * (y + 0.044715 * y * y * y)
    e = tl.exp(-2 * tl.abs(u))
    y = y * tl.where(u > 0, 1.0, e) / (1 + e)
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * f + col, y, mask=(row < T) & (col < f))


@triton.jit
def attention_tile(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    T,
    S,
    scale,
    D: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """ROWS queries of one key head: those of its G query heads together.

    Row n of the T·G is query n // G of head n % G. So a key is loaded once for all
    heads that share it, and one token (T = 1) still fills G rows.
    """
    shared = tl.program_id(1)  # b · K + key head
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    t = n // G
    channel = tl.arange(0, WIDTH)[None, :]
    place = ((shared * G + n % G) * T + t) * D + channel
    there = (n < T * G) & (channel < D)
    q = tl.load(q_ptr + place, mask=there, other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    m = tl.full((ROWS, 1), float("-inf"), tl.float32)
    l = tl.zeros((ROWS, 1), tl.float32)
    o = tl.zeros((ROWS, WIDTH), tl.float32)
    # behind the last key that the last row may see
    end = S
    if CAUSAL:
        end = tl.minimum(S, S - T + (tl.program_id(0) * ROWS + ROWS - 1) // G + 1)
    for begin in range(0, end, COLS):
        key = begin + tl.arange(0, COLS)
        keys = (shared * S + key)[:, None] * D + channel
        seen = (key < S)[:, None] & (channel < D)
        k = tl.load(k_ptr + keys, mask=seen, other=0.0)
        v = tl.load(v_ptr + keys, mask=seen, other=0.0)
        if WIDE:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        visible = (key < S)[None, :] & (n < T * G)
        if CAUSAL:
            visible = visible & (key[None, :] <= S - T + t)
        s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1)[:, None])
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp(m - base)
        p = tl.exp(s - base)
        l = alpha * l + tl.sum(p, axis=1)[:, None]
        o = alpha * o + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = m_new
    o = o / tl.where(l == 0.0, 1.0, l)  # 0 where no key was seen
    tl.store(o_ptr + place, o.to(o_ptr.dtype.element_ty), mask=there)


@triton.jit
def one_dot(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr):
    """c = a b, in one program: to see what one line becomes."""
    m = tl.arange(0, M)[:, None]
    n = tl.arange(0, N)[None, :]
    k = tl.arange(0, DEPTH)
    a = tl.load(a_ptr + m * DEPTH + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n)
    c = tl.dot(a, b)
    tl.store(c_ptr + m * N + n, c)


@triton.jit
def dots_by_descriptor(
    a_ptr, b_ptr, c_ptr, d, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr
):
    """c = a b in steps of DEPTH; a copy engine is told the tensors' shapes."""
    a_shape = tl.make_tensor_descriptor(a_ptr, [M, d], [d, 1], [M, DEPTH])
    b_shape = tl.make_tensor_descriptor(b_ptr, [d, N], [N, 1], [DEPTH, N])
    c = tl.zeros((M, N), tl.float32)
    for k in range(0, d, DEPTH):
        a = a_shape.load([0, k])
        b = b_shape.load([k, 0])
        c = tl.dot(a, b, c)
    m = tl.arange(0, M)[:, None]
    n = tl.arange(0, N)[None, :]
    tl.store(c_ptr + m * N + n, c)
