# %% [markdown]
# # Solutions: TVM
#
# Four functions that a tensor compiler cannot do without: what a split makes of a loop, which part of a tensor a tile needs, which operations become one function, and where a tuner goes from a schedule that is good.
#
# Stuck? `check.hint("region")` shows a hint, and the next one when it is called again.

# %%
import math

from llmlab.checks.compilers.tvm import check
from llmlab.compilers.tvm import Affine, Kind, Refused, interval, primes

# %% [markdown]
# ## Exercise 1: split_loop
# ●●○○○ difficulty · ●●●●○ importance · 12 minutes · 2 points
#
# A loop of `extent` iterations becomes one loop per factor, each inside the one before. At most one factor is `None`: that part gets as many iterations as are needed, and no more. Return the parts as a tuple, and whether a guard is needed, which cuts off the iterations
# too many: `True` if the parts make up more than the extent. If they make up fewer, raise `Refused` with a sentence.


# %% tags=["exercise"]
def split_loop(
    extent: int, factors: tuple[int | None, ...]
) -> tuple[tuple[int, ...], bool]:
    """(the extents of the parts, whether a guard is needed)."""
    # BEGIN SOLUTION
    given = [factor for factor in factors if factor is not None]
    rest = -(-extent // math.prod(given))
    parts = tuple(rest if factor is None else factor for factor in factors)
    if math.prod(parts) < extent:
        raise Refused(f"{factors} make up {math.prod(parts)} of {extent}")
    return parts, math.prod(parts) > extent
    # END SOLUTION


# %% tags=["check"]
check.split_loop(split_loop)

# %% [markdown] tags=["solution"]
# 13 iterations in parts of 4 are 4 × 4, and the guard says `i_0 * 4 + i_1 < 13`. It stands in the innermost loop, where it costs most, unless the compiler can move it out. That is why tuners try factors that divide, and libraries pad.

# %% [markdown]
# ## Exercise 2: region
# ●●●●○ difficulty · ●●●●● importance · 25 minutes · 4 points
#
# A tensor is to be computed where it is read, a piece at a time. Which piece does one iteration of the outer loops need? One dimension at a time: `indices` has, for each read of the tensor, the index along this dimension, and `moving` the loops that run inside the piece, with their extents. All
# other loops stand still, and in this exercise the part that stands still is the same in every read.
#
# Return where the region begins, an `Affine` of the loops that stand still, and how many places it has: it goes from the smallest that any read can reach to the largest.
#
# | | |
# |---|---|
# | `index.names` | the loops in an index: a set |
# | `index.part(names)` | the terms of these loops, without the constant |
# | `index - part`, `part + 3` | indices, too |
# | `interval(index, moving)` | the smallest and the largest value, when each loop goes from 0 to its extent − 1 |
#
# Two loops, $i$ of 4 and $k$ of 3, in the index $8o + 2i + k$: the region begins at $8o$ and has 9 places.


# %% tags=["exercise"]
def region(indices: list[Affine], moving: dict[str, int]) -> tuple[Affine, int]:
    """(where it begins, how many places it has)."""
    # BEGIN SOLUTION
    spans = []
    for index in indices:
        standing = index.part(index.names - moving.keys())
        spans.append(interval(index - standing, moving))
    first = min(first for first, _ in spans)
    last = max(last for _, last in spans)
    return standing + first, last - first + 1
    # END SOLUTION


# %% tags=["check"]
check.region(region)

# %% [markdown] tags=["solution"]
# This is bounds inference, after Halide. The region may be too large: of $2i$ with $i < 4$ only every second place is read, and the four between are computed for nobody. It is never too small. Neighbouring tiles share places at their borders, and `compute_at` computes these twice: less memory, more arithmetic.

# %% [markdown]
# ## Exercise 3: may_fuse
# ●●●●○ difficulty · ●●●●● importance · 25 minutes · 4 points
#
# May an operation join its post-dominator, the first operation that all ways from it lead to? You get its `kind`; `way`, the largest kind of an operation that reads on the way there, the post-dominator included; for each step `between`, the kind of the function that it is in by now; `end`, the kind of the
# function that the post-dominator is in; and whether this is the `second` round. `Kind` is ordered: ELEMENTWISE < BROADCAST < INJECTIVE < REDUCTION < ANCHOR < OPAQUE.
#
# 1. An ANCHOR joins in the first round, if `way` is ELEMENTWISE and each `between` and the `end` are BROADCAST at most.
# 2. ELEMENTWISE and BROADCAST join in both rounds, if `way` is REDUCTION at most, each `between` INJECTIVE at most, and the `end` ANCHOR at most.
# 3. INJECTIVE joins in the second round, if each `between` and the `end` are INJECTIVE at most.
# 4. Nothing else joins.


# %% tags=["exercise"]
def may_fuse(
    kind: Kind, way: Kind, between: tuple[Kind, ...], end: Kind, second: bool
) -> bool:
    """Whether the operation joins, with all that lies between."""
    # BEGIN SOLUTION
    if kind is Kind.ANCHOR:
        fits = all(each <= Kind.BROADCAST for each in (*between, end))
        return not second and way is Kind.ELEMENTWISE and fits
    if kind <= Kind.BROADCAST:
        fits = all(each <= Kind.INJECTIVE for each in between)
        return way <= Kind.REDUCTION and fits and end <= Kind.ANCHOR
    if kind is Kind.INJECTIVE:
        return second and all(each <= Kind.INJECTIVE for each in (*between, end))
    return False
    # END SOLUTION


# %% tags=["check"]
check.may_fuse(may_fuse)

# %% [markdown] tags=["solution"]
# `way` and `end` ask two things. `way` is about how values are *read*: a product reads each of its inputs many times, so what feeds it is not computed inside it. `end` is about where the reader *lives* by now: the sum in $x w + y$ has joined the product's function already, and $y$'s exponential may follow it there.

# %% [markdown]
# ## Exercise 4: neighbours
# ●●●○○ difficulty · ●●●○○ importance · 20 minutes · 3 points
#
# A tuner has measured a schedule that is good, and tries one a little different. A loop was split into `tile`, whole numbers whose product is its extent. One prime factor of one part moves to another part: that is a neighbour. Return all of them, each once, in any order, as a list of tuples. The last part, which will be written
# out or put into registers, may be `most` at the largest. `primes(12)` is `[2, 3]`.


# %% tags=["exercise"]
def neighbours(tile: tuple[int, ...], most: int) -> list[tuple[int, ...]]:
    """The tiles that differ by one prime factor in another place."""
    # BEGIN SOLUTION
    found = set()
    for source, part in enumerate(tile):
        for prime in primes(part):
            for target in range(len(tile)):
                new = list(tile)
                new[source] //= prime
                new[target] *= prime
                if target != source and new[-1] <= most:
                    found.add(tuple(new))
    return sorted(found)
    # END SOLUTION


# %% tags=["check"]
check.neighbours(neighbours)

# %% [markdown] tags=["solution"]
# By such moves every tile can be reached from every other, and each step changes the size of one loop by a small factor, so times of neighbours are alike more often than those of strangers. That is all that a search by mutation lives on.
