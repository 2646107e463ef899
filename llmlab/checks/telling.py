"""Inputs of a check on which each mistake shows."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from llmlab.course.grading.checking import close


def telling(
    draw: Callable[[], tuple],
    right: Callable,
    mistakes: Callable[..., dict],
    tol: float = 1e-3,
) -> tuple:
    """Inputs on which no two mistakes come to the same, and none is right by chance."""
    for _ in range(1000):
        case = draw()
        values = [right(*case)]
        for value in mistakes(*case).values():
            values.append(value() if callable(value) else value)
        pairs = itertools.combinations(values, 2)
        if not any(close(a, b, tol=tol) for a, b in pairs):
            return case
    raise RuntimeError("no inputs were found that tell all mistakes apart")
