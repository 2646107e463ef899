"""Binomial trees: whoever has the data passes it on, so the number of ranks that have
it doubles with each step.

Thakur, Rabenseifner & Gropp 2005 (https://doi.org/10.1177/1094342005051521), sections
4.2 and 4.5.

    broadcast    ⌈log₂ p⌉ steps, each with all n bytes              ⌈log₂ p⌉ (α +
                 n/β)
    scatter      ⌈log₂ p⌉ steps; half of what is left in each       ⌈log₂ p⌉ α +
                 (p−1)/p · n/β    (p a power of two)
    reduce, gather     the same backwards
    all-reduce   a reduce to rank 0, then a broadcast               2 ⌈log₂ p⌉ (α + n/β)

    p  ranks       v  a rank's place, (r − root) mod p: the root has place 0       n
                      bytes      α, β  see `cost`
"""

from __future__ import annotations

from llmlab.parallelism.collectives.schedule import Move, Schedule, backwards, then


def _depth(p: int) -> int:
    return (p - 1).bit_length()  # ⌈log₂ p⌉


def broadcast(p: int, root: int = 0) -> Schedule:
    """In step k the places 0 … 2^k − 1 have the data, and each sends it 2^k places on.
    The tensor is one chunk.
    """
    return [
        Move(k, (v + root) % p, (v + 2**k + root) % p, (0,))
        for k in range(_depth(p))
        for v in range(2**k)
        if v + 2**k < p
    ]


def reduce(p: int, root: int = 0) -> Schedule:
    """A broadcast backwards, with sums."""
    return backwards(broadcast(p, root), add=True)


def all_reduce(p: int) -> Schedule:
    """To rank 0 and back."""
    return then(reduce(p), broadcast(p))


def scatter(p: int, root: int = 0) -> Schedule:
    """Chunk r ends on rank r. Each sender gives away the upper half of the places that
    it is in charge of.
    """
    moves = []
    for step, half in enumerate(2**k for k in reversed(range(_depth(p)))):  # …, 4, 2, 1
        for v in range(0, p - half, 2 * half):
            theirs = range(v + half, min(v + 2 * half, p))
            moves.append(
                Move(
                    step,
                    (v + root) % p,
                    (v + half + root) % p,
                    tuple((t + root) % p for t in theirs),
                )
            )
    return moves


def gather(p: int, root: int = 0) -> Schedule:
    """A scatter backwards."""
    return backwards(scatter(p, root), add=False)
