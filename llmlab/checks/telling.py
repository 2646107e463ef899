"""Inputs of a check on which each mistake shows."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from llmlab.course.grading.checking import close


def telling(
    draw: Callable[[], tuple], right: Callable, mistakes: Callable[..., dict]
) -> tuple:
    """Inputs on which no two mistakes come to the same, and none is right by chance."""
    for _ in range(200):
        case = draw()
        values = [right(*case)]
        for value in mistakes(*case).values():
            values.append(value() if callable(value) else value)
        pairs = itertools.combinations(values, 2)
        if not any(close(a, b, tol=1e-3) for a, b in pairs):
            return case
    raise RuntimeError("no inputs were found that tell all mistakes apart")
