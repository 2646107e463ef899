"""What a mixture of experts sends and holds: formulas for the two ways to split it.

Dispatch, or combine, of one layer, in numbers per rank:

    uneven           (p−1)/p · T k d     when the router spreads evenly
    padded           (p−1)/p · E C d     always; E·C ≈ factor · T k

Of these over the slow link between nodes:

    flat             (N−1)/N · T k d
    two levels       M · T d             M: other nodes per token, on average

A token chooses k different experts at random. A given one of N nodes has none of them
with probability C(E − E/N, k) / C(E, k), in binomial coefficients.

    T  tokens of a rank
    k  experts per token
    E  experts
    C  capacity of an expert, for the tokens of one rank
    d  hidden size
    f  inner width of an expert
    p  ranks
    N  nodes
"""

from __future__ import annotations

import math


def distinct_nodes(E: int, k: int, nodes: int) -> float:
    """How many nodes a token goes to, on average, if every expert is equally likely.

    Raises:
        ValueError: E is not a multiple of the nodes.
    """
    if E % nodes:
        raise ValueError(f"E={E} experts must be a multiple of nodes={nodes}")
    avoids_node = math.comb(E - E // nodes, k) / math.comb(E, k)
    return nodes * (1 - avoids_node)


def dispatch_bytes(T: int, k: int, d: int, p: int, itemsize: int = 2) -> float:
    """Bytes that a rank sends in one dispatch, or combine, by an even router."""
    return (p - 1) / p * T * k * d * itemsize


def padded_bytes(E: int, C: int, d: int, p: int, itemsize: int = 2) -> float:
    """Bytes that a rank sends in one dispatch, or combine, of C rows per expert."""
    return (p - 1) / p * E * C * d * itemsize


def expert_parameters(layers: int, E: int, d: int, f: int, matrices: int = 3) -> int:
    """Parameters of all experts, with `matrices` of d × f each: 3 with a gate, or 2."""
    return layers * E * matrices * d * f
