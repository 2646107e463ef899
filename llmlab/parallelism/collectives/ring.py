"""Ring collectives: every rank sends to its right neighbour only, and every wire is
busy in every step.

Patarasuk & Yuan 2009 (https://doi.org/10.1016/j.jpdc.2008.09.002) prove that no
all-reduce sends less than 2 (p−1)/p · n bytes a rank, and that the ring reaches it.
Chunk c of the tensor walks once around the ring to be summed, and once more to be
known:

    reduce-scatter   step s: rank r sends chunk r − s − 1 to r + 1, who adds it        p
                     − 1 steps, (p−1)/p · n bytes
    all-gather       step s: rank r sends chunk r − s to r + 1, who keeps it           p
                     − 1 steps, (p−1)/p · n bytes
    all-reduce       one, then the other             2(p − 1) steps, 2 (p−1)/p · n bytes

    p  ranks, r one of them; all numbers modulo p      n  bytes of the tensor, in p
                                                          chunks      s  step
"""

from __future__ import annotations

from llmlab.parallelism.collectives.schedule import Move, Schedule, then


def reduce_scatter(p: int, shift: int = 0) -> Schedule:
    """Rank r ends with chunk r + shift of the sum."""
    return [
        # who gets it has added s + 2 ranks' chunks
        Move(s, r, (r + 1) % p, ((r - s - 1 + shift) % p,), add=True)
        for s in range(p - 1)
        for r in range(p)
    ]


def all_gather(p: int, shift: int = 0) -> Schedule:
    """Rank r begins with chunk r + shift; all end with all."""
    return [
        Move(s, r, (r + 1) % p, ((r - s + shift) % p,))
        for s in range(p - 1)
        for r in range(p)
    ]


def all_reduce(p: int) -> Schedule:
    """Begins with rank r sending chunk r, and so finishes chunk r + 1 on rank r after
    half of the steps.
    """
    return then(reduce_scatter(p, shift=1), all_gather(p, shift=1))


def broadcast(p: int, pieces: int, root: int = 0) -> Schedule:
    """A pipelined chain root → root + 1 → …: piece c leaves rank root + i in step c +
    i. p + pieces − 2 steps of n / pieces.
    """
    return sorted(
        Move(c + i, (root + i) % p, (root + i + 1) % p, (c,))
        for i in range(p - 1)
        for c in range(pieces)
    )


def all_to_all(p: int) -> Schedule:
    """Pairwise exchange: in step s everybody sends to the rank s + 1 further on. Chunk
    i·p + j goes from i to j.
    """
    return [
        Move(s - 1, r, (r + s) % p, (r * p + (r + s) % p,))
        for s in range(1, p)
        for r in range(p)
    ]
