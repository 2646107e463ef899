"""What to do after full marks: where the worked solution is, and what comes next."""

from __future__ import annotations

from pathlib import Path


def after_check(results: list, root: Path) -> list[str]:
    """The last lines of `llmlab check`, for the lessons that have full marks.

    Args:
        results: `LessonResult`s, one for each lesson that was marked.
    """
    from llmlab.course.syllabus import find

    lines = []
    for result in results:
        if not result.ok:
            continue
        lesson = find(result.topic)
        lines += ["", f"{lesson.title} is done: every exercise is right."]
        lines += solution(lesson, root)
    if lines and all(result.ok for result in results):
        lines += next_lesson(find(results[-1].topic), root)
    return lines


def solution_and_next(lesson, root: Path) -> list[str]:
    """Where the worked solution of a lesson is, and which lesson comes next."""
    return solution(lesson, root) + next_lesson(lesson, root)


def solution(lesson, root: Path) -> list[str]:
    """Where the worked solution is; nothing when the course has none."""
    from llmlab.course.workspace import Kind

    if not Kind.SOLUTION.source(lesson, root).is_file():
        return []
    path = Kind.SOLUTION.copy(lesson, root).relative_to(root)
    how = ""
    if not (root / path).exists():
        how = f" (`llmlab start {lesson.short} --solution` makes it)"
    return [f"  the solution, and why: {path}{how}"]


def next_lesson(lesson, root: Path) -> list[str]:
    """The next lesson with something to do, after `lesson`."""
    from llmlab.course.standing import following

    further = following(root, after=lesson)
    if further is None:
        return ["  next: nothing is left. Every exercise of the course is right."]
    path = further.lesson_copy(root).relative_to(root)
    begin = f"`llmlab lab`, or `llmlab start {further.short}`"
    return [f"  next: {further.title}, {path} ({begin})"]
