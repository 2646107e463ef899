"""Which statements meet in memory, and in which order they must stay.

Two statements depend on each other if both touch an element, and one of them writes it.
The direction vector of a dependence says for each loop around both whether the second
comes in the same iteration (=), a later one (<) or an earlier one (>). A program may be
changed as long as nothing that comes later by one of its dependences comes earlier then
(Allen and Kennedy's book has it all).

Whether there is such a pair of iterations is a question about whole numbers:

    Σ a_l i_l + a_0  =  Σ b_l i'_l + b_0      0 ≤ i, i' < n      i_l (= < >) i'_l

Banerjee's test answers it for real numbers, by the least and the largest value of left
minus right; the greatest common divisor answers it without the bounds. Where both say
"perhaps", a dependence is taken to be there: a schedule may be refused that would have
been right, never the other way round.

Sums are taken to be sums of real numbers: two `+=` to one element may change their
order, as they may in a BLAS. So may two `max=`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmlab.compilers.back_end.ir import Affine, Loop, Node, Store, loads, walk

Directions = dict[str, str]


@dataclass(frozen=True)
class Access:
    """One reading or writing of a buffer by a statement.

    Attributes:
        op: how it writes; empty for reading.
        around: the loops around the statement, the outermost first.
    """

    buffer: str
    index: tuple[Affine, ...]
    op: str
    around: tuple[Loop, ...]


def accesses(body: Sequence[Node], around: tuple[Loop, ...] = ()) -> list[Access]:
    """All of them, in the order of the program; what a statement reads comes first."""
    found = []
    for node, loops in walk(tuple(body), around):
        if isinstance(node, Store):
            found += [Access(e.buffer, e.index, "", loops) for e in loads(node.value)]
            found.append(Access(node.buffer, node.index, node.op, loops))
    return found


def pairs(
    first: Sequence[Access], second: Sequence[Access], sums: bool = False
) -> Iterator[tuple[Access, Access]]:
    """Those whose order may matter: the same buffer, and one writes.

    Args:
        sums: whether two += to one element count.
    """
    for a in first:
        for b in second:
            if a.buffer != b.buffer or not (a.op or b.op):
                continue
            if sums or a.op != b.op or a.op == "=":
                yield a, b


def may_meet(a: Access, b: Access, directions: Directions) -> bool:
    """Whether both may touch one element, in iterations with these directions.

    A loop around both that has no direction may have any; a loop around one of them
    takes all its values.
    """
    shared = {x.var for x in a.around} & {x.var for x in b.around}
    extents = {loop.var: loop.extent for loop in (*a.around, *b.around)}
    for name, way in directions.items():
        if way != "=" and extents[name] < 2:
            return False
    for left, right in zip(a.index, b.index, strict=True):
        low = high = left.constant - right.constant
        factors = []
        for name in {*left.variables, *right.variables}:
            way = directions.get(name, "*") if name in shared else "*"
            p, q = left.of(name), right.of(name)
            ends = [p * i - q * j for i, j in corners(way, extents[name])]
            low, high = low + min(ends), high + max(ends)
            factors += [p - q] if way == "=" else [p, q]
        if not low <= 0 <= high:
            return False
        divisor = math.gcd(*factors)
        difference = left.constant - right.constant
        if difference % divisor if divisor else difference:
            return False
    return True


def corners(way: str, extent: int) -> list[tuple[int, int]]:
    """The corners of all (i, i') with a direction: what is linear is extreme there."""
    last = extent - 1
    if way == "=":
        return [(0, 0), (last, last)]
    if way == "<":
        return [(0, 1), (0, last), (last - 1, last)]
    if way == ">":
        return [(1, 0), (last, 0), (last, last - 1)]
    return [(0, 0), (0, last), (last, 0), (last, last)]


def vectors(
    a: Access, b: Access, outer: Sequence[str], chain: Sequence[str]
) -> Iterator[Directions]:
    """The direction vectors over a chain of loops by which b may come after a.

    Loops around the chain are in the same iteration.
    """
    known = dict.fromkeys(outer, "=")

    def go_on(found: Directions, rest: Sequence[str]) -> Iterator[Directions]:
        if not may_meet(a, b, {**known, **found}):
            return
        if not rest:
            yield found
            return
        later = "<" in found.values()  # from there on, any direction will do
        for way in "<=>" if later else "<=":
            yield from go_on({**found, rest[0]: way}, rest[1:])

    yield from go_on({}, chain)


def changed_order(
    body: Sequence[Node], around: tuple[Loop, ...], old: Sequence[str], new: Sequence
) -> tuple[Access, Access, Directions] | None:
    """A dependence that a new order of a chain of loops turns round; None if none.

    Args:
        around: the loops around the body, those of the chain last.
    """
    touched = accesses(body, around)
    outer = [loop.var for loop in around if loop.var not in old]
    for a, b in pairs(touched, touched):
        for found in vectors(a, b, outer, old):
            moved = [found[name] for name in new if found[name] != "="]
            if moved and moved[0] == ">":
                return a, b, found
    return None


def carried(
    loop: Loop, around: tuple[Loop, ...]
) -> tuple[Access, Access, Directions] | None:
    """Two accesses that meet in different iterations of a loop; sums count, too.

    Args:
        around: the loops around it.
    """
    private = private_in(loop)
    touched = accesses(loop.body, (*around, loop))
    touched = [each for each in touched if each.buffer not in private]
    known = {each.var: "=" for each in around} | {loop.var: "<"}
    for a, b in pairs(touched, touched, sums=True):
        if may_meet(a, b, known):
            return a, b, known
    return None


def private_in(loop: Loop) -> set[str]:
    """The buffers that exist anew in each of its iterations."""
    found = set(loop.local)
    for node, _ in walk(loop.body):
        if isinstance(node, Loop):
            found.update(node.local)
    return found


def overtaken(
    first: Loop, second: Loop, around: tuple[Loop, ...]
) -> tuple[Access, Access, Directions] | None:
    """Something of `second` that would come too early if both were one loop.

    The variables must be the same already.
    """
    one = accesses(first.body, (*around, first))
    two = accesses(second.body, (*around, second))
    known = {each.var: "=" for each in around} | {first.var: ">"}
    for a, b in pairs(one, two):
        if may_meet(a, b, known):
            return a, b, known
    return None
