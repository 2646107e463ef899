"""`llmlab release --nbgrader DIR`: the exercises as an nbgrader course.

    DIR/nbgrader_config.py
    DIR/source/<lesson>/<topic>.ipynb      with solutions and hidden tests

nbgrader's generate_assignment takes out the solutions and the hidden tests. A hidden
test runs the same check again with other seeds, read afresh from the package: an answer
that knows the numbers of the open check fails there, and so does a notebook that has
replaced a function of the course. Points are ours, cell by cell.

What a point proves: the student's function passed these checks. The hidden test runs in
the kernel that ran the student's cells, so code that is written to deceive it can. Such
code stands in the submission: a grade that matters needs a look at it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmlab.course import exercises
from llmlab.course.files import write_atomically
from llmlab.course.grading import solutions
from llmlab.course.grading.checking import Checks
from llmlab.course.syllabus import Lesson

CONFIG = """\
# nbgrader's settings for the exercises of llmlab. Run its commands in this folder, in
# an environment with llmlab and nbgrader.
c = get_config()  # noqa: F821
c.CourseDirectory.course_id = "llmlab"
c.ClearSolutions.code_stub = {"python": "raise NotImplementedError"}
c.ExecutePreprocessor.timeout = 120
c.ExecutePreprocessor.interrupt_on_timeout = True
c.ExecutePreprocessor.error_on_timeout = {
    "ename": "Timeout",
    "evalue": "the cell ran too long",
    "traceback": [],
}
"""

OPENING = """\
# Exercises: {title}
{introduction}
1. Replace `raise NotImplementedError` by your code, and run the cell (Shift+Enter).
2. Run the check below it. It says what is wrong with a wrong answer; it never shows the
   right one.
3. Stuck? `check.hint("{first}")` in a new cell shows a first hint, and a further
   one each time.

Your submission is marked by these checks, and by the same checks on other inputs."""

HIDDEN = """\
{source}
### BEGIN HIDDEN TESTS
marking = __import__("runpy").run_module("llmlab.course.grading.marking")
marking["hidden"]({module!r}, {exercise!r}, *{answers})
### END HIDDEN TESTS"""

AFTERWARDS = """
In {folder}, with nbgrader installed (for a lesson named LESSON):
  nbgrader generate_assignment LESSON --create    makes release/, what students get
  nbgrader autograde LESSON                       marks submitted/STUDENT/LESSON/
  nbgrader generate_feedback LESSON               writes feedback/
The tests run in the student's own kernel. They find mistakes, not every deceit: look at
what you give grades for."""


def assignment(lesson: Lesson) -> str:
    """nbgrader's name for a lesson: '04-peft-05-lora'."""
    return lesson.slug.replace("/", "-")


def source_notebook(lesson: Lesson, root: Path) -> Any:
    """nbgrader's source version: solved, with hidden tests, without explanations."""
    import nbformat.v4 as v4

    solution = solutions.read_solution(lesson, root)
    check = solutions.load_check(lesson)
    exercises.validate(lesson, solution, check)
    introduction, cells = exercises.introduced(solution)
    opening = OPENING.format(
        title=lesson.title,
        introduction=f"\n{introduction}\n" if introduction else "",
        first=next(iter(check.exercises)),
    )
    out = [v4.new_markdown_cell(opening, id="how-this-works")]
    out += [_cell(c, lesson, check) for c in cells]
    metadata = {"kernelspec": exercises.KERNEL, "language_info": {"name": "python"}}
    return v4.new_notebook(cells=out, metadata=metadata)


def _cell(cell: Any, lesson: Lesson, check: Checks) -> Any:
    made = exercises.unsolved(cell, check)
    if solutions.has(cell, "exercise"):
        made.source = cell.source
        for mark in (solutions.BEGIN, solutions.END):
            made.source = made.source.replace(mark, "##" + mark)  # as nbgrader has it
    elif solutions.has(cell, "check"):
        made.source = HIDDEN.format(
            source=cell.source,
            module=f"llmlab.checks.{lesson.package}.{lesson.module}",
            exercise=solutions.checked_name(cell.source),
            answers=solutions.answers_expression(cell.source),
        )
    return made


def release(folder: Path, root: Path, chosen: list[Lesson] | None = None) -> list[Path]:
    """Writes the course folder.

    A configuration that is there stays; the lessons are written anew.

    Raises:
        OSError: the folder cannot be written.
        ValueError: a solution does not have the form that exercises need.
    """
    made = []
    config = folder / "nbgrader_config.py"
    if not config.exists():
        write_atomically(config, CONFIG)
        made.append(config)
    for lesson in chosen or exercises.solved_lessons(root):
        path = folder / "source" / assignment(lesson) / f"{lesson.topic}.ipynb"
        write_atomically(path, exercises.as_text(source_notebook(lesson, root)))
        made.append(path)
    return made
