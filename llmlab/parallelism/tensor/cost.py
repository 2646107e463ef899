"""What an MLP of two matrices costs each rank in 1, 2, 2.5 and 3 dimensions.

    X: M × d   →   H = X A: M × f   →   Z = H B: M × d

Numbers that a rank sends, forward and backward (times the bytes of a number):

    1-D     p ranks       g forward and f backward, each an all-reduce of M·d:
                          4 (p−1)/p · Md
    2-D     q² ranks      SUMMA: three products per matrix, each moves two operands:
                          3 (q−1)/q² · (Md + Mf + 2df)
    2.5-D   d'·q² ranks   the same on 1/d' of the rows, and W's gradient over d' layers:
                          3 (q−1)/q² · ((Md + Mf)/d' + 2df)  +  2 (d'−1)/d' · 2df/q²
    3-D     q³ ranks      X and W gathered and Y scattered, forward and backward:
                          2 (q−1)/q³ · 2(Md + Mf + df)

The formulas are exact for the ring algorithm, and
`tests/parallelism/tensor/test_tensor_cost.py` compares them with `World`'s ledger.
Sources: Shoeybi et al. 2019 (1-D), Xu et al. 2021 (2-D), Wang et al. 2021 (2.5-D), Bian
et al. 2021 (3-D).

    M    batch · tokens
    d    hidden size
    f    channels of the MLP
    W    2df, the numbers in both weights
    p    ranks
    q    side of the grid or of the cube
    d'   `depth`, layers of the 2.5-D mesh
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
    """Bytes that one rank sends in a forward and a backward pass, and holds between."""

    sent: float
    parameters: float
    activations: float


def mesh_for(method: str, p: int, depth: int = 2) -> tuple[int, ...] | None:
    """The mesh of p ranks that a method needs, or None where p does not allow it."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}")
    match method:
        case "1-D":
            return (p,)
        case "2-D":
            q = isqrt(p)
            return (q, q) if q**2 == p else None
        case "2.5-D":
            q = isqrt(p // depth)
            return (depth, q, q) if depth * q**2 == p else None
    q = round(p ** (1 / 3))
    return (q, q, q) if q**3 == p else None


def mlp_cost(
    method: str, p: int, shape: MLPShape, *, depth: int = 2, itemsize: int = 4
) -> Cost:
    """Bytes sent and held by each of p ranks.

    Args:
        depth: layers of the 2.5-D mesh.
        itemsize: bytes per number.
    Raises:
        ValueError: p ranks do not form the mesh that the method needs.
    """
    mesh = mesh_for(method, p, depth)
    if mesh is None:
        with_depth = f" with depth={depth}" if method == "2.5-D" else ""
        raise ValueError(f"p={p} ranks do not form the mesh of {method}{with_depth}")
    Md = shape.M * shape.d
    Mf = shape.M * shape.f
    W = 2 * shape.d * shape.f
    q = mesh[-1]
    # 1/p of everything, with two exceptions below
    parameters = W / p
    activations = (Md + Mf) / p
    match method:
        case "1-D":
            sent = 4 * (p - 1) / p * Md
            activations = Md + Mf / p  # X is whole on every rank
        case "2-D":
            sent = 3 * (q - 1) / q**2 * (Md + Mf + W)
        case "2.5-D":
            in_layer = 3 * (q - 1) / q**2 * ((Md + Mf) / depth + W)
            between_layers = 2 * (depth - 1) / depth * W / q**2
            sent = in_layer + between_layers
            parameters = W / q**2  # the same on all layers
        case _:
            sent = 2 * (q - 1) / q**3 * (2 * Md + 2 * Mf + W)
    return Cost(sent * itemsize, parameters * itemsize, activations * itemsize)


def crossover(
    shape: MLPShape, method: str = "2-D", against: str = "1-D", limit: int = 1 << 16
) -> int | None:
    """The smallest p at which a rank sends fewer bytes by `method` than by `against`.

    None if there is no such p up to `limit`.
    """
    for p in range(2, limit + 1):
        both_possible = mesh_for(method, p) and mesh_for(against, p)
        if not both_possible:
            continue
        if mlp_cost(method, p, shape).sent < mlp_cost(against, p, shape).sent:
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
    """Bytes that a rank sends for the blocks of a Llama under 1-D tensor parallelism.

    A block has 2 all-reduces of tokens · hidden_size numbers forward, and 2 backward.

    Args:
        itemsize: bytes per number.
        backward: whether the backward pass counts, too.
    """
    all_reduces = layers * (4 if backward else 2)
    # a ring all-reduce sends 2 (p−1)/p of the tensor
    return all_reduces * 2 * (p - 1) / p * tokens * hidden_size * itemsize
