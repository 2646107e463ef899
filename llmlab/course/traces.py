"""What the state before leaves in a figure that moves: its lines and bars, outlined.

The frames of a slider are pictures, of which no part can be taken. So the lines and
bars of each frame are kept beside them, as SVG paths in CSS pixels. Only marks that are
not in every frame count, and a mark is shown over another frame only where the axes are
the same in both: limits, scales, labels and place.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from llmlab.course.figures import SHOWN_DPI

MOST = 24  # marks that one axes may show; a Gantt chart would only be smeared
POINTS = 12  # of a line whose markers are kept: a dot that moves, not a cloud
STOP, MOVE, LINE, CLOSE = 0, 1, 2, 79  # matplotlib's codes of a path


@dataclass(frozen=True)
class Mark:
    """A line, a bar or a dot: the axes that it stands in, its path, its colour."""

    axes: tuple
    path: str
    color: str


@dataclass(frozen=True)
class Traces:
    """The marks of all frames.

    Attributes:
        marks: each once, as (number of its axes, path, colour).
        frames: for each frame the numbers of its axes, and those of its marks.
    """

    marks: list[tuple[int, str, str]]
    frames: list[tuple[list[int], list[int]]]

    def between(self, before: int, now: int) -> str:
        """SVG of what the frame `before` has and the frame `now` has not."""
        axes, present = self.frames[now]
        left = [self.marks[i] for i in self.frames[before][1] if i not in present]
        return "".join(
            f'<path d="{path}"/><path d="{path}" stroke="{color}"/>'
            for place, path, color in left
            if place in axes
        )


def traces(figures: list[Any]) -> Traces | None:
    """The marks of figures that have been drawn; None where none can be traced."""
    found = [[_axes_of(ax) for ax in fig.axes] for fig in figures]
    marks = [
        [_marks(ax, axes) for ax, axes in zip(fig.axes, own, strict=True)]
        for fig, own in zip(figures, found, strict=True)
    ]
    seen = Counter(m for frame in marks for m in {m for own in frame for m in own})
    kept = []  # per frame, the marks that not every frame has
    for frame in marks:
        kept.append([[m for m in own if seen[m] < len(figures)] for own in frame])
    crowded = {k for frame in kept for k, own in enumerate(frame) if len(own) > MOST}
    table: dict[Mark, int] = {}
    places: dict[tuple, int] = {}
    frames = []
    for frame, own in zip(kept, found, strict=True):
        axes = [places.setdefault(key, len(places)) for key in own]
        numbers = [
            table.setdefault(mark, len(table))
            for k, several in enumerate(frame)
            if k not in crowded
            for mark in dict.fromkeys(several)
        ]
        frames.append((axes, numbers))
    rows = [(places[mark.axes], mark.path, mark.color) for mark in table]
    result = Traces(rows, frames)
    n = range(len(figures))
    return result if any(result.between(a, b) for a in n for b in n) else None


def _axes_of(ax: Any) -> tuple:
    """What must be the same in two frames, or a mark of one says nothing in the other.

    The place is in CSS pixels.
    """
    scale = SHOWN_DPI / ax.figure.dpi
    place = tuple(round(scale * v) for v in ax.bbox.extents)
    labels = [t.get_text() for t in (*ax.get_xticklabels(), *ax.get_yticklabels())]
    kinds = (ax.get_xscale(), ax.get_yscale())
    limits = (*ax.get_xlim(), *ax.get_ylim())
    return place, tuple(round(float(v), 9) for v in limits), kinds, tuple(labels)


def _marks(ax: Any, axes: tuple) -> list[Mark]:
    """The lines, bars and dots of one axes; none where it shows a picture or a text."""
    from matplotlib.colors import to_hex

    if not ax.axison or ax.images:
        return []
    found = []
    for line in ax.lines:
        color = to_hex(line.get_color())
        if line.get_linestyle() not in ("None", "", " "):
            found.append((_outline(line, ax), color))
        elif len(line.get_xdata()) <= POINTS:
            found.append((_dots(line, ax), color))
    for patch in ax.patches:
        color = patch.get_facecolor() if patch.get_fill() else patch.get_edgecolor()
        found.append((_outline(patch, ax), to_hex(color)))
    return [Mark(axes, path, color) for path, color in found if path]


def _outline(artist: Any, ax: Any) -> str:
    """The artist's path inside its axes; '' where it has no length there."""
    # `cleaned` would take the affine part of the transform alone: no logarithm
    path = artist.get_transform().transform_path(artist.get_path())
    path = path.cleaned(remove_nans=True, clip=ax.bbox.extents, simplify=True)
    words = ""
    start = here = (0, 0)
    for vertex, code in zip(path.vertices, path.codes, strict=True):
        if code == STOP:
            break
        to = start if code == CLOSE else _pixel(vertex, ax)
        if code == MOVE:
            start = to
            words += f"M{to[0]} {to[1]}"
        elif to != here:
            words += f"l{to[0] - here[0]} {to[1] - here[1]}"
        here = to
    return words if "l" in words else ""


def _dots(line: Any, ax: Any) -> str:
    """A circle around each of the line's points that lies inside its axes."""
    radius = round(line.get_markersize() * SHOWN_DPI / 144)
    words = ""
    for point in line.get_transform().transform(line.get_xydata()):
        if ax.bbox.contains(*point):
            x, y = _pixel(point, ax)
            arc = f"a{radius} {radius} 0 1 0 "
            words += f"M{x - radius} {y}{arc}{2 * radius} 0{arc}{-2 * radius} 0"
    return words


def _pixel(point: Any, ax: Any) -> tuple[int, int]:
    """A point of the canvas in CSS pixels, from the top left."""
    scale = SHOWN_DPI / ax.figure.dpi
    height = ax.figure.bbox.height
    return round(scale * point[0]), round(scale * (height - point[1]))
