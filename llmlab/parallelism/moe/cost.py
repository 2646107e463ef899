"""What a mixture of experts sends and holds: formulas beside `expert_parallel` and
`hierarchical`.

    T  tokens of a rank     k  experts a token     E  experts     d  hidden size     f
                                                      width of an expert     p  ranks
                                                      N  nodes

Dispatch, or combine, of one layer, in numbers a rank:

    uneven             (p−1)/p · T k d          when the router spreads evenly
    padded             (p−1)/p · E C d          always; E·C ≈ factor · T k
    over the slow wire, flat                (N−1)/N · T k d
    over the slow wire, a token once a node     (E[nodes of a token that are not its
                                                own]) · T d

A token chooses k different experts at random: a given one of N nodes has none of them
with probability C(E − E/N, k) / C(E, k).
"""

from __future__ import annotations

import math


def distinct_nodes(E: int, k: int, nodes: int) -> float:
    """How many of the nodes a token goes to, on average, if it chooses k of E experts
    evenly.

    Raises:
        ValueError: E is not a multiple of the nodes.
    """
    if E % nodes:
        raise ValueError(f"E={E} experts must be a multiple of nodes={nodes}")
    return nodes * (1 - math.comb(E - E // nodes, k) / math.comb(E, k))


def dispatch_bytes(T: int, k: int, d: int, p: int, itemsize: int = 2) -> float:
    """Bytes that a rank sends in one dispatch (or combine) when all p ranks get the
    same.
    """
    return (p - 1) / p * T * k * d * itemsize


def padded_bytes(E: int, C: int, d: int, p: int, itemsize: int = 2) -> float:
    """Bytes that a rank sends in one dispatch (or combine) of C rows for each
    expert.
    """
    return (p - 1) / p * E * C * d * itemsize


def expert_parameters(layers: int, E: int, d: int, f: int, matrices: int = 3) -> int:
    """Parameters of all experts: `matrices` of d × f each, 3 with a gate and 2
    without.
    """
    return layers * E * matrices * d * f
