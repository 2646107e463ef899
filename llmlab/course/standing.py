"""Where a learner stands: what is right, what was begun, and what comes next.

An exercise counts as right once `llmlab check` has found it right, whatever became of
it later. START-HERE, `llmlab progress`, `llmlab hint` and the last lines of `llmlab
check` all count so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmlab.course import progress
from llmlab.course.grading.graded_copy import Unreadable, read_notebook
from llmlab.course.grading.solutions import checked_name
from llmlab.course.syllabus import Lesson, lessons


@dataclass(frozen=True)
class Standing:
    """What became of the exercises of one lesson.

    Attributes:
        right: the exercises that were right once, in the order of the notebook.
        open: the others.
    """

    lesson: Lesson
    right: tuple[str, ...]
    open: tuple[str, ...]

    @property
    def total(self) -> int:
        """How many exercises the lesson has."""
        return len(self.right) + len(self.open)

    @property
    def is_done(self) -> bool:
        """Whether there are exercises, and all were right."""
        return bool(self.right) and not self.open


def standing(lesson: Lesson, root: Path, record: dict[str, Any]) -> Standing:
    """How far a lesson is, by the record of progress."""
    entries = record["lessons"].get(lesson.slug, {})
    right = []
    still_open = []
    for name in exercise_names(lesson, root):
        was_right = is_right(entries.get(name, {}))
        (right if was_right else still_open).append(name)
    return Standing(lesson, tuple(right), tuple(still_open))


def is_right(entry: dict[str, Any]) -> bool:
    """Whether an exercise's entry in the record says that it was right once."""
    return entry.get("outcome") == "right" or "first_right" in entry


def exercise_names(lesson: Lesson, root: Path) -> list[str]:
    """The exercises of a lesson, in order; none for a lesson that is planned."""
    try:
        cells = read_notebook(lesson.exercise(root))["cells"]
    except Unreadable:
        return []
    checks = [c for c in cells if "check" in c["metadata"].get("tags", [])]
    return [name for c in checks if (name := checked_name(c["source"]))]


def first_open(lesson: Lesson, root: Path) -> str | None:
    """The first exercise that is not right yet.

    One that was not marked yet, but whose check cell shows "right" in the learner's
    saved copy, is passed over. None: all are right.
    """
    record, _ = progress.load(root)
    passed = passed_in_notebook(lesson, root)
    for name in standing(lesson, root, record).open:
        if name not in passed:
            return name
    return None


def passed_in_notebook(lesson: Lesson, root: Path) -> set[str]:
    """The exercises whose check cell shows "right" in the learner's saved copy."""
    try:
        cells = read_notebook(lesson.work(root))["cells"]
    except Unreadable:
        return set()
    passed = set()
    for cell in cells:
        name = checked_name(cell["source"])
        if name and f"✓ {name}: right" in _printed(cell):
            passed.add(name)
    return passed


def _printed(cell: dict[str, Any]) -> str:
    """What a cell printed when it last ran."""
    out = []
    for output in cell.get("outputs") or []:
        text = output.get("text", "") if isinstance(output, dict) else ""
        out.append("".join(map(str, text)))
    return "".join(out)


def following(root: Path, after: Lesson | None = None) -> Lesson | None:
    """The next lesson with an exercise that is not right yet; None when all are.

    Lessons after `after` come first, then those before it.
    """
    record, _ = progress.load(root)
    order = list(lessons())
    if after is not None:
        place = order.index(after) + 1
        order = order[place:] + order[:place]
    for lesson in order:
        if lesson.is_built(root) and standing(lesson, root, record).open:
            return lesson
    return None
