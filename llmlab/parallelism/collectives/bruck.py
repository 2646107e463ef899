"""Bruck's algorithms: ⌈log₂ p⌉ steps for any number of ranks.

Bruck, Ho, Kipnis, Upfal & Weathersby 1997 (https://doi.org/10.1109/71.642949). NCCL's
PAT is related to them (Jeaugey 2025, https://arxiv.org/abs/2506.20252).

    all-gather       step k: rank r has chunks r … r + 2^k − 1, and sends them 2^k ranks
                     back: ⌈log₂ p⌉ α + (p−1)/p · n/β
    reduce-scatter   the same backwards, with sums
    all-reduce       one, then the other: as few steps as a tree, as few bytes as the
                     ring, for any p
    all-to-all       a tensor that has to travel d ranks on hops 2^k ranks in step k if
                     bit k of d is set: ⌈log₂ p⌉ steps, but about n/2 bytes in each,
                     where pairwise exchange sends (p−1)/p · n in all

    p  ranks; all numbers of ranks modulo p
    r  one of the ranks
    k  step
    d  how many ranks on a tensor has to travel
    n  bytes of the whole tensor (all-to-all: of what one rank sends)
"""

from __future__ import annotations

from llmlab.parallelism.collectives.schedule import Move, Schedule, backwards, then


def _steps(p: int) -> int:
    """⌈log₂ p⌉."""
    return (p - 1).bit_length()


def all_gather(p: int) -> Schedule:
    """Rank r begins with chunk r; all end with all."""
    moves = []
    for k in range(_steps(p)):
        distance = 2**k
        # in the last step a rank lacks fewer chunks than it could be sent
        count = min(distance, p - distance)
        for r in range(p):
            chunks = tuple((r + i) % p for i in range(count))
            moves.append(Move(k, r, (r - distance) % p, chunks))
    return moves


def reduce_scatter(p: int) -> Schedule:
    """Rank r ends with chunk r of the sum."""
    return backwards(all_gather(p), add=True)


def all_reduce(p: int) -> Schedule:
    """A reduce-scatter, then an all-gather."""
    return then(reduce_scatter(p), all_gather(p))


def all_to_all(p: int) -> Schedule:
    """Chunk i·p + j goes from rank i to rank j, which is d = j − i ranks on."""
    moves = []
    for k in range(_steps(p)):
        for r in range(p):
            chunks = []
            for d in range(p):
                if not d >> k & 1:
                    continue  # it does not hop in this step
                # it has made the hops of the bits below k, and so it comes from here
                hopped = d % 2**k
                i = (r - hopped) % p
                j = (i + d) % p
                chunks.append(i * p + j)
            moves.append(Move(k, r, (r + 2**k) % p, tuple(chunks)))
    return moves
