"""What `llmlab check` and `llmlab progress` print: tables, JSON and JUnit.

`llmlab check --json` (the schema only grows within a number):

    {"schema": "llmlab.check/1", "course": "0.1.0",
     "checked": "2026-11-24T09:30:00+00:00",
     "ok": false, "points": 3, "out_of": 5,
     "lessons": [{"topic": "04-peft/05-lora", "title": "LoRA",
                  "notebook": "work/04-peft/05-lora.ipynb", "version": "6fd1c0…",
                  "problem": "", "notes": [], "seconds": 9.1,
                  "points": 3, "out_of": 5,
                  "exercises": [{"name": "lora_forward", "outcome": "right",
                                 "points": 2, "out_of": 2,
                                 "message": "", "detail": "", "next": ""}, …]}]}

outcomes: right, wrong, error, not done, missing, timeout, died, tampered, not reached,
check edited, check missing, unreadable.

`llmlab progress --json`:

    {"schema": "llmlab.course/1", "points": 5, "out_of": 40,
     "parts": [{"part": "01-start", "title": "Start here",
                "lessons": [{"topic": …, "title": …, "built": true, "started": true,
                             "points": 5, "out_of": 5,
                             "exercises": {name: entry of the record}}]}]}
"""

from __future__ import annotations

import codecs
import json
import os
import re
import sys
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from llmlab.course.progress import load, now
from llmlab.course.syllabus import PARTS, lessons

if TYPE_CHECKING:
    from rich.console import Console

    from llmlab.course.grading.grading import LessonResult

