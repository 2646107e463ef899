"""`llmlab new TOPIC`: all files of a lesson, with TODO where an author is wanted.

What is laid out is valid Python, and honest: the tests fail until the places are
filled, and tests/test_house.py fails on any TODO that is left. Nothing that exists is
overwritten.
"""

from __future__ import annotations

from pathlib import Path

from llmlab.course.files import write_atomically
from llmlab.course.syllabus import Lesson

AFTERWARDS = """
Now fill every TODO (`grep -rn TODO` finds them), and give the lesson a row in
llmlab/course/data/needs.csv: the lessons that its reader should know. Then:
  make sync         runs the notebooks and stores their outputs
  make exercises    makes the exercise notebook
  make test         must be green"""

TEMPLATES = Path(__file__).parent / "data" / "new"

BIB = """\
% References of the lessons of {part}. TODO
"""


def template(name: str) -> str:
    """The text of a file that a lesson begins with, its names still in braces."""
    return (TEMPLATES / f"{name}.py.tmpl").read_text(encoding="utf-8")


def files(lesson: Lesson, root: Path, room: bool = False) -> dict[Path, str]:
    """path → the text that it starts with.

    Files that lessons share (the part's package and references) come only where
    they are missing.

    Args:
        room: the method gets a folder instead of a file, and so do its tests.
    """
    part, module = lesson.package, lesson.module
    package, checks = root / "llmlab" / part, root / "llmlab" / "checks" / part
    tests, wrongs = root / "tests" / part, root / "tests" / "checks" / part
    shared = {
        package / "__init__.py": f'"""{lesson.part}."""\n',
        checks / "__init__.py": f'"""Checks of {lesson.part}."""\n',
        tests / "__init__.py": "",
        wrongs / "__init__.py": "",
        root / "jupyter-book" / "references" / f"{lesson.part}.bib": BIB,
    }
    own = {
        lesson.notebook(root).with_suffix(".py"): template("lesson"),
        lesson.solution(root).with_suffix(".py"): template("solution"),
        checks / f"{module}.py": template("checks"),
        wrongs / f"test_{module}.py": template("wrongs"),
    }
    home, tests_home, where = package, tests, f"llmlab.{part}"
    if room:
        home, tests_home = package / module, tests / module
        where = f"llmlab.{part}.{module}"
        own[home / "__init__.py"] = template("room")
        own[tests_home / "__init__.py"] = ""
    own[home / f"{module}.py"] = template("method")
    own[tests_home / f"test_{module}.py"] = template("tests")

    fill = {"slug": lesson.slug, "part": lesson.part, "package": part, "module": module}
    fill |= {"title": lesson.title, "teaches": lesson.teaches, "aha": lesson.aha}
    fill |= {"against": lesson.against, "where": where}
    own_import = f"from {where} import {module}"
    fill["lesson_imports"] = in_order(
        f"from llmlab.checks.{part}.{module} import check",
        "from llmlab.course import"
        " compare, explore, figure, plt, predict, show, your_turn",
        own_import,
    )
    fill["check_imports"] = in_order(
        "from llmlab.course.grading.checking import Checks, diagnose, expect",
        own_import,
    )
    missing = {path: text for path, text in shared.items() if not path.exists()}
    return {path: text.format(**fill) for path, text in (own | missing).items()}


def in_order(*imports: str) -> str:
    """Import lines in the order that the formatter wants."""
    return "\n".join(sorted(imports))


def scaffold(lesson: Lesson, root: Path, room: bool = False) -> list[Path]:
    """Writes all files of `lesson`; none when one of its own is there already.

    With `room`, the method is a folder.

    Raises:
        FileExistsError: the lesson, or part of it, exists; the message names the files.
    """
    wanted = files(lesson, root, room)
    there = [str(p.relative_to(root)) for p in wanted if p.exists()]
    if there:
        raise FileExistsError(
            f"{lesson.slug} has been begun, nothing was written: {', '.join(there)}"
        )
    for path, text in wanted.items():
        write_atomically(path, text)
    return list(wanted)
