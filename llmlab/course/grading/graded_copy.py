"""The copy of a learner's notebook that is marked.

It holds the learner's cells in their order, with the course's own checks in between.

A check cell of theirs decides only *where* the course's check runs. One that was
changed or deleted earns nothing; the check runs all the same, so that they are told how
they stand.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmlab.course.grading.solutions import answers_expression, checked_name

HERE = Path(__file__).resolve().parent


class Unreadable(ValueError):
    """A file that is not a notebook; the message says why and what to do."""


@dataclass(frozen=True)
class Pristine:
    """A check cell as the course gives it."""

    exercise: str
    source: str
    points: int


@dataclass
class Copy:
    """A copy to be run, and what is known about it before it runs."""

    notebook: dict[str, Any]
    # exercise → "intact", "edited" or "missing": the learner's own check cell
    state: dict[str, str]
    checks: dict[int, str]  # index in the copy → exercise
    # exercise → the cells (index in the copy) that define it, or should
    defined_in: dict[str, list[int]]
    # index in the copy → number of the code cell in the learner's file
    theirs: dict[int, int] = field(default_factory=dict)

    def origin(self, index: int | None) -> int | None:
        """The index in the learner's file of the cell at `index` of the copy.

        −1 − k for the k-th check; None for a cell of our own.
        """
        if index is None:
            return None
        return self.notebook["cells"][index]["metadata"]["llmlab_origin"]


def read_notebook(path: Path) -> dict[str, Any]:
    """The notebook at `path`.

    Each cell has its type, its source as one text, and its metadata.

    Raises:
        Unreadable: it is no notebook: not JSON, another kind of JSON, an old format,
            empty, not text, not readable.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a mark in front
        notebook = json.loads(text) if text.strip() else None
    except OSError as error:
        raise Unreadable(f"it cannot be opened ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise Unreadable("it is not text, so not a notebook") from None
    except (json.JSONDecodeError, RecursionError) as error:
        problem = "its JSON is broken"
        if isinstance(error, json.JSONDecodeError):
            problem += f" (line {error.lineno}: {error.msg})"
        if re.search(r"^<{7} ", text, re.M):
            problem += ": it holds the marks of a merge (<<<<<<<)"
        raise Unreadable(problem) from None
    if notebook is None:
        raise Unreadable("the file is empty")
    if isinstance(notebook, dict) and "worksheets" in notebook:
        raise Unreadable(
            "it has the notebook format of before 2015: open and save it in JupyterLab"
        )
    if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
        raise Unreadable("it is JSON, but not a notebook: it has no list of cells")
    metadata = notebook.get("metadata")
    return notebook | {
        "cells": [_cell(c) for c in notebook["cells"] if isinstance(c, dict)],
        "metadata": metadata if isinstance(metadata, dict) else {},
    }


def _cell(cell: dict[str, Any]) -> dict[str, Any]:
    source = cell.get("source", "")
    source = "".join(map(str, source)) if isinstance(source, list) else str(source)
    metadata = cell.get("metadata")
    return cell | {
        "cell_type": cell.get("cell_type", "raw"),
        # half a character cannot be sent to the kernel
        "source": re.sub("[\ud800-\udfff]", "\ufffd", source),
        "metadata": metadata if isinstance(metadata, dict) else {},
    }


def pristine_checks(exercise_notebook: Path) -> dict[str, Pristine]:
    """exercise → its check cell, from the notebook under exercises/."""
    out = {}
    for cell in read_notebook(exercise_notebook)["cells"]:
        if "check" not in cell["metadata"].get("tags", []):
            continue
        name = checked_name(cell["source"])
        if name:
            points = cell["metadata"]["nbgrader"]["points"]
            out[name] = Pristine(name, cell["source"], points)
    return out


def same_code(a: str, b: str) -> bool:
    """Whether two sources are the same program.

    Comments, spacing and quotes do not count.
    """
    try:
        return ast.dump(ast.parse(a)) == ast.dump(ast.parse(b))
    except (SyntaxError, ValueError):
        return a.strip() == b.strip()


def defines(source: str, name: str) -> bool:
    """Whether a cell binds `name` at top level: def, class, assignment, import."""
    n = re.escape(name)
    forms = (
        rf"^(?:(?:async\s+)?def|class)\s+{n}\b",
        rf"^{n}\s*(?::[^=\n]*)?=[^=]",
        rf"^(?:from|import)\b.*\b{n}\b",
    )
    return any(re.search(form, source, re.M) for form in forms)


def writes(source: str, name: str) -> bool:
    """Whether a cell defines the function `name`, and not as the stub."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        return False
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            last = node.body[-1]
            stub = isinstance(last, ast.Raise) and "NotImplementedError" in (
                ast.unparse(last)
            )
            return not stub
    return False


def goes_by(cell: dict[str, Any], name: str) -> bool:
    """Whether `name` is a cell's id, or the one that nbgrader knows it by."""
    if cell.get("id") == name:
        return True
    note = cell["metadata"].get("nbgrader")
    return isinstance(note, dict) and note.get("grade_id") == name


def find_checks(
    cells: list[dict[str, Any]], pristine: dict[str, Pristine]
) -> dict[str, tuple[str, list[int]]]:
    """exercise → (state of the learner's check cell, the cells that are or were it).

    By content first, then by id or nbgrader's name (other editors drop both), then by
    the call in a changed cell.
    """
    code = [(i, c) for i, c in enumerate(cells) if c["cell_type"] == "code"]
    out = {}
    for name, check in pristine.items():
        intact = [i for i, c in code if same_code(c["source"], check.source)]
        # A cell that defines the answer is not a check, whatever its id.
        others = [
            (i, c)
            for i, c in code
            if i not in intact and not defines(c["source"], name)
        ]
        edited = [i for i, c in others if goes_by(c, f"check-{name}")]
        if not intact and not edited:
            call = re.compile(rf"\bcheck\s*\.\s*{re.escape(name)}\s*\(")
            edited = [i for i, c in others if call.search(c["source"])][:1]
        if intact:
            state = "intact"
        elif edited:
            state = "edited"
        else:
            state = "missing"
        out[name] = state, sorted([*intact, *edited])
    return out


def make_copy(
    notebook: dict[str, Any],
    pristine: dict[str, Pristine],
    module: str,
    folder: Path,
    skip: set[int],
) -> Copy:
    """The copy to run.

    Args:
        module: the lesson's checks, as in "llmlab.checks.peft.lora".
        folder: where the learner's notebook lies; the cells run there.
        skip: cells (by their index in the learner's file; −1 − k for the k-th
            exercise's check) to leave out.
    """
    cells = notebook["cells"]
    found = find_checks(cells, pristine)
    places = {}
    dropped = set()  # the learner's own check cells
    for name, (_, where) in found.items():
        places[name] = place_of_check(cells, name, where)
        dropped.update(where)
    copy = Copy(
        notebook={},
        state={name: state for name, (state, _) in found.items()},
        checks={},
        defined_in={name: [] for name in pristine},
    )
    prepare = f'{_run("preamble.py")}["prepare"]({str(folder)!r})'
    out = [_code(prepare, 0)]
    number = 0
    for i in range(len(cells) + 1):  # a check may stand after the last cell
        if i < len(cells) and cells[i]["cell_type"] == "code":
            number += 1
            if i not in dropped and i not in skip:
                copy.theirs[len(out)] = number
                for name in pristine:
                    if _answers(cells[i], name):
                        copy.defined_in[name].append(len(out))
                out.append(_code(cells[i]["source"], len(out), i))
        for k, (name, check) in enumerate(pristine.items()):
            if places[name] == i and -1 - k not in skip:
                copy.checks[len(out)] = name
                call = _call_of_mark(module, check)
                out.append(_code(call, len(out), -1 - k))
    copy.notebook = {"cells": out, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    return copy


def _answers(cell: dict[str, Any], name: str) -> bool:
    """Whether a cell defines the answer to an exercise, or should."""
    return defines(cell["source"], name) or goes_by(cell, f"exercise-{name}")


def _call_of_mark(module: str, check: Pristine) -> str:
    """The code of the cell that marks one exercise."""
    expression = answers_expression(check.source)
    arguments = f"{module!r}, {check.exercise!r}, get_ipython().user_ns, {expression!r}"
    return f'{_run("marking.py")}["mark"]({arguments})'


def place_of_check(cells: list[dict[str, Any]], name: str, own: list[int]) -> int:
    """The index of the cell after which the course's check runs.

    It is the place of the learner's check, unless the answer is defined only later:
    the stub may still stand in its cell, and the answer in one of their own.
    """
    definitions = []
    written = []
    for i, cell in enumerate(cells):
        is_code = cell["cell_type"] == "code"
        if is_code and i not in own and defines(cell["source"], name):
            definitions.append(i)
            if writes(cell["source"], name):
                written.append(i)
    if own and written and written[0] > own[0]:
        return written[-1]
    if own and (not definitions or definitions[0] < own[0]):
        return own[0]
    return definitions[-1] if definitions else len(cells)


def _run(file: str) -> str:
    """An expression that runs a file of this room and gives its names."""
    return f'__import__("runpy").run_path({str(HERE / file)!r})'


def _code(source: str, index: int, origin: int | None = None) -> dict[str, Any]:
    metadata = {"llmlab_index": index, "llmlab_origin": origin}
    return {
        "cell_type": "code",
        "id": f"cell-{index}",
        "metadata": metadata,
        "source": source,
        "outputs": [],
        "execution_count": None,
    }


def lesson_of(notebook: dict[str, Any]) -> str | None:
    """The lesson that a copy says it belongs to; None when an editor dropped that."""
    note = notebook["metadata"].get("llmlab")
    return note.get("lesson") if isinstance(note, dict) else None


def version_of(notebook: dict[str, Any]) -> str | None:
    """The version of the exercise that a copy says it was made from.

    None when an editor dropped it.
    """
    note = notebook["metadata"].get("llmlab")
    return note.get("version") if isinstance(note, dict) else None
