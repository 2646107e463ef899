"""The page that `llmlab lab` opens: what to do, and the lessons with what is done.

It is written to work/START-HERE.md each time, for the course and the learner as they
are then.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llmlab.course import header, progress
from llmlab.course.grading.graded_copy import Unreadable, read_notebook
from llmlab.course.standing import Standing, standing
from llmlab.course.syllabus import PARTS, Lesson, lessons, notes

TEXT = """\
# Start here

Each lesson is a notebook. Open it, then press **Shift+Enter** to run one cell after the
other: guess where it asks you to, move the sliders, read the code.

Then open its exercises. Fill in a cell, run it and the check below it, and you are
told at once what is right and what is not.

All that you open here are your own copies, in the folder `work/`: try things, write
into them, save. Nothing overwrites them, and nothing leaves this machine.

{next}{lessons}
## In a terminal

| File → New → Terminal | |
|---|---|
| `llmlab check` | marks what you wrote and saved, in a fresh kernel |
| `llmlab check lora` | marks the exercises of one lesson |
| `llmlab hint lora` | the next hint for the first exercise that is not right yet |
| `llmlab progress` | the map of the course with what you have done |
| `llmlab reset lora` | a fresh copy of a lesson; yours is kept beside it |
| `llmlab doctor` | when something does not work |

*This page was written when you typed `llmlab lab`; it shows what you had done by then.
Minutes are for reading and, after the plus, for the exercises.*
"""
TAKES = re.compile(r"(\d+) minutes to read(?:, (\d+) of exercises)?")
HEAD = """\
| | lesson | exercises | done | minutes | what comes out | read before |
|---|---|---|---|---|---|---|"""


def landing(root: Path) -> str:
    """The landing page: what to do, and a table of the lessons with what is done."""
    record, _ = progress.load(root)
    blocks = []
    planned = 0
    first = None  # the first lesson with an exercise that is not right yet
    for number, (part, title) in enumerate(PARTS.items(), 1):
        own = [lesson for lesson in lessons() if lesson.part == part]
        rows = []
        for lesson in own:
            if not lesson.notebook(root).is_file():
                continue
            stands = standing(lesson, root, record)
            rows.append(row(stands, root))
            if first is None and stands.open:
                first = lesson
        planned += len(own) - len(rows)
        blocks.append(_block(f"## {number}. {title}", rows, len(own) - len(rows)))
    if planned:
        blocks.append(f"{planned} more lessons are planned.\n")
    return TEXT.format(next=_next(first), lessons="\n".join(blocks))


def _block(heading: str, rows: list[str], planned: int) -> str:
    """One part of the course; a part without lessons keeps its number."""
    lines = [heading, ""]
    if rows:
        lines += [HEAD, *rows, ""]
    if planned and not rows:
        lines += [f"*Planned: {planned} lessons.*", ""]
    return "\n".join(lines)


def _next(lesson: Lesson | None) -> str:
    if lesson is None:
        return ""
    link = f"[{number(lesson)} {lesson.title}](lessons/{lesson.slug}.lesson.ipynb)"
    return f"**Next: {link}**\n\n"


def row(stands: Standing, root: Path) -> str:
    """One lesson as a line of the table."""
    from llmlab.course.workspace import Kind, new_path

    lesson = stands.lesson
    read = f"[{lesson.title}](lessons/{lesson.slug}.lesson.ipynb)"
    exercise = ""
    if lesson.work(root).is_file():
        exercise = f"[exercises]({lesson.slug}.ipynb)"
    if new_path(lesson, root, Kind.LESSON).is_file():
        read += f", [new version](lessons/{lesson.slug}.lesson.new.ipynb)"
    if new_path(lesson, root, Kind.EXERCISES).is_file():
        exercise += f", [new version]({lesson.slug}.new.ipynb)"
    done = ""
    if stands.total:
        mark = "✓ " if stands.is_done else ""
        done = f"{mark}{len(stands.right)} of {stands.total}"
    on_top = top(lesson, root)
    cells = [number(lesson), read, exercise, done]
    cells += [on_top.minutes, line(lesson), on_top.before]
    return f"| {' | '.join(cells)} |"


def number(lesson: Lesson) -> str:
    """'4.5' for 04-peft/05-lora."""
    return f"{int(lesson.part[:2])}.{int(lesson.topic[:2])}"


def all_lines() -> dict[str, str]:
    """lesson → what comes out of it, in a few words."""
    return notes("lines.csv")


def line(lesson: Lesson) -> str:
    """What comes out of a lesson, in a few words."""
    return all_lines().get(lesson.slug, lesson.teaches)


@dataclass(frozen=True)
class Top:
    """What the line on top of a lesson says; empty where it has none."""

    read: str = ""  # minutes
    exercises: str = ""  # minutes
    needs: tuple[Lesson, ...] = ()

    @property
    def minutes(self) -> str:
        """'15 + 23': minutes to read, and minutes of exercises."""
        return f"{self.read} + {self.exercises}" if self.exercises else self.read

    @property
    def before(self) -> str:
        """Links to the lessons that a reader should know, by their numbers."""
        links = []
        for x in self.needs:
            links.append(f'[{number(x)}](lessons/{x.slug}.lesson.ipynb "{x.title}")')
        return ", ".join(links)


def top(lesson: Lesson, root: Path) -> Top:
    """What the line on top of a lesson says (`llmlab.course.header` writes it)."""
    try:
        cells = read_notebook(lesson.notebook(root))["cells"]
    except Unreadable:
        return Top()
    text = "".join(cell["source"] for cell in cells if cell.get("id") == header.ID)
    takes = TAKES.search(text)
    if takes is None:
        return Top()
    return Top(takes[1], takes[2] or "", tuple(header.needs(lesson)))
