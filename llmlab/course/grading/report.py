"""What `llmlab check` and `llmlab progress` tell: tables for people, JSON and JUnit for
machines.

`llmlab check --json` (the schema only grows within a number):

    {"schema": "llmlab.check/1", "course": "0.1.0", "checked":
    "2026-11-24T09:30:00+00:00", "ok": false, "points": 3, "out_of": 5,
     "lessons": [{"topic": "04-peft/05-lora", "title": "LoRA", "notebook":
     "work/04-peft/05-lora.ipynb", "version": "6fd1c0…",
                  "problem": "", "notes": [], "seconds": 9.1, "points": 3, "out_of": 5,
                  "exercises": [{"name": "lora_forward", "outcome": "right", "points":
                  2, "out_of": 2,
                                 "message": "", "detail": "", "next": ""}, …]}]}

outcomes: right, wrong, error, not done, missing, timeout, died, tampered, not reached,
check edited, check missing, unreadable.

`llmlab progress --json`:

    {"schema": "llmlab.course/1", "points": 5, "out_of": 40, "parts": [{"part":
    "01-start", "title": "Start here", "lessons":
      [{"topic": …, "title": …, "built": true, "started": true, "points": 5, "out_of":
      5, "exercises": {name: entry of the record}}]}]}
"""

from __future__ import annotations

import json
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


def console(error: bool = False) -> Console:
    """Colours on a terminal, plain lines in a pipe."""
    from rich.console import Console

    plain = Console(
        stderr=error, highlight=False, markup=False, emoji=False, soft_wrap=True
    )
    return (
        plain
        if plain.is_terminal
        else Console(
            stderr=error, highlight=False, markup=False, width=160, soft_wrap=True
        )
    )


def check_as_data(results: list[LessonResult]) -> dict[str, Any]:
    """The data of `llmlab check --json`."""
    lessons_data = [
        asdict(r) | {"points": r.points, "out_of": r.out_of, "ok": r.ok}
        for r in results
    ]
    total = {
        "points": sum(r.points for r in results),
        "out_of": sum(r.out_of for r in results),
    }
    head = {
        "schema": "llmlab.check/1",
        "course": version("llmlab"),
        "checked": now(),
        "ok": all(r.ok for r in results),
    }
    return head | total | {"lessons": lessons_data}


def check_as_junit(results: list[LessonResult]) -> str:
    """The XML of `llmlab check --junit`: a suite per lesson, a case per exercise; not
    done counts as a failure.
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
        for e in lesson.exercises:
            case = ElementTree.SubElement(
                suite, "testcase", classname=lesson.topic.replace("/", "."), name=e.name
            )
            if e.outcome != "right":
                failure = ElementTree.SubElement(
                    case,
                    "failure",
                    type=e.outcome,
                    message=_xml(e.message or lesson.problem),
                )
                failure.text = _xml(
                    "\n".join(
                        filter(
                            None,
                            [e.message or lesson.problem, e.detail, f"next: {e.next}"],
                        )
                    )
                )
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _xml(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return "".join(
        c
        for c in text
        if c in "\t\n"
        or " " <= c < "\ud800"
        or "\ue000" <= c < "\ufffe"
        or c > "\uffff"
    )


def print_check(results: list[LessonResult], out: Console) -> None:
    """A table per lesson (exercise, verdict, points, next step), and the diagnoses
    under it.
    """
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
    points, out_of = sum(r.points for r in results), sum(r.out_of for r in results)
    out.print(f"\n{points} of {out_of} points", style="bold")


def _print_detail(detail: str, out: Console) -> None:
    for line in detail.splitlines():
        out.print(f"    {line}", style="dim")


def _table(lesson: LessonResult, out: Console) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD if out.is_terminal else None, pad_edge=out.is_terminal
    )
    for name in ("exercise", "verdict", "points", "next step"):
        table.add_column(
            name,
            no_wrap=name != "next step",
            justify="right" if name == "points" else "left",
            overflow="fold",
        )
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
    parts = [
        {
            "part": part,
            "title": title,
            "lessons": [_lesson(x, root, record) for x in lessons() if x.part == part],
        }
        for part, title in PARTS.items()
    ]
    total = {
        k: sum(x[k] for p in parts for x in p["lessons"]) for k in ("points", "out_of")
    }
    return {"schema": "llmlab.course/1"} | total | {"parts": parts}, warning


def _lesson(lesson: Any, root: Path, record: dict[str, Any]) -> dict[str, Any]:
    from llmlab.course.grading.graded_copy import pristine_checks

    path = lesson.exercise(root)
    out_of = (
        {name: check.points for name, check in pristine_checks(path).items()}
        if path.is_file()
        else {}
    )
    entries = {
        name: record["lessons"].get(lesson.slug, {}).get(name, {}) for name in out_of
    }
    points = sum(min(_number(e.get("points")), out_of[n]) for n, e in entries.items())
    state = {"built": lesson.is_built(root), "started": lesson.work(root).exists()}
    numbers = {"points": points, "out_of": sum(out_of.values()), "exercises": entries}
    return {"topic": lesson.slug, "title": lesson.title} | state | numbers


def _number(x: Any) -> int:
    return x if isinstance(x, int) and x > 0 else 0


def print_course(data: dict[str, Any], out: Console) -> None:
    """The map of the course: each lesson with its points as dots; planned lessons
    dimmed.
    """
    from rich.text import Text

    for part in data["parts"]:
        built = sum(x["built"] for x in part["lessons"])
        out.print(
            f"\n{part['part'][:2]}  {part['title']}", style="bold" if built else "dim"
        )
        for x in part["lessons"]:
            line = Text(f"    {x['topic'].split('/')[1]:<38}")
            if not x["built"] and not x["out_of"]:
                line.append("planned")
                line.stylize("dim")
            else:
                done = x["out_of"] and x["points"] == x["out_of"]
                line.append(
                    "●" * x["points"] + "○" * (x["out_of"] - x["points"]),
                    style="green" if done else "",
                )
                line.append(
                    f"  {x['points']}/{x['out_of']}"
                    + ("  done" if done else "" if x["started"] else "  not begun")
                )
            out.print(line)
    out.print(f"\n{data['points']} of {data['out_of']} points", style="bold")
    following = next(
        (
            x
            for p in data["parts"]
            for x in p["lessons"]
            if x["built"] and x["points"] < x["out_of"]
        ),
        None,
    )
    if following:
        out.print(
            f"next: notebooks/{following['topic']}.ipynb, then `llmlab check"
            f" {following['topic']}`"
        )


def as_json(data: dict[str, Any]) -> str:
    """As it is written to a file."""
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"
