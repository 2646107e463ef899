"""A trace: what happened, step by step, as plain data that can be played.

    mark    one thing in the picture: a bar, a cell, an arrow, a box
    step    the marks that it adds or replaces, and a sentence that says what happens
    scene   where marks stand: lanes over time, or a plane of pixels

A step holds what changes, not the whole picture.

    shape    at
    bar      start, end, lane                   in lanes
    cell     left, top, width, height           in a plane
    box      left, top, width, height           in a plane, behind cells
    arrow    x and y of its tail and its head   in a plane; may carry a cell
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

SHAPES = {"bar": 3, "cell": 4, "box": 4, "arrow": 4}  # shape → numbers in `at`
KINDS = ("plain", "blue", "orange", "green", "pale-blue", "pale-orange", "pale-green")
KINDS += ("done", "wrong", "stuck")


@dataclass(frozen=True)
class Mark:
    """One thing in the picture.

    Attributes:
        id: a later mark of the same id replaces this one.
        parts: for each rank, how often its summand is in a cell or an arrow.
        value: what hover and focus say.
        line: the line of code that made it.
    """

    id: str
    shape: str
    at: tuple[float, ...]
    text: str = ""
    kind: str = "plain"
    parts: tuple[int, ...] = ()
    value: str = ""
    line: str = ""

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(
                f"shape={self.shape!r} of mark {self.id!r} must be one of"
                f" {', '.join(SHAPES)}"
            )
        if len(self.at) != SHAPES[self.shape]:
            raise ValueError(
                f"at={self.at} of mark {self.id!r}: a {self.shape} needs"
                f" {SHAPES[self.shape]} numbers"
            )
        if self.kind not in KINDS:
            raise ValueError(
                f"kind={self.kind!r} of mark {self.id!r} must be one of"
                f" {', '.join(KINDS)}"
            )


@dataclass(frozen=True)
class Step:
    """What one step changes, and the sentence that is announced for it.

    Attributes:
        gone: ids of marks that it takes away.
        facts: name → value, shown beside the picture.
        sides: for each lane, what is held now and the most that was held so far.
    """

    marks: tuple[Mark, ...]
    alt: str
    gone: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    sides: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if not self.alt.strip():
            raise ValueError("alt is empty: say in a sentence what the step shows")


@dataclass(frozen=True)
class Lanes:
    """One lane per rank, time to the right. `until`: where the time axis ends."""

    lanes: int
    until: float


@dataclass(frozen=True)
class Plane:
    """A plane of pixels. `cell`: width and height of a cell that an arrow carries."""

    width: float
    height: float
    cell: tuple[float, float]


@dataclass(frozen=True)
class Trace:
    """What `steps` plays.

    Attributes:
        stop: the step at which playing stops by itself, because something is wrong.
        fault: what is wrong there; "" where all is right.
        plan: for a pipeline schedule, what the page needs to work out its steps again
            when it is edited.
    """

    scene: Lanes | Plane
    steps: tuple[Step, ...]
    stop: int | None = None
    fault: str = ""
    plan: Mapping | None = None

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("a trace needs one step or more")

    def data(self) -> dict:
        """The trace as JSON holds it. What has its default is left out."""
        return {
            "scene": _plain(self.scene),
            "steps": [_plain(step) for step in self.steps],
            "stop": self.stop,
            "fault": self.fault,
        }


def number(x: float) -> str:
    """A number with at most two decimals. The page writes numbers in the same way."""
    rounded = math.floor(x * 100 + 0.5) / 100
    return str(int(rounded)) if rounded == int(rounded) else repr(rounded)


def percent(share: float) -> str:
    """A share as whole percents, halves upwards, as the page writes it."""
    return f"{math.floor(100 * share + 0.5)}%"


def _plain(value):
    """Lists and dictionaries in place of tuples and dataclasses."""
    if isinstance(value, Mark | Step | Lanes | Plane):
        found = {}
        for each in fields(value):
            content = _plain(getattr(value, each.name))
            if content not in ("", [], {}, "plain"):
                found[each.name] = content
        return found
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return dict(value)
    return value
