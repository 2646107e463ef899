"""From solutions/ to exercises/: the unsolved notebook is made, never written.

    python -m llmlab.course.exercises [--check] [TOPIC …]

A solution is a percent script. What becomes of its cells:

    first Markdown cell, with a level-1 title    its words on symbols go into OPENING
    code tagged "exercise"                       each solution region is cleared
    code tagged "check", one call of check.…     kept, locked
    tagged "solution"                            dropped
    all others                                   kept

A solution region is what stands between `# BEGIN SOLUTION` and `# END SOLUTION`. In its
place the learner gets `raise NotImplementedError`.

`--check` writes nothing and fails when a notebook under exercises/ is missing, stale or
left over.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab.course.files import write_atomically
from llmlab.course.grading.solutions import (
    BEGIN,
    answers_expression,
    check_cells,
    checked_name,
    clear_solution,
    has,
    load_check,
    read_solution,
    source_of,
    version,
)
from llmlab.course.syllabus import Lesson, course_root, find, lessons

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from llmlab.course.grading.checking import Checks

KERNEL = {
    "display_name": "Python 3 (ipykernel)",
    "language": "python",
    "name": "python3",
}

OPENING = """\
# Exercises: {title}

They belong to the lesson [{title}](../../notebooks/{slug}.ipynb).{introduction}

How this works:

1. Replace `raise NotImplementedError` by your code, and run the cell (Shift+Enter).
2. Run the check below it. It says what is wrong with a wrong answer; it never shows the
   right one.
3. Stuck? `check.hint("{first}")` in a new cell shows a first hint, and a further
   one each time.

This copy is yours: updates of the course leave it alone. Change the check cells and
they earn nothing."""

CLOSING = """\
## Done?

Save, then mark the whole notebook from its first cell to its last in a fresh
kernel, in a terminal:

    llmlab check {slug}

It prints what each exercise earned and what to do next; `llmlab progress` shows the
whole course. Compare with the [worked solutions](../../solutions/{slug}.ipynb) once
yours pass: they say why, not only what."""


__all__ = [
    "answers_expression",
    "check_cells",
    "exercise_notebook",
    "load_check",
    "main",
    "read_solution",
    "stale",
]


class Malformed(ValueError):
    """A solution from which no exercise can be made.

    The message names the file, the exercise and the cure.
    """


def validate(lesson: Lesson, solution: NotebookNode, check: Checks) -> None:
    """Holds a solution to the form that exercises need.

    Raises:
        Malformed: a check or exercise cell is missing, doubled, untagged or out of
            order, or a header does not say what the check's data say.
    """
    where = f"solutions/{lesson.slug}.py"
    code = [c for c in solution.cells if c.cell_type == "code"]
    wanted = f"from llmlab.checks.{lesson.package}.{lesson.module} import check"
    if not code or wanted not in code[0].source.splitlines():
        raise Malformed(f"{where}: its first code cell must hold the line `{wanted}`")
    for cell in code:
        if has(cell, "check") and not checked_name(cell.source):
            raise Malformed(
                f"{where}: a check cell must be one call `check.<exercise>(…)`,"
                f" not {cell.source!r}"
            )
        if not has(cell, "check") and checked_name(cell.source) in check.exercises:
            raise Malformed(f'{where}: the cell {cell.source!r} needs `tags=["check"]`')
        if not has(cell, "exercise") and BEGIN in cell.source:
            raise Malformed(
                f"{where}: the cell with `{BEGIN}` that opens with {cell.source[:40]!r}"
                ' needs `tags=["exercise"]`'
            )
    found = [checked_name(c.source) for c in code if has(c, "check")]
    if found != [*check.exercises]:
        raise Malformed(
            f"{where}: its check cells mark {found}, where {check!r}\n"
            f"asks for {[*check.exercises]}, in this order"
        )
    _validate_exercises(where, solution, check)


def _validate_exercises(where: str, solution: NotebookNode, check: Checks) -> None:
    header = exercise = None
    for cell in solution.cells:
        if cell.cell_type == "markdown" and re.match(r"## Exercise \d+", cell.source):
            header = cell.source
        elif has(cell, "exercise"):
            exercise = cell
        elif has(cell, "check"):
            data = check.exercises[checked_name(cell.source)]
            if exercise is None:
                raise Malformed(
                    f'{where}: no cell tagged "exercise"'
                    f" stands before the check of {data.name}"
                )
            try:
                clear_solution(exercise.source)
            except ValueError as error:
                raise Malformed(f"{where}: exercise {data.name}: {error}") from None
            if header is None or data.header not in header.splitlines():
                raise Malformed(
                    f"{where}: `## Exercise N: …` before {data.name}"
                    f" must hold the line\n  {data.header}"
                )
            header = exercise = None
    if exercise is not None:
        opening = exercise.source[:60]
        raise Malformed(
            f"{where}: an exercise cell has no check cell after it: {opening!r}"
        )


def exercise_notebook(lesson: Lesson, root: Path) -> NotebookNode:
    """The unsolved notebook, with nbgrader's metadata.

    Its ids and its version depend on nothing but the source.
    """
    import nbformat.v4 as v4

    solution = read_solution(lesson, root)
    check = load_check(lesson)
    validate(lesson, solution, check)
    introduction, cells = introduced(solution)
    names = {
        "title": lesson.title,
        "slug": lesson.slug,
        "introduction": f"\n\n{introduction}".rstrip(),
        "first": next(iter(check.exercises)),
    }
    out = [v4.new_markdown_cell(OPENING.format(**names), id="how-this-works")]
    out += [unsolved(c, check) for c in cells]
    out += [v4.new_markdown_cell(CLOSING.format(**names), id="done")]
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    notebook = v4.new_notebook(cells=out, metadata=metadata)
    notebook.metadata["llmlab"] = {"lesson": lesson.slug, "version": version(notebook)}
    return notebook


def introduced(solution: NotebookNode) -> tuple[str, list[NotebookNode]]:
    """What the first cell says of tasks and symbols, and the cells that learners get.

    The title, and the sentence that says how hints are shown, are left out of it.
    """
    cells = [c for c in solution.cells if not has(c, "solution")]
    first = cells[0]
    if first.cell_type != "markdown" or not first.source.startswith("# "):
        return "", cells
    text = first.source.partition("\n")[2]
    return text.partition("Stuck?")[0].strip(), cells[1:]


def unsolved(cell: NotebookNode, check: Checks) -> NotebookNode:
    """One cell as the learner gets it, with the metadata of nbgrader and JupyterLab."""
    import nbformat.v4 as v4

    if cell.cell_type != "code":
        return v4.new_markdown_cell(cell.source, id=cell.id)
    metadata: dict[str, Any] = {}
    if cell.metadata.get("tags"):
        metadata["tags"] = cell.metadata["tags"]
    nbgrader = {
        "schema_version": 3,
        "task": False,
        "locked": False,
        "grade": False,
        "solution": False,
    }
    source = cell.source
    if has(cell, "exercise"):
        source = clear_solution(source)
        metadata["nbgrader"] = nbgrader | {"grade_id": cell.id, "solution": True}
    if has(cell, "check"):
        points = check.exercises[checked_name(source)].points
        metadata |= {"editable": False, "deletable": False}
        metadata["nbgrader"] = nbgrader | {
            "grade_id": cell.id,
            "grade": True,
            "locked": True,
            "points": points,
        }
    return v4.new_code_cell(source, id=cell.id, metadata=metadata)


def as_text(notebook: NotebookNode) -> str:
    """The file's text."""
    import nbformat

    nbformat.validate(notebook)
    return nbformat.writes(notebook, indent=1).rstrip("\n") + "\n"


