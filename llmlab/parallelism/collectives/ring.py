"""Ring collectives: every rank sends to its right neighbour only.

Every wire is busy in every step. Patarasuk & Yuan 2009
(https://doi.org/10.1016/j.jpdc.2008.09.002) prove that no all-reduce sends less than
2 (p−1)/p · n bytes per rank, and that the ring reaches it. Chunk c of the tensor
travels once around the ring to be summed, and once more to be distributed:

    reduce-scatter   step s: rank r sends chunk r − s − 1 to r + 1, who adds it:
                     p − 1 steps, (p−1)/p · n bytes
    all-gather       step s: rank r sends chunk r − s to r + 1, who keeps it:
                     p − 1 steps, (p−1)/p · n bytes
    all-reduce       one, then the other: 2(p − 1) steps, 2 (p−1)/p · n bytes

    p  ranks; all numbers modulo p
    r  one of the ranks
    s  step
    n  bytes of the tensor, in p chunks
"""

from __future__ import annotations

from llmlab.parallelism.collectives.schedule import Move, Schedule, then


def reduce_scatter(p: int, shift: int = 0) -> Schedule:
    """Rank r ends with chunk r + shift of the sum."""
    moves = []
    for s in range(p - 1):
        for r in range(p):
            # once it is added, the receiver's chunk is the sum over s + 2 ranks
            chunk = (r - s - 1 + shift) % p
            moves.append(Move(s, r, (r + 1) % p, (chunk,), add=True))
    return moves


def all_gather(p: int, shift: int = 0) -> Schedule:
    """Rank r begins with chunk r + shift; all end with all."""
    moves = []
    for s in range(p - 1):
        for r in range(p):
            # what arrived in the step before
            chunk = (r - s + shift) % p
            moves.append(Move(s, r, (r + 1) % p, (chunk,)))
    return moves


def all_reduce(p: int) -> Schedule:
    """A reduce-scatter, then an all-gather.

    In the first step rank r sends chunk r. So after half of the steps chunk r + 1 is
    finished on rank r.
    """
    return then(reduce_scatter(p, shift=1), all_gather(p, shift=1))


def broadcast(p: int, pieces: int, root: int = 0) -> Schedule:
    """A pipelined chain root → root + 1 → …, in p + pieces − 2 steps of n / pieces.

    Piece c leaves rank root + i in step c + i.
    """
    moves = []
    for i in range(p - 1):
        for c in range(pieces):
            moves.append(Move(c + i, (root + i) % p, (root + i + 1) % p, (c,)))
    return sorted(moves)


def all_to_all(p: int) -> Schedule:
    """Pairwise exchange: in step s every rank sends to the rank s + 1 further on.

    Chunk i·p + j goes from i to j.
    """
    moves = []
    for s in range(p - 1):
        for r in range(p):
            destination = (r + s + 1) % p
            moves.append(Move(s, r, destination, (r * p + destination,)))
    return moves
