"""`llmlab new TOPIC`: all files of a lesson that the syllabus names, with TODO where an
author is wanted.

What is laid out is valid Python, and honest: the tests fail until the places are
filled, and tests/test_house.py fails on any TODO that is left. Nothing that exists is
overwritten.
"""

from __future__ import annotations

from pathlib import Path

from llmlab.course.files import write_atomically
from llmlab.course.syllabus import Lesson

AFTERWARDS = """
Now fill every TODO (`grep -rn TODO` finds them), then:
  make sync                                   runs the notebooks and stores their outputs
  python -m llmlab.course.exercises {slug}    makes the exercise notebook
  make test                                   must be green"""

TEMPLATES = Path(__file__).parent / "data" / "new"

BIB = """\
% References of the lessons of {part}. TODO
"""


def _template(name: str) -> str:
    return (TEMPLATES / f"{name}.py.tmpl").read_text(encoding="utf-8")


def files(lesson: Lesson, root: Path) -> dict[Path, str]:
    """path → the text that it starts with. Shared files (the part's package and
    references) only where they are missing.
    """
    package = root / "llmlab" / lesson.package
    shared = {
        package / "__init__.py": f'"""{lesson.part}."""\n',
        root / "llmlab" / "checks" / lesson.package / "__init__.py": (
            f'"""Checks of {lesson.part}."""\n'
        ),
        root / "tests" / lesson.package / "__init__.py": "",
        root / "tests" / "checks" / lesson.package / "__init__.py": "",
        root / "jupyter-book" / "references" / f"{lesson.part}.bib": BIB,
    }
    own = {
        lesson.notebook(root).with_suffix(".py"): _template("lesson"),
        package / f"{lesson.module}.py": _template("method"),
        root / "llmlab" / "checks" / lesson.package / f"{lesson.module}.py": _template(
            "checks"
        ),
        lesson.solution(root).with_suffix(".py"): _template("solution"),
        root / "tests" / lesson.package / f"test_{lesson.module}.py": _template(
            "tests"
        ),
        root / "tests" / "checks" / lesson.package / f"test_{lesson.module}.py": (
            _template("wrongs")
        ),
    }
    names = {"package": lesson.package, "module": lesson.module, "part": lesson.part}
    words = {
        "slug": lesson.slug,
        "title": lesson.title,
        "teaches": lesson.teaches,
        "aha": lesson.aha,
    }
    own_import = f"from llmlab.{lesson.package} import {lesson.module}"
    imports = {  # in the order that the formatter wants
        "lesson_imports": "\n".join(
            sorted(
                [
                    "from llmlab.course import compare, explore, figure, plt, show",
                    own_import,
                ]
            )
        ),
        "check_imports": "\n".join(
            sorted(
                [
                    (
                        "from llmlab.course.grading.checking import Checks, diagnose,"
                        " expect"
                    ),
                    own_import,
                ]
            )
        ),
    }
    fill = names | words | imports | {"against": lesson.against}
    missing = {path: text for path, text in shared.items() if not path.exists()}
    return {path: text.format(**fill) for path, text in (own | missing).items()}


def scaffold(lesson: Lesson, root: Path) -> list[Path]:
    """Writes all files of `lesson`; none when one of its own is there already.

    Raises:
        FileExistsError: the lesson, or part of it, exists; the message names the files.
    """
    wanted = files(lesson, root)
    there = [str(p.relative_to(root)) for p in wanted if p.exists()]
    if there:
        raise FileExistsError(
            f"{lesson.slug} has been begun, nothing was written: {', '.join(there)}"
        )
    for path, text in wanted.items():
        write_atomically(path, text)
    return list(wanted)