def solved_lessons(root: Path) -> list[Lesson]:
    """The lessons that have a solution to make exercises from."""
    return [lesson for lesson in lessons() if source_of(lesson, root).is_file()]


def stale(root: Path, chosen: list[Lesson] | None = None) -> dict[Path, str]:
    """The exercise notebooks that differ from what their solutions give.

    Returns {path: the text that it should have}, or '' for a notebook whose solution is
    gone.
    """
    made = {lesson.exercise(root): lesson for lesson in chosen or solved_lessons(root)}
    out = {}
    for path, lesson in made.items():
        text = as_text(exercise_notebook(lesson, root))
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            out[path] = text
    if chosen is None:
        for path in sorted((root / "exercises").rglob("*.ipynb")):
            if path not in made and "checkpoint" not in str(path):
                out[path] = ""
    return out


def main(arguments: list[str] | None = None) -> int:
    """Writes the notebooks that are stale; with --check it only names them.

    Returns 0 when all is well, 1 when a notebook is stale or a solution malformed, 2
    when the arguments are wrong.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    topics = [a for a in arguments if a != "--check"]
    if any(a.startswith("-") for a in topics):
        print(f"usage: {__doc__.splitlines()[2].strip()}", file=sys.stderr)
        return 2
    root = course_root()
    try:
        changes = stale(root, [find(t) for t in topics] or None)
    except Malformed as error:
        print(error, file=sys.stderr)
        return 1
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for path, text in changes.items():
        name = path.relative_to(root)
        if "--check" in arguments:
            problem = "is stale" if text else "has no solution"
            cure = "run `python -m llmlab.course.exercises`"
            print(f"{name} {problem}: {cure}", file=sys.stderr)
        elif text:
            write_atomically(path, text)
            print(f"{name} written")
        else:
            path.unlink()
            print(f"{name} removed: it has no solution")
    return int("--check" in arguments and bool(changes))


if __name__ == "__main__":
    sys.exit(main())
