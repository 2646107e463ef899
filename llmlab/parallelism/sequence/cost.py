"""What a layer sends when the sequence is cut, and how long a piece must be.

Numbers that each of p ranks sends for B sequences of T tokens, T a multiple of p (times
the bytes of a number):

    Megatron   forward    4 (p−1)/p · B T d
               backward   6 (p−1)/p · B T d: two gathers more, of what is not saved
    ring       forward    (p−1) · 2 B K D T/p
               backward   the same, and p · 2 B K D T/p for dK and dV, in fp32
    Ulysses    forward    (p−1)/p · 2 B (H + K') D T/p,   K' = lcm(K, p)
               backward   the same

Megatron's (Korthikanti et al. 2022) are those of the whole layer with its MLP. The
other two send nothing outside of attention. Ring: Liu et al. 2023; Ulysses: Jacobs et
al. 2023, who write 4 N h / P for H = K and large P.

    B  batch
    T  tokens
    H  query heads
    K  key/value heads
    D  head_dim
    d  H·D, hidden size
    p  ranks
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
    """Bytes that a rank sends in one layer, forward or backward.

    Args:
        backward: the backward pass instead of the forward pass.
        itemsize: bytes per number.
    Raises:
        ValueError: an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}")
    # the share of a tensor that leaves a rank
    others = (p - 1) / p
    match method:
        case "megatron":
            collectives = 6 if backward else 4
            return (
                collectives * others * shape.B * shape.T * shape.H * shape.D * itemsize
            )
        case "ring":
            # numbers in one rank's keys and values
            kv = 2 * shape.B * shape.K * shape.D * shape.T / p
            key_hops = (p - 1) * kv * itemsize
            if not backward or p == 1:
                return key_hops
            fp32_bytes = 4
            return key_hops + p * kv * fp32_bytes
    heads = shape.H + math.lcm(shape.K, p)
    return others * 2 * shape.B * heads * shape.D * shape.T / p * itemsize


def smallest_block(flops: float, bandwidth: float) -> float:
    """Tokens c that a rank needs so that a hop takes no longer than a piece: c ≥ F/B.

    A piece of c queries and c keys costs 4dc² FLOPs; a hop sends 4dc bytes in 16 bits.
    So 4dc²/F ≥ 4dc/B (Liu et al., section 3).

    Args:
        flops: F, FLOPs per second of one rank.
        bandwidth: B, bytes per second, one way.
    """
    return flops / bandwidth
