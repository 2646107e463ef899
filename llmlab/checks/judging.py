"""Marking by cases: what an answer does in each, beside what usual mistakes do.

    judge(answer, run, right, {"you …": wrong, …}, cases, "f(x)")

`run(function, n)` calls a function on case n and returns plain data that can be
compared: what it returned, and what it left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

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
    if found == wanted:
        return
    for words, wrong in mistakes.items():
        if found == attempt(run, wrong, cases):
            raise Mistake(words)
    for n in range(cases):
        for part in wanted[n]:
            if found[n][part] != wanted[n][part]:
                raise Mistake(
                    f"{part} after {what} is not right in case {n + 1} of {cases}:"
                    f" {shown(found[n][part])}",
                    foreseen=False,
                )


def attempt(run: Callable, function: Callable, cases: int) -> list[Outcome] | None:
    """What a wrong way does, None where it breaks down."""
    try:
        return [run(function, n) for n in range(cases)]
    except (Mistake, LookupError, ValueError, TypeError, AttributeError, RuntimeError):
        return None
