"""What attention reads from and writes to the large memory (HBM), in elements.

The three ways are written as a chip runs them: a loop may compute only with what it has
loaded, and what it wants to keep it must store. `HBM` counts both. Each way also has a
closed form, and the two must agree to the last element. One head, N tokens, head_dim d,
every query sees every key. T_c = ⌈N / cols⌉, T_r = ⌈N / rows⌉:

    standard, forward     4 N² + 4 N d                   Dao et al. 2022, algorithm 0
    standard, backward    7 N² + 8 N d                                    algorithm 3
    flash-1, forward      3 N d + 2 N + T_c (3 N d + 4 N)                 algorithm 1
    flash-1, backward     7 N d + T_c (5 N d + 2 N)                       algorithm 4
    flash-2, forward      2 N d + N + T_r · 2 N d              Dao 2023, algorithm 1
    flash-2, backward     7 N d + N + T_c (4 N d + 2 N)                  algorithm 2

With M elements of fast memory, cols = M / 4d, so T_c N d = 4 N² d² / M: the Θ(N²d²/M)
of the paper's theorem 2. Flash-1 keeps keys and sends queries, outputs, m and l past
them; flash-2 keeps queries and sends keys past them, and reads and writes no m and l.

Simplified: caches between the two memories are left out. On a GPU many blocks read the
same keys at about the same time, and the L2 cache serves most of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import ceil

import torch
from jaxtyping import Float
from torch import Tensor

from llmlab.inference.flash_attention.online_softmax import (
    finish,
    online_softmax,
    start,
)

Matrix = Float[Tensor, "N d"]


class HBM:
    """Counts the elements that go to and fro, by the name of the tensor.

    >>> hbm = HBM()
    >>> tile = hbm.load("K", torch.zeros(4, 2))
    >>> hbm.elements
    8
    """

    def __init__(self) -> None:
        self.loaded: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()

    def load(self, name: str, x: Tensor) -> Tensor:
        """A copy of x on the chip."""
        self.loaded[name] += x.numel()
        return x.clone()

    def store(self, name: str, x: Tensor, place: Tensor) -> None:
        """x from the chip to its place."""
        self.stored[name] += x.numel()
        place.copy_(x)

    def kept(self, name: str, x: Tensor) -> Tensor:
        """A new tensor in the large memory, with what x holds."""
        place = torch.empty_like(x)
        self.store(name, x, place)
        return place

    @property
    def elements(self) -> int:
        """All that was loaded and stored."""
        return self.loaded.total() + self.stored.total()


def blocks(N: int, size: int) -> list[slice]:
    """0 … N − 1 in blocks."""
    return [slice(i, min(i + size, N)) for i in range(0, N, size)]


# Standard -----------------------------------------------------------------------------


def standard(
    q: Matrix, k: Matrix, v: Matrix, hbm: HBM
) -> tuple[Matrix, Float[Tensor, "N N"]]:
    """O and P: three kernels, with S and P in the large memory."""
    scale = q.shape[-1] ** -0.5
    S = hbm.kept("S", hbm.load("Q", q) @ hbm.load("K", k).T * scale)
    P = hbm.kept("P", hbm.load("S", S).softmax(-1))
    return hbm.kept("O", hbm.load("P", P) @ hbm.load("V", v)), P


def standard_backward(
    q: Matrix, k: Matrix, v: Matrix, P: Tensor, do: Matrix, hbm: HBM
) -> tuple[Matrix, Matrix, Matrix]:
    """dQ, dK, dV: five kernels."""
    scale = q.shape[-1] ** -0.5
    dv = hbm.kept("dV", hbm.load("P", P).T @ hbm.load("dO", do))
    dP = hbm.kept("dP", hbm.load("dO", do) @ hbm.load("V", v).T)
    P_here = hbm.load("P", P)
    dP_here = hbm.load("dP", dP)
    inner = (P_here * dP_here).sum(-1, keepdim=True)
    dS = hbm.kept("dS", P_here * (dP_here - inner))
    dq = hbm.kept("dQ", hbm.load("dS", dS) @ hbm.load("K", k) * scale)
    dk = hbm.kept("dK", hbm.load("dS", dS).T @ hbm.load("Q", q) * scale)
    return dq, dk, dv


# FlashAttention -----------------------------------------------------------------------


def flash_1(
    q: Matrix, k: Matrix, v: Matrix, rows: int, cols: int, hbm: HBM
) -> tuple[Matrix, Float[Tensor, "N"]]:
    """O and L, keys outside: O, m and l go to and fro in every round.

    O is stored without its division by l, which the paper's loop does and undoes.
    """
    N = len(q)
    state = start(q.shape, q)
    m, l, O = (hbm.kept(name, x) for name, x in zip("mlO", state, strict=True))
    for j in blocks(N, cols):
        K = hbm.load("K", k[j])
        V = hbm.load("V", v[j])
        for i in blocks(N, rows):
            S = hbm.load("Q", q[i]) @ K.T * q.shape[-1] ** -0.5
            state = [hbm.load(n, x[i]) for n, x in zip("mlO", (m, l, O), strict=True)]
            new = online_softmax(*state, S, V)
            for name, x, place in zip("mlO", new, (m, l, O), strict=True):
                hbm.store(name, x, place[i])
    return finish(m, l, O)  # in the last round, before O is stored


def flash_2(
    q: Matrix, k: Matrix, v: Matrix, rows: int, cols: int, hbm: HBM
) -> tuple[Matrix, Float[Tensor, "N"]]:
    """O and L, queries outside: m, l and O stay on the chip."""
    out = torch.empty_like(q)
    lse = torch.empty_like(q[:, 0])
    for i in blocks(len(q), rows):
        Q = hbm.load("Q", q[i])
        state = start(Q.shape, Q)
        for j in blocks(len(q), cols):
            S = Q @ hbm.load("K", k[j]).T * q.shape[-1] ** -0.5
            state = online_softmax(*state, S, hbm.load("V", v[j]))
        O, L = finish(*state)
        hbm.store("O", O, out[i])
        hbm.store("L", L, lse[i])
    return out, lse


def _backward(
    version: int,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    out: Matrix,
    lse: Tensor,
    do: Matrix,
    rows: int,
    cols: int,
    hbm: HBM,
) -> tuple[Matrix, Matrix, Matrix]:
    """dQ, dK, dV, keys outside. Version 1 loads O, l and m; 2 has D beforehand."""
    N = len(q)
    scale = q.shape[-1] ** -0.5
    dq = hbm.kept("dQ", torch.zeros_like(q))
    if version == 1:
        dk = hbm.kept("dK", torch.zeros_like(k))
        dv = hbm.kept("dV", torch.zeros_like(v))
        one = torch.ones_like(lse)  # m = L and l = 1 are one way to keep L
    else:
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        products = hbm.load("dO", do) * hbm.load("O", out)
        delta = hbm.kept("D", products.sum(-1))
    for j in blocks(N, cols):
        K = hbm.load("K", k[j])
        V = hbm.load("V", v[j])
        dK, dV = torch.zeros_like(K), torch.zeros_like(V)
        for i in blocks(N, rows):
            Q = hbm.load("Q", q[i])
            dO = hbm.load("dO", do[i])
            if version == 1:
                L = hbm.load("m", lse[i]) + hbm.load("l", one[i]).log()
                D = (dO * hbm.load("O", out[i])).sum(-1)
            else:
                L = hbm.load("L", lse[i])
                D = hbm.load("D", delta[i])
            P = (Q @ K.T * scale - L[:, None]).exp()
            dS = P * (dO @ V.T - D[:, None])
            dV += P.T @ dO
            dK += dS.T @ Q * scale
            hbm.store("dQ", hbm.load("dQ", dq[i]) + dS @ K * scale, dq[i])
        hbm.store("dK", dK, dk[j])
        hbm.store("dV", dV, dv[j])
    return dq, dk, dv


def flash_1_backward(q, k, v, out, lse, do, rows: int, cols: int, hbm: HBM):
    """dQ, dK, dV; D is computed in every tile, from O and dO."""
    return _backward(1, q, k, v, out, lse, do, rows, cols, hbm)


def flash_2_backward(q, k, v, out, lse, do, rows: int, cols: int, hbm: HBM):
    """dQ, dK, dV; D is computed once and loaded in place of O."""
    return _backward(2, q, k, v, out, lse, do, rows, cols, hbm)


# Closed forms -------------------------------------------------------------------------

FORMS: dict[str, Callable[[int, int, int, int], int]] = {
    "standard": lambda N, d, T_r, T_c: 4 * N * N + 4 * N * d,
    "standard backward": lambda N, d, T_r, T_c: 7 * N * N + 8 * N * d,
    "flash-1": lambda N, d, T_r, T_c: 3 * N * d + 2 * N + T_c * (3 * N * d + 4 * N),
    "flash-1 backward": lambda N, d, T_r, T_c: 7 * N * d + T_c * (5 * N * d + 2 * N),
    "flash-2": lambda N, d, T_r, T_c: 2 * N * d + N + T_r * 2 * N * d,
    "flash-2 backward": lambda N, d, T_r, T_c: (
        7 * N * d + N + T_c * (4 * N * d + 2 * N)
    ),
}


def elements(way: str, N: int, d: int, rows: int = 1, cols: int = 1) -> int:
    """Elements loaded and stored for one head, by the closed form.

    >>> elements("standard", 1024, 64)
    4456448

    Raises:
        ValueError: an unknown way, or a size below 1.
    """
    if way not in FORMS:
        raise ValueError(f"way={way!r} must be one of {', '.join(FORMS)}")
    for name, value in (("N", N), ("d", d), ("rows", rows), ("cols", cols)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    return FORMS[way](N, d, ceil(N / rows), ceil(N / cols))


def paper_tiles(M: int, d: int) -> tuple[int, int]:
    """rows and cols that algorithm 1 takes for M elements of fast memory."""
    cols = ceil(M / (4 * d))
    return min(cols, d), cols


def matmul_flops(N: int, d: int, flash: bool = False) -> int:
    """Of one head's products, forward and backward: 2 + 4, and Q Kᵀ once more.

    A multiplication and an addition count 2.
    """
    return (7 if flash else 6) * 2 * N * N * d


def chip_bytes(rows: int, cols: int, d: int, size: int = 2) -> int:
    """Fast memory of a flash-2 block: Q, K and V of `size` bytes; S and O in fp32.

    Here all of it counts. Real kernels keep S and O in registers.
    """
    return size * d * (rows + 2 * cols) + 4 * rows * (cols + d)
