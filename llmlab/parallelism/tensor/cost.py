"""What an MLP of two matrices costs each rank, in 1, 2, 2.5 and 3 dimensions: bytes
sent and numbers held.

    X: M × d   →   H = X A: M × f   →   Z = H B: M × d          M = batch · tokens,   p
                                        ranks,   forward and backward

    1-D    p          g forward and f backward, each an all-reduce of M·d              4
                      (p−1)/p · Md
    2-D    q²         SUMMA: three products a matrix, two operands moved in each       3
                      (q−1)/q² · (Md + Mf + 2df)
    2.5-D  d'·q²      the same on 1/d' of the rows, and W's gradient over d' layers    3
                      (q−1)/q² · ((Md + Mf)/d' + 2df)
                                                                                       +
                                                                                       2
                                                                                       (d'−1)/d'
                                                                                       ·
                                                                                       2df/q²
    3-D    q³         X, W gathered and Y scattered, forward and backward              2
                      (q−1)/q³ · 2(Md + Mf + df)

The formulas are exact for the ring algorithm, and
`tests/parallelism/tensor/test_tensor_cost.py` holds `World`'s ledger to them. Sources:
Shoeybi et al. 2019 (1-D), Xu et al. 2021 (2-D), Wang et al. 2021 (2.5-D), Bian et al.
2021 (3-D).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

METHODS = ("1-D", "2-D", "2.5-D", "3-D")


@dataclass(frozen=True)
class MLPShape:
    """M tokens of d features, through f channels."""

    M: int
    d: int
    f: int


@dataclass(frozen=True)
class Cost:
    """What one rank sends in a forward and a backward pass, and holds between them, in
    bytes.
    """

    sent: float
    parameters: float
    activations: float


def mesh_for(method: str, p: int, depth: int = 2) -> tuple[int, ...] | None:
    """The mesh of p ranks that a method needs, or None where p does not allow it."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}")
    square, cube = isqrt(p), round(p ** (1 / 3))
    layer = isqrt(p // depth)
    match method:
        case "1-D":
            return (p,)
        case "2-D":
            return (square, square) if square**2 == p else None
        case "2.5-D":
            return (depth, layer, layer) if depth * layer**2 == p else None
    return (cube,) * 3 if cube**3 == p else None


def mlp_cost(
    method: str, p: int, shape: MLPShape, *, depth: int = 2, itemsize: int = 4
) -> Cost:
    """Bytes sent and held by each of p ranks.

    Args:
        depth: layers of the 2.5-D mesh.
        itemsize: bytes a number.
    Raises:
        ValueError: p ranks do not form the mesh that the method needs.
    """
    mesh = mesh_for(method, p, depth)
    if mesh is None:
        raise ValueError(
            f"p={p} ranks do not form the mesh of {method}"
            + (f" with depth={depth}" if method == "2.5-D" else "")
        )
    Md, Mf, W, q = shape.M * shape.d, shape.M * shape.f, 2 * shape.d * shape.f, mesh[-1]
    match method:
        case "1-D":
            sent, parameters, activations = 4 * (p - 1) / p * Md, W / p, Md + Mf / p
        case "2-D":
            sent, parameters, activations = (
                3 * (q - 1) / q**2 * (Md + Mf + W),
                W / p,
                (Md + Mf) / p,
            )
        case "2.5-D":
            moved = 3 * (q - 1) / q**2 * ((Md + Mf) / depth + W)
            sent, parameters, activations = (
                moved + 2 * (depth - 1) / depth * W / q**2,
                W / q**2,
                (Md + Mf) / p,
            )
        case _:
            sent, parameters, activations = (
                2 * (q - 1) / q**3 * (2 * Md + 2 * Mf + W),
                W / p,
                (Md + Mf) / p,
            )
    return Cost(sent * itemsize, parameters * itemsize, activations * itemsize)


def crossover(
    shape: MLPShape, method: str = "2-D", against: str = "1-D", limit: int = 1 << 16
) -> int | None:
    """The smallest p at which `method` sends fewer bytes a rank than `against`; None:
    not up to `limit`.
    """
    for p in range(2, limit + 1):
        if (
            mesh_for(method, p)
            and mesh_for(against, p)
            and mlp_cost(method, p, shape).sent < mlp_cost(against, p, shape).sent
        ):
            return p
    return None


def llama_sent(
    p: int,
    tokens: int,
    hidden_size: int,
    layers: int,
    *,
    itemsize: int = 2,
    backward: bool = True,
) -> float:
    """Bytes that a rank sends for the blocks of a Llama under 1-D: 2 all-reduces of
    tokens · d a block forward, 2 backward.
    """
    return (
        layers
        * (4 if backward else 2)
        * 2
        * (p - 1)
        / p
        * tokens
        * hidden_size
        * itemsize
    )
