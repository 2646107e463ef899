"""Recursive halving and doubling: as few bytes as the ring, in as few steps as the
tree.

Rabenseifner 2004 (https://doi.org/10.1007/978-3-540-24685-5_1); Thakur, Rabenseifner &
Gropp 2005, sections 4.4, 4.5 and 5.

    reduce-scatter   in each step a pair splits what it has in two; each sends the half
                     that it gives up,
                     and adds the half that it keeps     log₂ p steps, (p−1)/p · n bytes
    all-gather       the same backwards                  log₂ p steps, (p−1)/p · n bytes
    all-reduce       one, then the other                 2 log₂ p · α + 2 (p−1)/p · n/β
    the same, for a few bytes: partners exchange all that they have, and both add        log₂ p (α + n/β)

    p  ranks, a power of two, r one of them      k  step      n  bytes of the tensor, in
                                                    p chunks

Other p: with q the power of two below p, ranks q … p − 1 first add their whole tensor
to rank r − q's, and get the result at the end: two more steps of n bytes each. (MPICH
pairs neighbours, gloo uses "binary blocks"; the count of steps is theirs.)
"""

from __future__ import annotations

from llmlab.parallelism.collectives.schedule import Move, Schedule, backwards, then


def _power_of_two(p: int) -> int:
    """log₂ p."""
    if p < 1 or p & (p - 1):
        raise ValueError(
            f"p={p} must be a power of two; `collectives_bruck` takes any number of"
            " ranks in ⌈log₂ p⌉ steps"
        )
    return p.bit_length() - 1


def reduce_scatter(p: int, near_first: bool = True) -> Schedule:
    """Rank r ends with chunk r of the sum.

    Partners differ in one bit of their numbers. `near_first`: the lowest bit first, so
    that the largest messages go to the neighbour (Rabenseifner's all-reduce, gloo);
    else the highest bit first (recursive halving as Thakur et al. draw it).
    """
    bits = [1 << k for k in range(_power_of_two(p))]
    # seen: the bits of earlier steps, in which a rank's chunks agree with it
    moves, seen = [], 0
    for k, bit in enumerate(bits if near_first else reversed(bits)):
        seen |= bit
        moves += [
            Move(
                k,
                r,
                r ^ bit,
                tuple(c for c in range(p) if (c ^ r ^ bit) & seen == 0),
                add=True,
            )
            for r in range(p)
        ]
    return moves


def all_gather(p: int, near_first: bool = False) -> Schedule:
    """Rank r begins with chunk r; the chunks that a rank has double in each step."""
    return backwards(reduce_scatter(p, not near_first), add=False)


def all_reduce(p: int, near_first: bool = True) -> Schedule:
    """Any number of ranks; the tensor is cut into as many chunks as the largest power
    of two has that is not above p.
    """
    q = 1 << (p.bit_length() - 1)
    halves = reduce_scatter(q, near_first)
    core = then(halves, backwards(halves, add=False))
    return _folded(p, q, core, tuple(range(q)))


def all_reduce_doubling(p: int) -> Schedule:
    """Recursive doubling: in step k, partners 2^k apart exchange the sums of their 2^k
    ranks. The tensor is one chunk.
    """
    q = 1 << (p.bit_length() - 1)
    core = [
        Move(k, r, r ^ (1 << k), (0,), add=True)
        for k in range(_power_of_two(q))
        for r in range(q)
    ]
    return _folded(p, q, core, (0,))


def _folded(p: int, q: int, core: Schedule, whole: tuple[int, ...]) -> Schedule:
    """The ranks from q on hand in their tensor before, and get the result after, what
    the first q ranks do.
    """
    fold = [Move(0, r, r - q, whole, add=True) for r in range(q, p)]
    return then(fold, core, backwards(fold, add=False))
