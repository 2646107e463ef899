"""`llmlab check`: runs a learner's notebook in a fresh kernel and marks it.

The notebook runs through nbval; the course's own checks mark it.

A point is earned by one thing only: the check from the course's files, called in the
fresh kernel on the object that the learner's cells left there, saying "right" once, for
its own exercise, with the number that was drawn for it.

What a mark proves: the functions that the notebook defines passed these checks, on the
inputs that the checks drew. It is meant for the learner, and finds mistakes and
accidents. It is no proof against deceit: the verdict is made in the process that ran
the learner's cells, and code in them can change what a check sees or says.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmlab.course.grading.graded_copy import (
    Copy,
    Unreadable,
    lesson_of,
    make_copy,
    pristine_checks,
    read_notebook,
    version_of,
)
from llmlab.course.grading.running import CELL_SECONDS, STOP_SECONDS, run_copy
from llmlab.course.syllabus import Lesson

# A cell that ends the kernel is left out and the rest is run again, up to so many runs.
RUNS = 4

# outcome → the next step, with {topic} and {name}
NEXT = {
    "right": "",
    "wrong": "llmlab hint {topic} {name}",
    "error": "llmlab hint {topic} {name}",
    "not done": "write it; llmlab hint {topic} {name}",
    "missing": "define `{name}` at the top level of a cell",
    "timeout": "find the loop that does not end",
    "died": "take out what ends the kernel",
    "tampered": "take out what replaces the course's code",
    "not reached": "mend the cells before it",
    "check edited": "llmlab start {topic} --restore-checks",
    "check missing": "llmlab start {topic} --restore-checks",
    "unreadable": (
        "mend the file, or move it away: `llmlab start {topic}` makes a fresh one"
    ),
}


@dataclass
class Result:
    """What became of one exercise; `outcome` is a key of NEXT."""

    name: str
    out_of: int
    outcome: str = "not reached"
    points: int = 0
    message: str = ""
    detail: str = ""
    next: str = ""


@dataclass
class LessonResult:
    """What became of one notebook. `problem` is set when it could not be run at all."""

    topic: str
    title: str
    notebook: str
    version: str
    exercises: list[Result]
    problem: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def points(self) -> int:
        """Earned in this run."""
        return sum(r.points for r in self.exercises)

    @property
    def out_of(self) -> int:
        """That there are to earn."""
        return sum(r.out_of for r in self.exercises)

    @property
    def ok(self) -> bool:
        """Whether every exercise is right."""
        return not self.problem and all(r.outcome == "right" for r in self.exercises)


def grade(
    lesson: Lesson,
    root: Path,
    notebook: Path | None = None,
    cell_seconds: float = CELL_SECONDS,
    stop_seconds: float = STOP_SECONDS,
) -> LessonResult:
    """Marks a learner's notebook, by default the copy in work/.

    Nothing that stands in the notebook makes it raise.

    Args:
        cell_seconds: that a cell may take.
        stop_seconds: that a cell which was interrupted has to stop.

    Raises:
        FileNotFoundError: the lesson has no exercises, or there is no such notebook.
    """
    path = notebook or lesson.work(root)
    for wanted in (lesson.exercise(root), path):
        if not wanted.exists():
            raise FileNotFoundError(f"{_shown(wanted, root)} does not exist")
    return _Marking(lesson, root, path, cell_seconds, stop_seconds).run()


def _shown(path: Path, root: Path) -> str:
    path = path.resolve()
    root = root.resolve()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


class _Marking:
    """One notebook on its way to its verdicts."""

    def __init__(
        self,
        lesson: Lesson,
        root: Path,
        path: Path,
        cell_seconds: float,
        stop_seconds: float,
    ) -> None:
        exercise = read_notebook(lesson.exercise(root))
        self.lesson = lesson
        self.path = path
        self.cell_seconds = cell_seconds
        self.stop_seconds = stop_seconds
        self.pristine = pristine_checks(lesson.exercise(root))
        self.results = {
            name: Result(name, check.points) for name, check in self.pristine.items()
        }
        self.out = LessonResult(
            topic=lesson.slug,
            title=lesson.title,
            notebook=_shown(path, root),
            version=exercise["metadata"]["llmlab"]["version"],
            exercises=[*self.results.values()],
        )
        self.marked: set[str] = set()
        # exercise → (status, what its own cell did)
        self.faults: dict[str, tuple[str, str]] = {}
        self.skip: set[int] = set()

    def run(self) -> LessonResult:
        started = time.monotonic()
        try:
            notebook = read_notebook(self.path)
        except Unreadable as error:
            return self._unreadable(str(error))
        other = lesson_of(notebook)
        if other not in (None, self.lesson.slug):
            return self._unreadable(
                f"it holds the exercises of another lesson, {other}: put its own file"
                " back in its place"
            )
        if version_of(notebook) not in (None, self.out.version):
            self.out.notes.append(
                "the course changed these exercises since your copy was made:"
                f" llmlab start {self.lesson.short}"
            )
        for _ in range(RUNS):
            copy = self._copy(notebook)
            record, complaint = run_copy(
                copy.notebook, [*copy.checks], self.cell_seconds, self.stop_seconds
            )
            killer = self._read(record, copy)
            if killer is None:
                break
            # the next run leaves out that cell, and the checks that have a verdict
            self.skip.add(killer)
            for k, name in enumerate(self.pristine):
                if name in self.marked:
                    self.skip.add(-1 - k)
        if complaint and killer is None:
            self.out.notes.append(complaint)
        for name, result in self.results.items():
            self._settle(result, copy.state[name])
        self.out.seconds = round(time.monotonic() - started, 1)
        return self.out

    def _copy(self, notebook: dict[str, Any]) -> Copy:
        module = f"llmlab.checks.{self.lesson.package}.{self.lesson.module}"
        folder = self.path.resolve().parent
        return make_copy(notebook, self.pristine, module, folder, self.skip)

    def _unreadable(self, why: str) -> LessonResult:
        self.out.problem = f"{self.out.notebook} cannot be marked: {why}"
        for result in self.results.values():
            result.outcome = "unreadable"
            result.next = self._next_step(result)
        return self.out

    def _next_step(self, result: Result) -> str:
        return NEXT[result.outcome].format(topic=self.lesson.short, name=result.name)

    def _read(self, record: list[dict[str, Any]], copy: Copy) -> int | None:
        """Takes down what the run recorded; returns the cell that ended the kernel."""
        last = None
        for entry in record:
            index = entry["cell"]
            error = entry.get("error", "")
            if entry["status"] == "died" and error.startswith("Kernel dead"):
                return copy.origin(last)  # it was gone before this cell began
            if index in copy.checks:
                self._take_verdict(self.results[copy.checks[index]], entry)
            elif entry["status"] != "ok":
                self._take_fault(index, entry, copy)
            if entry["status"] == "died" or entry.get("killed"):
                return copy.origin(index)
            last = index
        return None

    def _take_verdict(self, result: Result, entry: dict[str, Any]) -> None:
        verdict = entry["verdict"] or {}
        if entry["status"] == "timeout":
            result.outcome = "timeout"
            result.message = (
                f"its check was stopped after {self.cell_seconds:g} seconds"
            )
        elif entry["status"] == "died":
            result.outcome = "died"
            result.message = "running it ended the kernel"
        elif verdict.get("exercise") != result.name:
            why = entry.get("error", "it was stopped")
            result.outcome = "tampered"
            result.message = f"the check gave no verdict ({why})"
        else:
            result.outcome = verdict["outcome"]
            if result.outcome == "right" and entry["status"] != "ok":
                result.outcome = "tampered"
            result.points = result.out_of if result.outcome == "right" else 0
            result.message = verdict.get("message", "")
            result.detail = verdict.get("detail", "")
        self.marked.add(result.name)

    def _take_fault(self, index: int, entry: dict[str, Any], copy: Copy) -> None:
        cell = f"code cell {copy.theirs.get(index, '?')}"
        if entry["status"] == "timeout":
            did = f"{cell} ran over {self.cell_seconds:g} seconds and was stopped"
        elif entry["status"] == "died":
            did = f"{cell} ended the kernel"
        else:
            did = f"{cell} raised {entry.get('error', 'an error')}"
        note = did.splitlines()[0][:300]
        if entry.get("where"):
            note += f" ({entry['where']})"
        self.out.notes.append(note)
        for name, cells in copy.defined_in.items():
            if index in cells:
                self.faults[name] = entry["status"], did

    def _settle(self, result: Result, state: str) -> None:
        """Says the last word on one exercise.

        It may be the fault of its own cell, or a changed check; then comes the next
        step.
        """
        status, did = self.faults.get(result.name, ("", ""))
        stopped = status in ("timeout", "died")
        if stopped or (status == "error" and result.outcome == "missing"):
            result.outcome = status
            result.message = did
            result.detail = ""
            result.points = 0
        if state != "intact":
            if result.outcome == "right":
                stands = "passes the course's own check"
            else:
                stands = f"is {result.outcome}: {result.message}"
            verb = "changed" if state == "edited" else "removed"
            result.message = (
                f"its check cell was {verb}, so it earns nothing; your answer {stands}"
            )
            result.outcome = f"check {state}"
            result.points = 0
        result.next = self._next_step(result)
