"""Recursive halving and doubling: as few bytes as the ring, as few steps as the tree.

Rabenseifner 2004 (https://doi.org/10.1007/978-3-540-24685-5_1); Thakur, Rabenseifner &
Gropp 2005, sections 4.4, 4.5 and 5.

    reduce-scatter       in each step the two ranks of a pair split what they have in
                         two; each sends one half, and adds what it receives to the
                         other: log₂ p steps, (p−1)/p · n bytes
    all-gather           the same backwards: log₂ p steps, (p−1)/p · n bytes
    all-reduce           one, then the other: 2 log₂ p · α + 2 (p−1)/p · n/β
    all-reduce, doubling for a few bytes: partners exchange all that they have, and both
                         add: log₂ p (α + n/β)

Other p: with q the power of two below p, rank r of q … p − 1 first sends its whole
tensor to rank r − q, who adds it, and gets the result at the end: two more steps of n
bytes each. (MPICH pairs neighbours, gloo uses "binary blocks"; the number of steps is
the same.)

    p  ranks, a power of two
    q  the largest power of two that is not above p
    r  one of the ranks
    k  step
    n  bytes of the tensor, in p chunks
"""

from __future__ import annotations

from llmlab.parallelism.collectives.schedule import Move, Schedule, backwards, then


def _log2(p: int) -> int:
    """log₂ p, for a power of two."""
    if p < 1 or p & (p - 1):
        raise ValueError(
            f"p={p} must be a power of two; `bruck` takes any number of ranks in"
            " ⌈log₂ p⌉ steps"
        )
    return p.bit_length() - 1


def _power_of_two_below(p: int) -> int:
    """q, the largest power of two that is not above p."""
    return 1 << (p.bit_length() - 1)


def reduce_scatter(p: int, near_first: bool = True) -> Schedule:
    """Rank r ends with chunk r of the sum.

    Partners differ in one bit of their numbers. `near_first`: the lowest bit first, so
    that the largest messages go to the neighbour (Rabenseifner's all-reduce, gloo);
    else the highest bit first (recursive halving as Thakur et al. draw it).
    """
    bits = [1 << k for k in range(_log2(p))]
    if not near_first:
        bits.reverse()
    moves = []
    # The bits of the steps so far. After them a rank is in charge of the chunks whose
    # numbers agree with its own in these bits.
    decided_bits = 0
    for k, bit in enumerate(bits):
        decided_bits |= bit
        for r in range(p):
            partner = r ^ bit
            chunks = [c for c in range(p) if (c ^ partner) & decided_bits == 0]
            moves.append(Move(k, r, partner, tuple(chunks), add=True))
    return moves


def all_gather(p: int, near_first: bool = False) -> Schedule:
    """Rank r begins with chunk r; the chunks that a rank has double in each step."""
    return backwards(reduce_scatter(p, not near_first), add=False)


def all_reduce(p: int, near_first: bool = True) -> Schedule:
    """Any number of ranks; the tensor is cut into q chunks."""
    q = _power_of_two_below(p)
    halves = reduce_scatter(q, near_first)
    core = then(halves, backwards(halves, add=False))
    return _folded(p, q, core, tuple(range(q)))


def all_reduce_doubling(p: int) -> Schedule:
    """Recursive doubling. The tensor is one chunk.

    In step k, partners 2^k apart exchange the sums of their 2^k ranks.
    """
    q = _power_of_two_below(p)
    core = []
    for k in range(_log2(q)):
        for r in range(q):
            partner = r ^ (1 << k)
            core.append(Move(k, r, partner, (0,), add=True))
    return _folded(p, q, core, (0,))


def _folded(p: int, q: int, core: Schedule, whole: tuple[int, ...]) -> Schedule:
    """What the first q ranks do, for p ranks.

    The ranks from q on send their tensor before it, and get the result after it.
    """
    fold = [Move(0, r, r - q, whole, add=True) for r in range(q, p)]
    return then(fold, core, backwards(fold, add=False))
