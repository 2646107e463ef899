"""Marking by cases: what an answer does in each, beside what usual mistakes do.

    judge(answer, run, right, {"you …": wrong, …}, cases, "f(x)")

`run(function, n)` calls a function on case n and returns plain data that can be
compared: what it returned, and what it left behind.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from operator import eq

from llmlab.course.grading.checking import Mistake

Outcome = dict[str, object]


def judge(
    answer: Callable,
    run: Callable[[Callable, int], Outcome],
    right: Callable,
    mistakes: Mapping[str, Callable],
    cases: int,
    what: str,
    shown: Callable[[object], object] = str,
) -> None:
    """Nothing, if an answer does in all cases what the right one does.

    Args:
        shown: a part of an outcome as a learner may see it.

    Raises:
        Mistake: the words of the mistake that does the same, or else the first case and
            the part of its outcome that differ.
    """
    found = [run(answer, n) for n in range(cases)]
    wanted = [run(right, n) for n in range(cases)]
    n = first_difference(
        found, wanted, mistakes, lambda wrong: attempt(run, wrong, cases, found)
    )
    if n is None:
        return
    for part in wanted[n]:
        if found[n][part] != wanted[n][part]:
            raise Mistake(
                f"{part} after {what} is not right in case {n + 1} of {cases}:"
                f" {shown(found[n][part])}",
                foreseen=False,
            )


def first_difference(
    found: list,
    wanted: list,
    mistakes: Mapping[str, Callable],
    results: Callable[[Callable], list | None],
    same: Callable[[object, object], bool] = eq,
) -> int | None:
    """The first case in which an answer is not right; None if it is right in all.

    Args:
        found: what the answer does in all cases; `wanted`: what the right one does.
        results: what a wrong way does in all cases, None where it breaks down.
        same: whether two results are the same; it compares lists of them, too.

    Raises:
        Mistake: the words of the mistake that does the same in all cases.
    """
    if same(found, wanted):
        return None
    for words, wrong in mistakes.items():
        if same(found, results(wrong)):
            raise Mistake(words)
    pairs = zip(found, wanted, strict=True)
    return next(n for n, (mine, its) in enumerate(pairs) if not same(mine, its))


def attempt(
    run: Callable, function: Callable, cases: int, found: list | None = None
) -> list[Outcome] | None:
    """What a wrong way does, None where it breaks down.

    Args:
        found: what an answer does: the first case with another outcome is the last.
    """
    outcomes: list[Outcome] = []
    try:
        for n in range(cases):
            outcomes.append(run(function, n))
            if found is not None and outcomes[n] != found[n]:
                break
    except (Mistake, LookupError, ValueError, TypeError, AttributeError, RuntimeError):
        return None
    return outcomes


def told(value: object) -> object:
    """A number to nine digits, inside of tuples and lists too; else as it is."""
    if isinstance(value, tuple | list):
        return [told(each) for each in value]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return f"{float(value):.9g}"


def number(found: object, what: str) -> object:
    """What was found, if it is one number.

    Raises:
        Mistake: it is something else.
    """
    if isinstance(found, bool) or not isinstance(found, numbers.Real):
        raise Mistake(f"{what} returned {found!r}: return a number")
    return told(found)


def whole(found: object, what: str, wanted: str = "a whole number") -> int:
    """What was found, if it is one whole number; 3.0 is one, too.

    Raises:
        Mistake: it is something else.
    """
    number = isinstance(found, numbers.Real) and not isinstance(found, bool)
    if not number or not math.isfinite(found) or found != int(found):
        raise Mistake(f"{what} returned {found!r}: return {wanted}")
    return int(found)


def integer(found: object, what: str) -> int:
    """What was found, if its type is that of whole numbers.

    Raises:
        Mistake: it is something else.
    """
    if isinstance(found, bool) or not isinstance(found, numbers.Integral):
        raise Mistake(f"{what} is {found!r:.60}, where a whole number is asked")
    return int(found)