MARKS = {"right": "✓", "not done": "·", "unreadable": "!"}  # all others: ✗
COLORS = {"✓": "green", "·": "dim", "!": "red", "✗": "red"}
# What stands for a sign where the terminal's encoding does not have it.
PLAIN = {
    "✓": "+",
    "✗": "x",
    "·": "-",
    "●": "*",
    "○": ".",
    "−": "-",
    "…": "...",
    "’": "'",
    "“": '"',
    "”": '"',
    "≤": "<=",
    "≥": ">=",
    "→": "->",
}
NOT_IN_XML = re.compile("[^\t\n\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def console(error: bool = False) -> Console:
    """Colours on a terminal, plain lines in a pipe.

    A sign that the encoding lacks, as ✓ in cp1252, is written as a plain one.
    """
    from rich.console import Console

    codecs.register_error("llmlab.plain", _plainly)
    stream = sys.stderr if error else sys.stdout
    with suppress(AttributeError, ValueError):  # a stream that is not a file
        stream.reconfigure(errors="llmlab.plain")
    plain = Console(
        stderr=error, highlight=False, markup=False, emoji=False, soft_wrap=True
    )
    if plain.is_terminal:
        return plain
    return Console(
        stderr=error, highlight=False, markup=False, width=160, soft_wrap=True
    )


def _plainly(error: UnicodeError) -> tuple[str, int]:
    """Handles what cannot be encoded: (what to write instead, where to go on)."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(c, "?") for c in text), error.end


def check_as_data(results: list[LessonResult]) -> dict[str, Any]:
    """The data of `llmlab check --json`."""
    own = []
    for r in results:
        own.append(asdict(r) | {"points": r.points, "out_of": r.out_of, "ok": r.ok})
    return {
        "schema": "llmlab.check/1",
        "course": version("llmlab"),
        "checked": now(),
        "ok": all(r.ok for r in results),
        "points": sum(r.points for r in results),
        "out_of": sum(r.out_of for r in results),
        "lessons": own,
    }


def check_as_junit(results: list[LessonResult]) -> str:
    """The XML of `llmlab check --junit`: a suite per lesson, a case per exercise.

    An exercise that is not done counts as a failure.
    """
    suites = ElementTree.Element("testsuites", name="llmlab check")
    for lesson in results:
        failures = sum(e.outcome != "right" for e in lesson.exercises)
        suite = ElementTree.SubElement(
            suites,
            "testsuite",
            name=lesson.topic,
            tests=str(len(lesson.exercises)),
            failures=str(failures),
            errors="0",
            skipped="0",
            time=str(lesson.seconds),
        )
        classname = lesson.topic.replace("/", ".")
        for e in lesson.exercises:
            case = ElementTree.SubElement(
                suite, "testcase", classname=classname, name=e.name
            )
            if e.outcome != "right":
                message = e.message or lesson.problem
                failure = ElementTree.SubElement(
                    case, "failure", type=e.outcome, message=_xml(message)
                )
                lines = [message, e.detail, f"next: {e.next}"]
                failure.text = _xml("\n".join(line for line in lines if line))
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _xml(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return NOT_IN_XML.sub("", text)


def print_check(results: list[LessonResult], out: Console) -> None:
    """Prints a table per lesson, and the diagnoses under it.

    Its columns are exercise, verdict, points and next step. When nobody reads on, as in
    `llmlab check | head -1`, it just ends: the marks are still to be written down.
    """
    try:
        _print_lessons(results, out)
    except (OSError, SystemExit):  # rich makes a SystemExit of a closed pipe
        _print_no_more()


def _print_no_more() -> None:
    """Sends what else is printed nowhere, so that the program ends as it would."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _print_lessons(results: list[LessonResult], out: Console) -> None:
    for lesson in results:
        out.print(f"\n{lesson.title}  ({lesson.notebook})", style="bold")
        if lesson.problem:
            out.print(lesson.problem, style="red")
        out.print(_table(lesson, out))
        for e in lesson.exercises:
            if e.message:
                out.print(f"\n{e.name}: {e.message}")
                _print_detail(e.detail, out)
        for note in lesson.notes:
            out.print(f"\nnote: {note}", style="dim")
    points = sum(r.points for r in results)
    out_of = sum(r.out_of for r in results)
    out.print(f"\n{points} of {out_of} points", style="bold")


def _print_detail(detail: str, out: Console) -> None:
    for line in detail.splitlines():
        out.print(f"    {line}", style="dim")


def _table(lesson: LessonResult, out: Console) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    lines = box.SIMPLE_HEAD if out.is_terminal else None
    table = Table(box=lines, pad_edge=out.is_terminal)
    table.add_column("exercise", no_wrap=True, overflow="fold")
    table.add_column("verdict", no_wrap=True, overflow="fold")
    table.add_column("points", no_wrap=True, overflow="fold", justify="right")
    table.add_column("next step", overflow="fold")
    for e in lesson.exercises:
        mark = MARKS.get(e.outcome, "✗")
        table.add_row(
            e.name,
            Text(f"{mark} {e.outcome}", style=COLORS[mark]),
            f"{e.points}/{e.out_of}",
            e.next,
        )
    return table


def course_as_data(root: Path) -> tuple[dict[str, Any], str]:
    """The data of `llmlab progress --json`, and a warning when the record is broken."""
    record, warning = load(root)
    parts = []
    points = 0
    out_of = 0
    for part, title in PARTS.items():
        own = [_lesson(x, root, record) for x in lessons() if x.part == part]
        parts.append({"part": part, "title": title, "lessons": own})
        points += sum(x["points"] for x in own)
        out_of += sum(x["out_of"] for x in own)
    data = {
        "schema": "llmlab.course/1",
        "points": points,
        "out_of": out_of,
        "parts": parts,
    }
    return data, warning


def _lesson(lesson: Any, root: Path, record: dict[str, Any]) -> dict[str, Any]:
    from llmlab.course.grading.graded_copy import pristine_checks

    path = lesson.exercise(root)
    checks = pristine_checks(path) if path.is_file() else {}
    known = record["lessons"].get(lesson.slug, {})
    entries = {name: known.get(name, {}) for name in checks}
    points = 0
    for name, check in checks.items():
        points += min(_number(entries[name].get("points")), check.points)
    return {
        "topic": lesson.slug,
        "title": lesson.title,
        "built": lesson.is_built(root),
        "started": lesson.work(root).exists(),
        "points": points,
        "out_of": sum(check.points for check in checks.values()),
        "exercises": entries,
    }


def _number(x: Any) -> int:
    return x if isinstance(x, int) and x > 0 else 0


def as_json(data: dict[str, Any]) -> str:
    """As it is written to a file."""
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"
