"""Which results of a layer may lie in the same memory.

A result is needed from the launch that makes it to the last one that reads it. Two
results whose times do not meet can have the same bytes. So all of a layer fits into one
arena, each result at an offset, planned before anything runs; and as the layers come
one after the other, one arena serves them all.

    plan_buffers   offsets, largest first: Pisarchyk & Lee 2020,
                   https://arxiv.org/abs/2001.03288, section 5.2, algorithm 3
    lower_bound    bytes alive at the worst moment: no plan is below it
    optimum        the best plan, by trying all orders; for a few results

Simplified: sizes are known beforehand, so for one number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from llmlab.inference.fused_transformers.counting import Counter

MAX_TRIED = 8  # results whose orders are all tried


@dataclass(frozen=True)
class Lifetime:
    """A result: its bytes, the launch that makes it, the last one that needs it.

    Raises:
        ValueError: no bytes, or an end before its beginning.
    """

    name: str
    size: int
    first: int
    last: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size} of {self.name} must be at least 1")
        if not 0 <= self.first <= self.last:
            raise ValueError(
                f"first={self.first} and last={self.last} of {self.name} must be"
                " launches, in this order"
            )

    def meets(self, other: Lifetime) -> bool:
        """Whether both are needed during some launch."""
        return self.first <= other.last and other.first <= self.last


def lifetimes(counter: Counter) -> list[Lifetime]:
    """The results of a counted function.

    What was there before it began, weights and inputs, is no result of it. What the
    function gives back lives until the end.
    """
    known: set[int] = set()
    made: dict[int, tuple[str, int]] = {}  # storage → name, the launch that makes it
    last: dict[int, int] = {}
    for i, launch in enumerate(counter.launches):
        known |= launch.inputs - made.keys()
        new = [x for x in launch.outputs if x not in known and x not in made]
        for part, x in enumerate(new):
            suffix = f".{part}" if len(new) > 1 else ""
            made[x] = (f"{i} {launch.name}{suffix}", i)
        for x in launch.inputs.union(launch.outputs):
            last[x] = i
    end = len(counter.launches) - 1
    results = []
    for x, (name, first) in made.items():
        size = counter.kept[x].untyped_storage().nbytes()
        if size:
            stop = end if x in counter.result else last[x]
            results.append(Lifetime(name, size, first, stop))
    return results


def plan_buffers(results: Sequence[Lifetime]) -> dict[str, int]:
    """The offset of each result in one arena, largest first.

    A result goes into the smallest gap that is large enough, between those that are
    placed already and meet it in time; of equal gaps, into the lowest. If there is
    none, it goes behind the last of them. Equal sizes come in the order given.
    """
    placed: list[tuple[int, Lifetime]] = []  # by offset
    for result in sorted(results, key=lambda x: -x.size):
        end = 0  # of those below
        best = None
        smallest = None
        for offset, other in sorted(placed, key=lambda pair: pair[0]):
            if not result.meets(other):
                continue
            gap = offset - end
            if gap >= result.size and (smallest is None or gap < smallest):
                best, smallest = end, gap
            end = max(end, offset + other.size)
        placed.append((end if best is None else best, result))
    return {result.name: offset for offset, result in placed}


def arena(results: Sequence[Lifetime], offsets: Mapping[str, int]) -> int:
    """Bytes of the arena of a plan.

    Raises:
        ValueError: two results that meet in time overlap.
    """
    for i, a in enumerate(results):
        for b in results[:i]:
            start = max(offsets[a.name], offsets[b.name])
            stop = min(offsets[a.name] + a.size, offsets[b.name] + b.size)
            if a.meets(b) and start < stop:
                raise ValueError(f"{a.name} and {b.name} overlap in {start} … {stop}")
    return max((offsets[x.name] + x.size for x in results), default=0)


def lower_bound(results: Sequence[Lifetime]) -> int:
    """The most bytes that are needed during one launch."""
    moments = {x.first for x in results}
    return max(
        (sum(x.size for x in results if x.first <= t <= x.last) for t in moments),
        default=0,
    )


def optimum(results: Sequence[Lifetime]) -> int:
    """The smallest arena that any plan has.

    Take the results of a best plan by their offsets, and put each as low as those
    before it allow: none goes up. So the lowest places in some order are a best plan.

    Raises:
        ValueError: there are too many results to try all orders.
    """
    if len(results) > MAX_TRIED:
        raise ValueError(
            f"results has {len(results)} entries: at most {MAX_TRIED} can be tried"
        )
    return min(arena(order, lowest(order)) for order in permutations(results))


def lowest(order: Sequence[Lifetime]) -> dict[str, int]:
    """Each as low as those before it in the order allow."""
    placed: list[tuple[int, Lifetime]] = []
    for result in order:
        end = 0
        for offset, other in sorted(placed, key=lambda pair: pair[0]):
            if result.meets(other):
                if offset - end >= result.size:
                    break
                end = max(end, offset + other.size)
        placed.append((end, result))
    return {result.name: offset for offset, result in placed}
