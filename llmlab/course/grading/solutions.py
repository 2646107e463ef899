"""Reading the worked exercises: their cells, what a check cell marks, and the stub that
a learner gets.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab.course.syllabus import Lesson

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from llmlab.course.grading.checking import Checks

BEGIN, END = "# BEGIN SOLUTION", "# END SOLUTION"


def source_of(lesson: Lesson, root: Path) -> Path:
    """The percent script of the solutions."""
    return lesson.solution(root).with_suffix(".py")


def read_solution(lesson: Lesson, root: Path) -> NotebookNode:
    """The solution's script as a notebook without outputs, each cell with a stable
    id.
    """
    import jupytext

    notebook = jupytext.read(source_of(lesson, root), fmt="py:percent")
    name_cells(notebook)
    return notebook


def load_check(lesson: Lesson) -> Checks:
    """The object `check` of `llmlab.checks.<part>.<topic>`."""
    return importlib.import_module(
        f"llmlab.checks.{lesson.package}.{lesson.module}"
    ).check


def has(cell: Any, tag: str) -> bool:
    """Whether a cell carries `tag`."""
    return tag in cell.metadata.get("tags", [])


def checked_name(source: str) -> str | None:
    """The exercise that a check cell marks: 'f' for `check.f(f)`; None when the cell is
    anything but that one call.
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
    return f"({''.join(ast.unparse(a) + ',' for a in call.args)})"


def _call(source: str) -> ast.Call | None:
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return None
    call = body[0].value if len(body) == 1 and isinstance(body[0], ast.Expr) else None
    good = (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
    )
    return (
        call
        if good and call.func.value.id == "check" and call.args and not call.keywords
        else None
    )


def check_cells(notebook: NotebookNode) -> dict[str, NotebookNode]:
    """exercise → its check cell, in order."""
    cells = {
        checked_name(c.source): c
        for c in notebook.cells
        if c.cell_type == "code" and has(c, "check")
    }
    return {name: cell for name, cell in cells.items() if name}


def clear_solution(source: str) -> str:
    """The stub: each solution region becomes `raise NotImplementedError`, at its own
    indentation.

    Raises:
        ValueError: a region is not closed, not opened, or there is none.
    """
    lines, inside, found = [], False, False
    for line in source.splitlines():
        mark = line.strip()
        if mark == BEGIN and not inside:
            inside = found = True
            lines.append(
                line[: len(line) - len(line.lstrip())] + "raise NotImplementedError"
            )
        elif mark == END and inside:
            inside = False
        elif mark in (BEGIN, END):
            raise ValueError(f"`{mark}` without its partner")
        elif not inside:
            lines.append(line)
    if inside or not found:
        raise ValueError(f"`{END}` is missing" if inside else f"`{BEGIN}` is missing")
    return "\n".join(lines)


def name_cells(notebook: NotebookNode) -> None:
    """Gives each cell an id that depends on nothing but what it is: check-<name>,
    exercise-<name>, else a digest.
    """
    used: dict[str, int] = {}
    pending = None
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
            pending.id, pending = f"exercise-{name}", None


def version(notebook: Any) -> str:
    """A digest of what the cells say: outputs, ids and metadata do not count."""
    text = "\x00".join(
        f"{c['cell_type']}\x01{''.join(c['source'])}".rstrip()
        for c in notebook["cells"]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:12]
