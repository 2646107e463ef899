"""What `llmlab progress` prints: the map of the course, in exercises.

They are counted as START-HERE counts them: right is what was right once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def print_map(data: dict[str, Any], root: Path, out: Console, whole: bool) -> None:
    """Prints the course.

    Args:
        data: of `report.course_as_data`.
        whole: each lesson on a line; otherwise a part in which nothing was begun is one
            line, and so are the lessons that are planned.
    """
    right = 0
    total = 0
    for part in data["parts"]:
        built = [x for x in part["lessons"] if x["exercises"]]
        done = sum(count_right(x) for x in built)
        right += done
        total += sum(len(x["exercises"]) for x in built)
        heading = f"{int(part['part'][:2]):>2}  {part['title']}"
        if whole:
            _print_part(heading, part["lessons"], out)
        elif done or any(x["begun"] for x in built):
            planned = len(part["lessons"]) - len(built)
            if planned:
                heading += f" (and {planned} planned)"
            _print_part(heading, built, out)
        else:
            out.print(f"{heading}: {_summary(part)}", style="dim")
    out.print(
        f"\n{right} of {total} exercises are right;"
        f" {data['points']} of {data['out_of']} points",
        style="bold",
    )
    for words in _next(root):
        out.print(words)


def _print_part(heading: str, lessons: list[dict[str, Any]], out: Console) -> None:
    out.print(heading, style="bold")
    for lesson in lessons:
        out.print(line(lesson), style="" if lesson["exercises"] else "dim")


def count_right(lesson: dict[str, Any]) -> int:
    """How many exercises of a lesson were right once."""
    from llmlab.course.standing import is_right

    return sum(is_right(entry) for entry in lesson["exercises"].values())


def line(lesson: dict[str, Any]) -> str:
    """A lesson as one line: '    05-lora      ●●○○  2 of 4'."""
    topic = lesson["topic"].split("/")[1]
    total = len(lesson["exercises"])
    if not total:
        return f"      {topic:<36}planned"
    right = count_right(lesson)
    dots = "●" * right + "○" * (total - right)
    done = "  done" if right == total else ""
    return f"      {topic:<36}{dots:<6}{right} of {total}{done}"


def _summary(part: dict[str, Any]) -> str:
    """'11 lessons, not begun', '7 lessons, planned'."""
    built = sum(bool(x["exercises"]) for x in part["lessons"])
    planned = len(part["lessons"]) - built
    told = []
    if built:
        told.append(f"{built} {'lesson' if built == 1 else 'lessons'} not begun")
    if planned:
        told.append(f"{planned} planned")
    return ", ".join(told)


def _next(root: Path) -> list[str]:
    """What to do next."""
    from llmlab.course.standing import first_open, following

    lesson = following(root)
    if lesson is None:
        return ["Every exercise of the course is right."]
    name = first_open(lesson, root)
    where = f"{lesson.title}, {lesson.work(root).relative_to(root)}"
    if name is None:  # its checks pass in the notebook, but nobody marked it
        return [f"next: `llmlab check {lesson.short}` marks what you solved in {where}"]
    return [f"next: {name} of {where}, then `llmlab check {lesson.short}`"]
