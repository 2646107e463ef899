"""The links of a notebook, made to lead to the same things from its copy in work/.

A link to a lesson, to exercises or to a solution leads to the learner's own copy of it,
so that whatever is reached by links is safe to run and to save.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from llmlab.course.syllabus import lessons

# What may stand before and after a target: [text](target "title"), [name]: target,
# <a href="target">, <img src='target'>.
LINK = re.compile(
    r"""(?P<before>\]\(\s*<?|^[ ]{0,3}\[[^\]\n]+\]:[ \t]*<?|\b(?:href|src)=["'])"""
    r"""(?P<target>[^\s<>"')]+)""",
    re.MULTILINE,
)
ELSEWHERE = re.compile(r"[a-zA-Z][\w+.-]*:|//|#|/")


def links_of(cells: list[dict[str, Any]]) -> Iterator[str]:
    """The targets in the Markdown cells that are files of the course, in order."""
    for cell in cells:
        if cell["cell_type"] == "markdown":
            for match in LINK.finditer("".join(cell["source"])):
                if not ELSEWHERE.match(match["target"]):
                    yield match["target"]


def with_links_of_a_copy(source: str, notebook: Path, copy: Path, root: Path) -> str:
    """A Markdown cell of `notebook`, as it has to read in `copy`.

    Args:
        notebook: the course's file that the cell is from.
        copy: where its copy lies, or will lie.
    """
    copies = _copies(root)

    def moved(match: re.Match[str]) -> str:
        target = match["target"]
        if ELSEWHERE.match(target):
            return match[0]
        name, mark, fragment = target.partition("#")
        aim = Path(os.path.normpath(notebook.parent / unquote(name)))
        if aim not in copies and not aim.exists():
            return match[0]
        way = os.path.relpath(copies.get(aim, aim), copy.parent)
        return match["before"] + quote(Path(way).as_posix()) + mark + fragment

    return LINK.sub(moved, source)


@cache
def _copies(root: Path) -> dict[Path, Path]:
    """The course's file → the learner's copy; a copy leads to itself."""
    out = {}
    for lesson in lessons():
        out[lesson.notebook(root)] = lesson.lesson_copy(root)
        out[lesson.exercise(root)] = lesson.work(root)
        out[lesson.solution(root)] = lesson.solution_copy(root)
        out[lesson.work(root)] = lesson.work(root)
    return out
