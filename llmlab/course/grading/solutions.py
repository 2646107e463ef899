"""Reading the worked exercises: cells, what a check cell marks, the learner's stub."""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab.course.syllabus import Lesson

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from llmlab.course.grading.checking import Checks

BEGIN = "# BEGIN SOLUTION"
END = "# END SOLUTION"


def source_of(lesson: Lesson, root: Path) -> Path:
    """The percent script of the solutions."""
    return lesson.solution(root).with_suffix(".py")


def read_solution(lesson: Lesson, root: Path) -> NotebookNode:
    """The solution's script as a notebook without outputs, with stable cell ids."""
    script = source_of(lesson, root).read_text(encoding="utf-8")
    return copy.deepcopy(_as_notebook(script))


@cache  # reading takes fifty times as long as copying
def _as_notebook(script: str) -> NotebookNode:
    import jupytext

    notebook = jupytext.reads(script, fmt="py:percent")
    name_cells(notebook)
    return notebook


def load_check(lesson: Lesson) -> Checks:
    """The object `check` of `llmlab.checks.<part>.<topic>`."""
    name = f"llmlab.checks.{lesson.package}.{lesson.module}"
    return importlib.import_module(name).check


def has(cell: Any, tag: str) -> bool:
    """Whether a cell carries `tag`."""
    return tag in cell.metadata.get("tags", [])


def checked_name(source: str) -> str | None:
    """The exercise that a check cell marks: 'f' for `check.f(f)`.

    None when the cell is anything but that one call.
    """
    call = _call(source)
    return call.func.attr if call else None


def answers_expression(source: str) -> str:
    """What a check cell hands over, as a tuple: '(f,)' for `check.f(f)`."""
    call = _call(source)
    if call is None:
        raise ValueError(
            f"source must be one call of `check.<exercise>(…)`, not {source!r}"
        )
    arguments = "".join(f"{ast.unparse(argument)}," for argument in call.args)
    return f"({arguments})"


def _call(source: str) -> ast.Call | None:
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return None
    if len(body) != 1 or not isinstance(body[0], ast.Expr):
        return None
    call = body[0].value
    if not isinstance(call, ast.Call) or not call.args or call.keywords:
        return None
    function = call.func  # it must read `check.<name>`
    if not isinstance(function, ast.Attribute):
        return None
    if not isinstance(function.value, ast.Name) or function.value.id != "check":
        return None
    return call


def check_cells(notebook: NotebookNode) -> dict[str, NotebookNode]:
    """exercise → its check cell, in order."""
    out = {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and has(cell, "check"):
            name = checked_name(cell.source)
            if name:
                out[name] = cell
    return out


def clear_solution(source: str) -> str:
    """The stub: each solution region becomes `raise NotImplementedError`.

    The indentation of the region is kept.

    Raises:
        ValueError: a region is not closed, not opened, or there is none.
    """
    lines = []
    inside = False
    found = False
    for line in source.splitlines():
        mark = line.strip()
        if mark == BEGIN and not inside:
            inside = True
            found = True
            indent = line[: len(line) - len(line.lstrip())]
            lines.append(f"{indent}raise NotImplementedError")
        elif mark == END and inside:
            inside = False
        elif mark in (BEGIN, END):
            raise ValueError(f"`{mark}` without its partner")
        elif not inside:
            lines.append(line)
    if inside:
        raise ValueError(f"`{END}` is missing")
    if not found:
        raise ValueError(f"`{BEGIN}` is missing")
    return "\n".join(lines)


def name_cells(notebook: NotebookNode) -> None:
    """Gives each cell an id that depends on nothing but what the cell is.

    It is check-<name>, exercise-<name>, or else a digest of the source.
    """
    used: dict[str, int] = {}
    pending = None  # an exercise cell whose check has not come yet
    for cell in notebook.cells:
        name = checked_name(cell.source) if has(cell, "check") else None
        if name:
            base = f"check-{name}"
        else:
            digest = hashlib.sha256(cell.source.encode()).hexdigest()
            base = f"{cell.cell_type}-{digest[:8]}"
        used[base] = used.get(base, 0) + 1
        cell.id = base if used[base] == 1 else f"{base}-{used[base]}"
        if has(cell, "exercise"):
            pending = cell
        elif name and pending is not None:
            pending.id = f"exercise-{name}"
            pending = None


def version(notebook: Any) -> str:
    """A digest of what the cells say: outputs, ids and metadata do not count."""
    texts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        texts.append(f"{cell['cell_type']}\x01{source}".rstrip())
    return hashlib.sha256("\x00".join(texts).encode()).hexdigest()[:12]
