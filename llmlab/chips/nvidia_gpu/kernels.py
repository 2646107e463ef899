"""Kernels of CUDA, in Python: numba compiles them for a GPU, or simulates them.

Plain functions: `simulator.record(kernel, grid, block, …)` runs one without a GPU, and
`cuda.jit(kernel)[grid, block](…)` makes it a program of a GPU. Which of the two `cuda`
is was settled when it was first imported. Where a size must be known to the compiler, a
function makes the kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
from numba import cuda

TILE = 32
ROWS = 8  # of threads that carry a tile of 32 × 32


def vector_add(a, b, c):
    """c = a + b, one number per thread."""
    i = cuda.grid(1)
    if i < c.shape[0]:
        c[i] = a[i] + b[i]


def strided_copy(x, y, stride, offset):
    """y[i] = x[i] at every stride-th place, from offset on (Best Practices, 10.2.1)."""
    i = cuda.grid(1) * stride + offset
    if i < x.shape[0]:
        y[i] = x[i]


def transpose_naive(x, y):
    """y = xᵀ. Lanes read along a row of x, so they write down a column of y."""
    col, row = cuda.grid(2)
    if row < x.shape[0] and col < x.shape[1]:
        y[col, row] = x[row, col]


def transpose_tiled(pad: int = 0, swizzled: bool = False) -> Callable:
    """y = xᵀ by tiles in shared memory: rows are read, and rows are written.

    A column of a tile lies in one bank. Either a tile has `pad` more columns, or column
    c of row r lies at c ⊕ r.
    """
    columns = TILE + pad

    def transpose(x, y):
        tile = cuda.shared.array((TILE, columns), numba.float32)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        row0, col0 = cuda.blockIdx.y * TILE, cuda.blockIdx.x * TILE
        for r in range(ty, TILE, ROWS):
            if row0 + r < x.shape[0] and col0 + tx < x.shape[1]:
                tile[r, tx ^ r if swizzled else tx] = x[row0 + r, col0 + tx]
        cuda.syncthreads()
        for r in range(ty, TILE, ROWS):
            if col0 + r < x.shape[1] and row0 + tx < x.shape[0]:
                y[col0 + r, row0 + tx] = tile[tx, r ^ tx if swizzled else r]

    return transpose


def block_sum(threads: int, interleaved: bool = False) -> Callable:
    """out[b] = the sum of block b's numbers, by halves, in shared memory.

    Either neighbours are added first (interleaved: active lanes lie ever further
    apart), or the two halves of what is left.
    """

    def total(x, out):
        part = cuda.shared.array(threads, numba.float32)
        t = cuda.threadIdx.x
        i = cuda.grid(1)
        part[t] = x[i] if i < x.shape[0] else numba.float32(0)
        cuda.syncthreads()
        step = 1 if interleaved else threads // 2
        while 0 < step < threads:
            place = 2 * step * t if interleaved else t
            if place + step < (threads if interleaved else 2 * step):
                part[place] += part[place + step]
            cuda.syncthreads()
            step = step * 2 if interleaved else step // 2
        if t == 0:
            out[cuda.blockIdx.x] = part[0]

    return total


def matmul_tiled(tile: int) -> Callable:
    """c = a b by square tiles; sizes need not be multiples of `tile`."""

    def matmul(a, b, c):
        a_tile = cuda.shared.array((tile, tile), numba.float32)
        b_tile = cuda.shared.array((tile, tile), numba.float32)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        col, row = cuda.grid(2)
        M, K = a.shape
        N = b.shape[1]
        acc = numba.float32(0)
        for k0 in range(0, K, tile):
            a_tile[ty, tx] = 0
            b_tile[ty, tx] = 0
            if row < M and k0 + tx < K:
                a_tile[ty, tx] = a[row, k0 + tx]
            if k0 + ty < K and col < N:
                b_tile[ty, tx] = b[k0 + ty, col]
            cuda.syncthreads()
            for k in range(tile):
                acc += a_tile[ty, k] * b_tile[k, tx]
            cuda.syncthreads()
        if row < M and col < N:
            c[row, col] = acc

    return matmul


def gram_direct(a, c):
    """c = a aᵀ, a with 32 columns; the second factor by columns (10.2.3.3)."""
    col, row = cuda.grid(2)
    acc = numba.float32(0)
    for i in range(TILE):
        acc += a[row, i] * a[col, i]
    c[row, col] = acc


def gram_tiled(pad: int = 0) -> Callable:
    """The same through shared memory; the second tile is stored by columns."""
    columns = TILE + pad

    def gram(a, c):
        a_tile = cuda.shared.array((TILE, TILE), numba.float32)
        turned = cuda.shared.array((TILE, columns), numba.float32)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        col, row = cuda.grid(2)
        a_tile[ty, tx] = a[row, tx]
        turned[tx, ty] = a[cuda.blockIdx.x * TILE + ty, tx]
        cuda.syncthreads()
        acc = numba.float32(0)
        for i in range(TILE):
            acc += a_tile[ty, i] * turned[i, tx]
        c[row, col] = acc

    return gram


def scores_by_thread(q, k, out, group):
    """out[h, t] = q[h] · k[t, h // group]: a thread per key, a block row per head."""
    t = cuda.grid(1)
    h = cuda.blockIdx.y
    if t < k.shape[0]:
        acc = numba.float32(0)
        for d in range(k.shape[2]):
            acc += q[h, d] * k[t, h // group, d]
        out[h, t] = acc


def scores_by_warp(lanes: int = 32) -> Callable:
    """The same with a warp per key: its lanes share the width, then add up."""

    def scores(q, k, out, group):
        part = cuda.shared.array(lanes, numba.float32)
        lane = cuda.threadIdx.x
        t, h = cuda.blockIdx.x, cuda.blockIdx.y
        acc = numba.float32(0)
        for d in range(lane, k.shape[2], lanes):
            acc += q[h, d] * k[t, h // group, d]
        part[lane] = acc
        cuda.syncthreads()
        if lane == 0:
            for other in range(1, lanes):
                acc += part[other]
            out[h, t] = acc

    return scores
