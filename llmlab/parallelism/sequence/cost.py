"""What one layer of attention sends, when the sequence is cut, and how long a piece
must be for the wire to keep up.

Bytes that each of p ranks sends for B sequences of T tokens, T a multiple of p, in
numbers (times the bytes of a number):

                  forward                                          backward
    Megatron      4 (p−1)/p · B T d                                6 (p−1)/p · B T d
                  (two gathers more: what is not saved)
    ring          (p−1) · 2 B K D T/p                              the same, and p · 2 B
                  K D T/p for dK, dV in fp32
    Ulysses       (p−1)/p · 2 B (H + K') D T/p                     as forward
                  K' = lcm(K, p)

Megatron's (Korthikanti et al. 2022) are those of the whole layer, its MLP included; the
other two send nothing outside of attention. Ring: Liu et al. 2023; Ulysses: Jacobs et
al. 2023, who write 4 N h / P for H = K and large P.

    H, K  query and key/value heads      D  head_dim      d = H·D  hidden size
"""

from __future__ import annotations

import math
from dataclasses import dataclass

METHODS = ("megatron", "ring", "ulysses")


@dataclass(frozen=True)
class AttentionShape:
    """B sequences of T tokens, H query and K key/value heads of D channels."""

    B: int
    T: int
    H: int
    K: int
    D: int


def sent(
    method: str,
    p: int,
    shape: AttentionShape,
    *,
    backward: bool = False,
    itemsize: int = 2,
) -> float:
    """Bytes that a rank sends in one layer, in the forward pass or in the backward
    pass.

    Raises:
        ValueError: an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}")
    # numbers in one rank's keys and values
    kv = 2 * shape.B * shape.K * shape.D * shape.T / p
    others = (p - 1) / p
    match method:
        case "megatron":
            return (
                (6 if backward else 4)
                * others
                * shape.B
                * shape.T
                * shape.H
                * shape.D
                * itemsize
            )
        case "ring":
            return (p - 1) * kv * itemsize + (p * kv * 4 if backward and p > 1 else 0)
    heads = shape.H + math.lcm(shape.K, p)
    return others * 2 * shape.B * heads * shape.D * shape.T / p * itemsize


def smallest_block(flops: float, bandwidth: float) -> float:
    """Tokens a rank needs so that a hop hides behind the piece that is computed
    meanwhile: c ≥ F/B (Liu et al., section 3).

    A piece of c queries and c keys costs 4dc² FLOPs, a hop 4dc bytes in 16 bits: 4dc²/F
    ≥ 4dc/B.

    Args:
        flops: F, of one rank, a second. bandwidth: B, one way, in bytes a second.
    """
    return flops / bandwidth
