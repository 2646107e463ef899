"""What a collective costs: bytes that each rank sends, and seconds in the α-β model.

Thakur, Rabenseifner & Gropp 2005 ("Optimization of Collective Communication Operations
in MPICH") give the algorithms.

    time = steps · α + volume / β

    p  ranks in the group
    n  bytes of the whole tensor (for a gather: of the result)
    α  seconds per message
    β  bytes per second

Four algorithms, whose messages are written out in the room `collectives`:

    ring     the bandwidth-optimal one of NCCL and gloo: each rank talks to its
             neighbour only
    tree     binomial tree: ⌈log₂ p⌉ steps, but every step carries all n bytes
             (broadcast, reduce, all-reduce)
    halving  recursive halving and doubling: the ring's bytes in about the tree's steps
             (all-reduce; all-gather and reduce-scatter by Bruck's algorithm, which
             takes any p)
    naive    what one would write first: a star through one rank, everybody to everybody

An operation for which an algorithm has no way of its own is counted as the ring's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALGORITHMS = ("ring", "tree", "halving", "naive")


@dataclass(frozen=True)
class Link:
    """A wire: `latency` α in seconds per message, `bandwidth` β in bytes per second.

    The bandwidth is that of one direction.
    """

    latency: float = 5e-6
    bandwidth: float = 100e9

    def __post_init__(self) -> None:
        if self.latency < 0 or self.bandwidth <= 0:
            raise ValueError(
                f"latency={self.latency} must be ≥ 0 and bandwidth={self.bandwidth} > 0"
            )


def chunks(n: int, p: int) -> list[int]:
    """n items cut into p pieces as even as can be: the first n mod p are one longer."""
    return [n // p + (r < n % p) for r in range(p)]


def _log2(p: int) -> int:
    return (p - 1).bit_length()  # ⌈log₂ p⌉


def _children(rank: int, root: int, p: int) -> int:
    """Messages that a rank forwards in a binomial tree: to place v + 2^k for each 2^k
    above v's top bit, below p.
    """
    v = (rank - root) % p
    first = v.bit_length()
    return sum(v + (1 << k) < p for k in range(first, _log2(p)))


def _below(rank: int, root: int, sizes: Sequence[int]) -> int:
    """Bytes that pass through a rank of a binomial scatter or gather: its own, and
    those of the places that it serves.
    """
    p = len(sizes)
    v = (rank - root) % p
    served = (v & -v) if v else p  # the largest power of two that divides v
    return sum(sizes[(root + w) % p] for w in range(v, min(v + served, p)))


def _halving_all_reduce(rank: int, sizes: Sequence[int]) -> int:
    """Bytes that a rank sends.

    Exact for a power of two, else to within an element a step (n is cut anew, in q
    pieces).
    """
    p, n = len(sizes), sum(sizes)
    q = 1 << (p.bit_length() - 1)
    if rank >= q:
        return n
    mine = sizes if p == q else chunks(n, q)
    kept = [
        sum(s for c, s in enumerate(mine) if (c - rank) % 2**k == 0)
        for k in range(1, q.bit_length())
    ]
    # halving, doubling, and the result for rank + q
    return n - mine[rank] + sum(kept) + (n if rank < p - q else 0)


def _bruck_all_gather(rank: int, sizes: Sequence[int]) -> int:
    p = len(sizes)
    new = [min(1 << k, p - (1 << k)) for k in range(_log2(p))]
    return sum(sizes[(rank + i) % p] for count in new for i in range(count))


def sent(
    op: str, rank: int, sizes: Sequence[int], root: int = 0, algorithm: str = "ring"
) -> int:
    """Bytes that `rank` sends in one collective.

    Args:
        op: "all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce",
            "gather", "scatter", "all_to_all", "barrier".
        sizes: p numbers. The bytes of chunk r of the tensor (all_reduce and kin: as the
            algorithm cuts it; all_gather: what rank r brings; reduce_scatter: what rank
            r gets; all_to_all: what this rank sends to rank r).
        root: of broadcast, reduce, gather, scatter.
        algorithm: "ring", "tree", "halving" or "naive".
    Raises:
        ValueError: an unknown op or algorithm.
    """
    p, n = len(sizes), sum(sizes)
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"algorithm={algorithm!r} must be one of {', '.join(ALGORITHMS)}"
        )
    last = (rank - root) % p == p - 1  # the end of the chain that starts at root
    ring = {
        "broadcast": 0 if last else n,  # a pipelined chain root → root+1 → …
        "reduce": 0 if rank == root else n,  # the chain the other way
        "reduce_scatter": n - sizes[rank],  # every chunk but the one it ends up with
        # every chunk but its right neighbour's own
        "all_gather": n - sizes[(rank + 1) % p],
        # reduce-scatter, then all-gather
        "all_reduce": 2 * n - sizes[(rank + 1) % p] - sizes[(rank + 2) % p],
        "all_to_all": n - sizes[rank],
        "gather": 0 if rank == root else sizes[rank],
        "scatter": n - sizes[root] if rank == root else 0,
        "barrier": 0,
    }
    tree = {
        "broadcast": n * _children(rank, root, p),
        "reduce": 0 if rank == root else n,
        "all_reduce": n * _children(rank, 0, p) + (0 if rank == 0 else n),
        "gather": 0 if rank == root else _below(rank, root, sizes),
        "scatter": _below(rank, root, sizes) - sizes[rank],
    }
    halving = {
        "all_reduce": _halving_all_reduce(rank, sizes),
        "all_gather": _bruck_all_gather(rank, sizes),
    }
    star = n * (p - 1) if rank == 0 else n
    naive = {
        "broadcast": n * (p - 1) if rank == root else 0,
        "all_reduce": star,
        "reduce_scatter": n - sizes[0] if rank == 0 else n,
        "all_gather": sizes[rank] * (p - 1),
    }
    if op not in ring:
        raise ValueError(f"op={op!r} must be one of {', '.join(ring)}")
    if p == 1:
        return 0
    return {"ring": {}, "tree": tree, "halving": halving, "naive": naive}[
        algorithm
    ].get(op, ring[op])


def steps_and_volume(
    op: str, p: int, n: int | float, algorithm: str = "ring"
) -> tuple[int, int | float]:
    """Steps of latency and bytes of bandwidth on the critical path of a collective over
    n bytes and p ranks.
    """
    if p == 1:
        return 0, 0.0
    part, L = n * (p - 1) / p, _log2(p)
    ring = {
        # pipelined in small pieces, so that the chain is filled once
        "broadcast": (p - 1, n),
        "reduce": (p - 1, n),
        "reduce_scatter": (p - 1, part),
        "all_gather": (p - 1, part),
        "all_reduce": (2 * (p - 1), 2 * part),
        "all_to_all": (p - 1, part),
        "gather": (p - 1, part),
        "scatter": (p - 1, part),
        "barrier": (L, 0.0),
    }
    tree = {
        "broadcast": (L, L * n),
        "reduce": (L, L * n),
        "all_reduce": (2 * L, 2 * L * n),
        "gather": (L, part),
        "scatter": (L, part),
    }
    q = 1 << (p.bit_length() - 1)
    # ranks beyond a power of two hand in their tensor first, and get the result last
    folds = 2 * (p != q)
    halving = {
        "all_reduce": (2 * _log2(q) + folds, 2 * n * (q - 1) / q + folds * n),
        "reduce_scatter": (L, part),
        "all_gather": (L, part),
    }
    naive = {
        "broadcast": (p - 1, (p - 1) * n),
        "reduce": (p - 1, (p - 1) * n),
        "all_reduce": (2 * (p - 1), 2 * (p - 1) * n),
        "reduce_scatter": (2 * (p - 1), (p - 1) * n + part),
    }
    return {"ring": {}, "tree": tree, "halving": halving, "naive": naive}[
        algorithm
    ].get(op, ring[op])


def seconds(
    op: str, p: int, n: int | float, link: Link, algorithm: str = "ring"
) -> float:
    """steps · α + volume / β for one collective over n bytes and p ranks."""
    steps, volume = steps_and_volume(op, p, n, algorithm)
    return steps * link.latency + volume / link.bandwidth
