"""The learner's own copies, in work/: made once, never overwritten.

When the course's version of an exercise changes, an untouched copy is renewed; beside an edited one the new version is
laid as `<topic>.new.ipynb`, and `llmlab start TOPIC --use-new` moves over, keeping the old as `<topic>.old-<n>.ipynb`.
Which version a copy was made from stands in its own metadata, and in work/.copies.json for editors that drop it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmlab.course.files import write_atomically
from llmlab.course.graded_copy import Unreadable, find_checks, pristine_checks, read_notebook, version_of
from llmlab.course.solutions import version
from llmlab.course.syllabus import Lesson, built_lessons


class Blocked(RuntimeError):
    """A copy that could not be made; the message says why and what to do."""


@dataclass(frozen=True)
class Copied:
    """What became of a learner's copy: "made", "kept", "renewed", "new beside", "moved over", "restored", "unreadable"."""

    path: Path
    what: str
    message: str


def new_path(lesson: Lesson, root: Path) -> Path:
    """Where a newer version is laid beside an edited copy."""
    return lesson.work(root).with_suffix(".new.ipynb")


def start(lesson: Lesson, root: Path) -> Copied:
    """Makes sure that the learner has a copy; an edited one is never written to.

    Raises:
        FileNotFoundError: the lesson has no exercises yet.
        Blocked: the folder cannot be written.
    """
    source, path = lesson.exercise(root), lesson.work(root)
    if not source.is_file():
        raise FileNotFoundError(f"{lesson.slug} has no exercises yet: it is planned")
    text = source.read_text(encoding="utf-8")
    current = json.loads(text)["metadata"]["llmlab"]["version"]
    if not path.exists():
        _write(path, text)
        _remember(root, lesson, copy=current)
        return Copied(path, "made", f"{_name(path, root)} is yours: open it in JupyterLab")
    try:
        notebook = read_notebook(path)
    except Unreadable as error:
        cure = f"move it away, and `llmlab start {lesson.slug}` makes a fresh one"
        return Copied(path, "unreadable", f"{_name(path, root)} is kept as it is, but {error}: mend it, or {cure}")
    known = _known(root).get(lesson.slug, {})
    made_from = version_of(notebook) or known.get("copy")
    if current in (made_from, version(notebook)):
        return Copied(path, "kept", f"{_name(path, root)} is yours already")
    if version(notebook) == made_from:
        _write(path, text)
        _remember(root, lesson, copy=current)
        return Copied(path, "renewed", f"{_name(path, root)} was untouched: it now is the course's new version")
    return _lay_beside(lesson, root, text, current, known)


def _lay_beside(lesson: Lesson, root: Path, text: str, current: str, known: dict[str, str]) -> Copied:
    path, beside = lesson.work(root), new_path(lesson, root)
    if known.get("new") != current or not beside.exists():
        _write(beside, text)
        _remember(root, lesson, new=current)
    message = (
        f"the course changed {lesson.slug}. Your {_name(path, root)} is kept; the new version lies beside it as "
        f"{beside.name}. To move over: copy your answers into it, then `llmlab start {lesson.slug} --use-new`"
    )
    return Copied(path, "new beside", message)


def use_new(lesson: Lesson, root: Path) -> Copied:
    """Makes `<topic>.new.ipynb` the copy; the former one stays as `<topic>.old-<n>.ipynb`.

    Raises:
        Blocked: there is no newer version, or the folder cannot be written.
    """
    path, beside = lesson.work(root), new_path(lesson, root)
    if not beside.exists():
        raise Blocked(f"there is no {_name(beside, root)}: your copy is of the course's version already")
    old = _free(path, "old")
    try:
        path.rename(old)
        beside.rename(path)
    except OSError as error:
        raise _blocked(path, error) from None
    _remember(root, lesson, copy=_known(root).get(lesson.slug, {}).get("new", ""))
    return Copied(path, "moved over", f"{_name(path, root)} is the new version; your former one is {old.name}")


