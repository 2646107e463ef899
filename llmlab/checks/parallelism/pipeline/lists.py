"""Says what is wrong with a learner's 1F1B lists."""

from __future__ import annotations

from llmlab.course.grading.checking import Mistake, expect


def check_lists(lists: list, p: int, m: int) -> None:
    """`lists[r]` is the answer for rank r of p, with m microbatches."""
    for r, ops in enumerate(lists):
        what = f"one_f_one_b({p}, {m}, {r})"
        expect(ops, kind=list, what=what)
        _check_ops(ops, what)
        _check_complete(ops, m, what)
        _check_fifo(ops, what)
    _check_warmups(lists, p, m)


def _check_ops(ops: list, what: str) -> None:
    for n, op in enumerate(ops):
        good = (
            isinstance(op, tuple)
            and len(op) == 2
            and op[0] in ("F", "B")
            and isinstance(op[1], int)
        )
        if not good:
            raise Mistake(
                f'{what}[{n}] is {op!r}, where a pair ("F" or "B", microbatch) is asked'
            )


def _check_complete(ops: list, m: int, what: str) -> None:
    numbers = {i for _, i in ops}
    if numbers == {*range(1, m + 1)}:
        raise Mistake(f"{what} numbers the microbatches from 1; they begin with 0")
    done = [i for kind, i in ops if kind == "B"]
    if done == list(range(len(done))) and 0 < len(done) < m and len(ops) < 2 * m:
        raise Mistake(
            f"{what} ends after {len(done)} of {m} backwards: those that are left come"
            " when there are no forwards any more"
        )
    for kind, i in ops:
        if not 0 <= i < m:
            raise Mistake(
                f"{what} has {kind} of microbatch {i}; there are m={m}, numbered from 0"
                + (": a rank cannot warm up with more than there are" if i >= m else "")
            )
    for i in range(m):
        for kind in "FB":
            n = ops.count((kind, i))
            if n != 1:
                raise Mistake(
                    f"{what} has {kind} of microbatch {i} {n} times; each rank does"
                    " each microbatch once"
                )
        if ops.index(("B", i)) < ops.index(("F", i)):
            raise Mistake(f"{what} has B of microbatch {i} before its F")


def _check_fifo(ops: list, what: str) -> None:
    for kind, word in (("F", "forwards"), ("B", "backwards")):
        order = [i for k, i in ops if k == kind]
        if order != sorted(order):
            raise Mistake(
                f"{what} does the {word} in the order {order}: first in, first out, so"
                " that no microbatch is held long"
            )


def _check_warmups(lists: list, p: int, m: int) -> None:
    """How many forwards each rank is ahead when its first backward comes, and what it
    does after.
    """
    kinds = ["".join(kind for kind, _ in ops) for ops in lists]
    ahead = [text.index("B") - 1 for text in kinds]
    patterns = {
        "all forwards come first: that is GPipe, which holds all m microbatches": (
            lambda r: m - 1
        ),
        (
            "the warm-up grows with r, where it must shrink: rank 0 is farthest from"
            " the loss and waits longest"
        ): lambda r: r,
        (
            "there is one forward too many before the first backward: it holds a"
            " microbatch for nothing"
        ): lambda r: p - r,
        (
            "there is one forward too few before the first backward: then a rank"
            " waits for a gradient that cannot be there yet"
        ): lambda r: max(p - r - 2, 0),
        (
            "there are twice as many forwards ahead as are needed: a gradient comes"
            " back one slot of a forward and a backward later for each rank behind"
        ): lambda r: 2 * (p - r - 1),
        (
            "every rank warms up alike: the last rank has its gradient at once, and"
            " needs no forward ahead"
        ): lambda r: p - 1,
        (
            "no forward is ahead: rank 0's first gradient comes back after a trip over"
            " all ranks; what does it do meanwhile?"
        ): (lambda r: 0),
    }
    right = [min(p - r - 1, m - 1) for r in range(p)]
    if ahead != right:
        for text, of in patterns.items():
            if ahead == [min(of(r), m - 1) for r in range(p)]:
                raise Mistake(f"one_f_one_b with p={p} and m={m}: {text}")
        r = next(r for r in range(p) if ahead[r] != right[r])
        raise Mistake(
            f"one_f_one_b({p}, {m}, {r}): {ahead[r] + 1} forwards before the first"
            " backward are not the right number"
        )
    for r, text in enumerate(kinds):
        w = min(p - r - 1, m)
        if text != "F" * w + "FB" * (m - w) + "B" * w:
            raise Mistake(
                f"one_f_one_b({p}, {m}, {r}): after the warm-up, one forward and one"
                " backward in turn while there are forwards"
            )
