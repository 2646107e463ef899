"""The rooms of the package and who imports whom, read from the imports themselves.

A room is a folder or a file directly under a part: `llmlab/peft/lora/`,
`llmlab/peft/bitfit.py`. The contributor page draws each part as a list of rooms with an
arc for every import; `tests/test_house.py` holds the arcs to what is allowed.
"""

from __future__ import annotations

import ast
from functools import cache
from html import escape
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2]
DRAWN = ("parallelism", "peft", "models", "course")

ROW = 22  # height of a line of text, in pixels
LETTER = 7.2  # width of a letter, in pixels
REACH = 9  # how far an arc swings out for each row that it spans, in pixels
WIDEST = 110  # the most that an arc swings out


@cache
def imported(path: Path) -> frozenset[str]:
    """The dotted names of the package's modules that a file imports, anywhere in it.

    `from package import module` counts as that module where it is one.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if is_module(inner) else node.module)
    return frozenset(n for n in found if n.split(".")[0] == PACKAGE.name)


def is_module(name: str) -> bool:
    """Whether a dotted name of this package is a file or a folder of it."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def rooms(part: str) -> dict[str, list[Path]]:
    """Each room of a part with its files, by name."""
    found = {}
    for path in sorted((PACKAGE / part).iterdir()):
        if path.is_dir() and (path / "__init__.py").is_file():
            found[path.name] = sorted(path.rglob("*.py"))
        elif path.suffix == ".py" and path.stem != "__init__":
            found[path.stem] = [path]
    return found


def arrows(part: str) -> dict[str, set[str]]:
    """For each room of a part, the other rooms of that part that it imports."""
    inside = rooms(part)
    found = {}
    for name, paths in inside.items():
        names = set().union(*(imported(path) for path in paths))
        parts = (module.split(".") for module in names)
        used = {words[2] for words in parts if words[1:2] == [part] and len(words) > 2}
        found[name] = (used & set(inside)) - {name}
    return found


def floors(part: str) -> list[list[str]]:
    """The rooms of a part from the top floor to the ground.

    A room stands one floor above the highest room that it imports.

    Raises:
        ValueError: some rooms import each other in a circle.
    """
    uses = arrows(part)
    height: dict[str, int] = {}
    while len(height) < len(uses):
        ready = [
            room for room in uses if room not in height and uses[room] <= set(height)
        ]
        if not ready:
            left = sorted(set(uses) - set(height))
            raise ValueError(f"these rooms of {part} import each other: {left}")
        for room in ready:
            below = [height[other] for other in uses[room]]
            height[room] = 1 + max(below, default=-1)
    top = max(height.values())
    return [
        sorted(room for room in uses if height[room] == floor)
        for floor in range(top, -1, -1)
    ]


def direct(uses: dict[str, set[str]]) -> dict[str, set[str]]:
    """Those arrows that no way over another room replaces."""
    reach: dict[str, set[str]] = {}

    def below(room: str) -> set[str]:
        """All rooms that can be reached from this one."""
        if room not in reach:
            reach[room] = set(uses[room]).union(*(below(x) for x in uses[room]))
        return reach[room]

    return {
        room: {x for x in others if not any(x in below(y) for y in others)}
        for room, others in uses.items()
    }


def picture(part: str) -> str:
    """One part as an SVG: a line of text for each room, an arc for each import.

    An arc that follows from others is left out: who imports B, which imports C, may
    import C as well.
    """
    uses = direct(arrows(part))
    order = [room for floor in floors(part) for room in floor]
    row = {room: i for i, room in enumerate(order)}
    edge = 8 + LETTER * max(len(room) for room in order)
    lines = []
    for floor in floors(part)[1:]:
        y = row[floor[0]] * ROW
        lines.append(f'<line x1="0" x2="{edge:.0f}" y1="{y}" y2="{y}"/>')
    for room, others in uses.items():
        for other in sorted(others, key=row.get):
            lines.append(arc(edge, row[room], row[other]))
    for room in order:
        y = row[room] * ROW + 15
        lines.append(f'<text x="2" y="{y}">{escape(room)}</text>')
    width, height = edge + WIDEST + 6, len(order) * ROW
    return (
        f'<svg role="img" aria-label="{escape(sentence(part))}"'
        f' viewBox="0 0 {width:.0f} {height}" width="{width:.0f}">'
        f"{''.join(lines)}</svg>"
    )


def arc(x: float, start: int, end: int) -> str:
    """A curve right of the names, from one row to a lower one, where it has a dot."""
    y0, y1 = start * ROW + 11, end * ROW + 11
    # A cubic Bézier reaches three quarters of the way to its control points.
    out = x + min(WIDEST, REACH * (end - start)) / 0.75
    return (
        f'<path d="M{x:.0f} {y0} C{out:.0f} {y0} {out:.0f} {y1} {x:.0f} {y1}"/>'
        f'<circle cx="{x:.0f}" cy="{y1}" r="2.5"/>'
    )


def sentence(part: str) -> str:
    """The picture in words."""
    told = [
        f"{room} imports {', '.join(sorted(others))}"
        for room, others in sorted(arrows(part).items())
        if others
    ]
    return f"Rooms of {part}: {'; '.join(told)}."


def section() -> str:
    """The pictures of all drawn parts, as HTML for the contributor page."""
    figures = [
        f"<figure><figcaption><code>llmlab/{part}/</code></figcaption>"
        f"{picture(part)}</figure>"
        for part in DRAWN
    ]
    return f'<div class="rooms">\n{"".join(figures)}\n</div>'