def restore_checks(lesson: Lesson, root: Path) -> Copied:
    """Puts the course's check cells back where they were changed, deleted or doubled; all other cells stay.

    Raises:
        FileNotFoundError: there is no copy, or no exercise.
        Blocked: it is no notebook, or the folder cannot be written.
    """
    path = lesson.work(root)
    if not path.is_file():
        raise FileNotFoundError(f"{_name(path, root)} does not exist: `llmlab start {lesson.slug}` makes it")
    try:
        notebook = read_notebook(path)
    except Unreadable as error:
        raise Blocked(f"{_name(path, root)} cannot be mended: {error}") from None
    course = json.loads(lesson.exercise(root).read_text(encoding="utf-8"))
    cells, mended = with_checks(notebook["cells"], course, lesson.exercise(root))
    if not mended:
        return Copied(path, "kept", f"the check cells of {_name(path, root)} are as the course gives them")
    backup = _free(path, "before-restore")
    _write(backup, path.read_text(encoding="utf-8"))
    drop = set() if notebook.get("nbformat_minor", 0) >= 5 else {"id"}  # ids came with version 4.5 of the format
    cells = [{k: v for k, v in c.items() if k not in drop} | {"source": c["source"].splitlines(True)} for c in cells]
    raw = notebook | {"cells": cells}
    _write(path, json.dumps(raw, indent=1, ensure_ascii=False) + "\n")
    message = (
        f"put back: {', '.join(mended)}. Your other cells stay; the file as it was is {backup.name}. "
        "If it is open in JupyterLab: File → Reload Notebook from Disk"
    )
    return Copied(path, "restored", message)


def with_checks(
    cells: list[dict[str, Any]], course: dict[str, Any], exercise: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """The cells with each of the course's check cells once, and which had to be put back."""
    from llmlab.course.graded_copy import defines, goes_by, place_of_check

    pristine = pristine_checks(exercise)
    given = {c["id"]: c | {"source": "".join(c["source"])} for c in course["cells"]}
    cells, mended = list(cells), []
    for name in pristine:
        state, where = find_checks(cells, pristine)[name]
        if state == "intact" and len(where) == 1:
            continue
        mended.append(name)
        own = [i for i, c in enumerate(cells) if defines(c["source"], name) or goes_by(c, f"exercise-{name}")]
        place = where[0] if where else (own[-1] + 1 if own else place_of_check(cells, name, []))
        put = [(i, c) for i, c in enumerate(cells) if i not in where]
        before = [c for i, c in put if i < place]
        cells = [*before, given[f"check-{name}"], *[c for i, c in put if i >= place]]
    return cells, mended


def start_all(root: Path) -> list[Copied]:
    """Copies of all lessons that are built; what `llmlab lab` calls before it opens JupyterLab.

    Raises:
        Blocked: the folder cannot be written.
    """
    return [start(lesson, root) for lesson in built_lessons(root) if lesson.exercise(root).is_file()]


def _known(root: Path) -> dict[str, dict[str, str]]:
    """work/.copies.json; empty when it is missing or broken: the copies' own metadata come first."""
    try:
        known = json.loads((root / "work" / ".copies.json").read_text(encoding="utf-8"))
        return {k: v for k, v in known.items() if isinstance(v, dict)}
    except (OSError, ValueError, AttributeError):
        return {}


def _remember(root: Path, lesson: Lesson, **note: str) -> None:
    known = _known(root)
    known[lesson.slug] = known.get(lesson.slug, {}) | note
    _write(root / "work" / ".copies.json", json.dumps(known, indent=1, sort_keys=True) + "\n")


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, text)
    except OSError as error:
        raise _blocked(path, error) from None


def _blocked(path: Path, error: OSError) -> Blocked:
    return Blocked(
        f"{path.parent} cannot be written ({error.strerror or error}): make it writable, or copy the course elsewhere"
    )


def _free(path: Path, word: str) -> Path:
    n = 1
    while (beside := path.with_suffix(f".{word}-{n}.ipynb")).exists():
        n += 1
    return beside


def _name(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
