"""The line on top of a lesson: what it needs, how long it takes, what it costs to run.

It stands in the notebook and not in its script, since half of it is measured: `make
sync` writes it anew after each run.
"""

from __future__ import annotations

import math
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from llmlab.course.syllabus import Lesson, lessons, notes

if TYPE_CHECKING:
    from nbformat import NotebookNode

ID = "header"
WORDS = 170  # per minute, of a text that one has to think about
LINES = 12  # of visible code per minute
MINUTES = re.compile(r"[●○]{5} importance · (\d+) minutes?")


def all_needs() -> dict[str, tuple[str, ...]]:
    """lesson → the lessons that its reader should know."""
    return {slug: tuple(text.split()) for slug, text in notes("needs.csv").items()}


def needs(lesson: Lesson) -> list[Lesson]:
    """The lessons that the reader of this one should know.

    Raises:
        ValueError: data/needs.csv has no row for the lesson, or names one that is not
            in the syllabus.
    """
    if lesson.slug not in all_needs():
        raise ValueError(f"data/needs.csv has no row for {lesson.slug}")
    by_slug = {x.slug: x for x in lessons()}
    wanted = all_needs()[lesson.slug]
    if unknown := [slug for slug in wanted if slug not in by_slug]:
        raise ValueError(
            f"data/needs.csv: {lesson.slug} needs {', '.join(unknown)}, which is not in"
            " the syllabus"
        )
    return [by_slug[slug] for slug in wanted]


def reading_minutes(nb: NotebookNode) -> int:
    """How long a lesson takes to read, in minutes, rounded up to five."""
    words = 0
    lines = 0
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            words += len(cell.source.split())
        elif not {"hide-input", "hide-cell"} & set(cell.metadata.get("tags", [])):
            lines += len([line for line in cell.source.splitlines() if line.strip()])
    return up(words / WORDS + lines / LINES, 5)


def exercise_minutes(exercise: Path) -> int:
    """What the headers of an exercise notebook add up to; 0 where there is none."""
    if not exercise.is_file():
        return 0
    import nbformat

    nb = nbformat.read(exercise, as_version=4)
    text = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    return sum(map(int, MINUTES.findall(text)))


def header(lesson: Lesson, nb: NotebookNode, run: dict, root: Path) -> str:
    """The line, in Markdown.

    Args:
        lesson: whose line it is.
        nb: the lesson.
        run: its last run, as in verified.json: seconds, and GiB of memory.
        root: the course's folder.
    """
    here = posixpath.dirname(lesson.slug)
    links = []
    for other in needs(lesson):
        target = posixpath.relpath(f"{other.slug}.ipynb", here)
        links.append(f"[{other.title}]({target})")
    before = ", ".join(links) if links else "nothing"
    time = f"{reading_minutes(nb)} minutes to read"
    if exercises := exercise_minutes(lesson.exercise(root)):
        time += f", {exercises} of exercises"
    seconds = up(run["seconds"], 5)
    memory = up(2 * run["memory_gib"], 1) / 2
    return (
        f"**You need** {before} · **It takes** {time} ·"
        f" **It runs in** {seconds} seconds and {memory:g} GiB"
    )


def put(nb: NotebookNode, lesson: Lesson, run: dict, root: Path) -> None:
    """Puts the line below the lesson's title, in place of the one that was there."""
    from nbformat.v4 import new_markdown_cell

    nb.cells = [cell for cell in nb.cells if cell.get("id") != ID]
    line = new_markdown_cell(header(lesson, nb, run, root), id=ID)
    nb.cells.insert(1, line)


def up(value: float, step: int) -> int:
    """The next multiple of `step`, but at least one."""
    return max(1, math.ceil(value / step)) * step
