"""What a benchmark is: two ways to do the same work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """`ours` and `theirs` do the same work on the same data; each call is one measurement."""

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    rounds: int = 15
