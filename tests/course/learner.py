"""A small course on disk, with a learner's notebooks in it, for the tests."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

from llmlab.course import exercises
from llmlab.course.syllabus import Lesson, course_root, find

ROOT = course_root(Path(__file__).parent)
WELCOME: Lesson = find("01-welcome")
NAMES = ("weight_bytes", "tokens_per_second", "softmax")


def course(folder: Path) -> Path:
    """A course of one lesson in `folder`: lesson, solution and exercise of Welcome."""
    for path in (WELCOME.solution(ROOT).with_suffix(".py"), WELCOME.exercise(ROOT)):
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    lesson = WELCOME.notebook(folder).with_suffix(".py")
    lesson.parent.mkdir(parents=True)
    lesson.write_text("# %% [markdown]\n# # Welcome\n")
    (folder / "pyproject.toml").write_text("[project]\n")
    return folder


@cache
def solved_sources() -> dict[str, str]:
    """exercise → the solution's code."""
    cells = exercises.read_solution(WELCOME, ROOT).cells
    return {
        c.id.removeprefix("exercise-"): c.source
        for c in cells
        if c.id.startswith("exercise-")
    }


def notebook(
    *solved: str,
    change: Callable[[list[dict]], None] | None = None,
    answers: dict[str, str] | None = None,
) -> dict:
    """The exercise notebook of Welcome with some exercises solved.

    `change` is then applied to its cells.
    """
    nb = copy.deepcopy(json.loads(WELCOME.exercise(ROOT).read_text(encoding="utf-8")))
    sources = {name: solved_sources()[name] for name in solved} | (answers or {})
    for name, source in sources.items():
        cell(nb["cells"], f"exercise-{name}")["source"] = source
    if change:
        change(nb["cells"])
    return nb


def cell(cells: list[dict], name: str) -> dict:
    """The cell with an id."""
    return next(c for c in cells if c["id"] == name)


def index(cells: list[dict], name: str) -> int:
    """The place of the cell with an id."""
    return cells.index(cell(cells, name))


def code(source: str, name: str = "mine") -> dict:
    """A cell of the learner's own."""
    return {
        "cell_type": "code",
        "id": name,
        "metadata": {},
        "source": source,
        "outputs": [],
        "execution_count": None,
    }
