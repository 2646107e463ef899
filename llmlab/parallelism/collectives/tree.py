"""Binomial trees: the number of ranks that have the data doubles with each step.

Thakur, Rabenseifner & Gropp 2005 (https://doi.org/10.1177/1094342005051521), sections
4.2 and 4.5.

    broadcast        every rank that has the data sends all n bytes in each step:
                     ⌈log₂ p⌉ (α + n/β)
    scatter          every rank that has data sends half of it in each step:
                     ⌈log₂ p⌉ α + (p−1)/p · n/β for a power of two
    reduce, gather   the same backwards
    all-reduce       a reduce to rank 0, then a broadcast: 2 ⌈log₂ p⌉ (α + n/β)

    p     ranks
    v     a rank's place, (r − root) mod p: the root has place 0
    k     step
    n     bytes of the whole tensor
    α, β  seconds per message, bytes per second
"""

from __future__ import annotations

from llmlab.parallelism.collectives.schedule import Move, Schedule, backwards, then


def _depth(p: int) -> int:
    return (p - 1).bit_length()  # ⌈log₂ p⌉


def broadcast(p: int, root: int = 0) -> Schedule:
    """In step k the places 0 … 2^k − 1 have the data, and each sends it 2^k places on.

    The tensor is one chunk.
    """
    moves = []
    for k in range(_depth(p)):
        for v in range(2**k):
            receiver = v + 2**k
            if receiver < p:
                moves.append(Move(k, (v + root) % p, (receiver + root) % p, (0,)))
    return moves


def reduce(p: int, root: int = 0) -> Schedule:
    """A broadcast backwards, with sums."""
    return backwards(broadcast(p, root), add=True)


def all_reduce(p: int) -> Schedule:
    """A reduce to rank 0, then a broadcast."""
    return then(reduce(p), broadcast(p))


def scatter(p: int, root: int = 0) -> Schedule:
    """Chunk r ends on rank r.

    Place v has the chunks of the places v … v + 2·half − 1, and sends the upper half of
    them to place v + half.
    """
    moves = []
    for k in range(_depth(p)):
        half = 2 ** (_depth(p) - 1 - k)  # …, 4, 2, 1
        for v in range(0, p - half, 2 * half):
            upper_places = range(v + half, min(v + 2 * half, p))
            chunks = tuple((place + root) % p for place in upper_places)
            moves.append(Move(k, (v + root) % p, (v + half + root) % p, chunks))
    return moves


def gather(p: int, root: int = 0) -> Schedule:
    """A scatter backwards."""
    return backwards(scatter(p, root), add=False)
