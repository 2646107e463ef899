"""The learner's own copies, in work/: made once, never overwritten.

| the course's file      | the learner's copy                   | made              |
|------------------------|--------------------------------------|-------------------|
| notebooks/<slug>.ipynb | work/lessons/<slug>.lesson.ipynb     | when first opened |
| exercises/<slug>.ipynb | work/<slug>.ipynb                    | by `llmlab lab`   |
| solutions/<slug>.ipynb | work/solutions/<slug>.solution.ipynb | when first opened |
| the book's glossary    | work/GLOSSARY.md                     | by `llmlab lab`   |

The three have different names, so that their tabs do. Copies of lessons and solutions
that were made as <slug>.ipynb are renamed when they are next opened. The glossary is
the course's page and is written anew; in the copies of lessons its terms are links.

A copy is *untouched* as long as its cells read as they were given: running them is no
edit, a word in one of them is. When the course's version changes, an untouched copy is
renewed; beside an edited one the new version is laid as `<topic>.new.ipynb`, and
`llmlab start TOPIC --use-new` moves over, keeping the old as `<topic>.old-<n>.ipynb`.
Which version a copy was made from stands in its own metadata, and in work/.copies.json
for editors that drop it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from llmlab.course.book import terms
from llmlab.course.copy_links import with_links_of_a_copy
from llmlab.course.files import locked, write_atomically
from llmlab.course.grading.graded_copy import (
    Unreadable,
    find_checks,
    pristine_checks,
    read_notebook,
    version_of,
)
from llmlab.course.grading.solutions import version
from llmlab.course.syllabus import Lesson, built_lessons, lessons

GLOSSARY_PAGE = Path("work") / "GLOSSARY.md"
RELOAD = "If it is open in JupyterLab: File → Reload Notebook from Disk"


class Kind(Enum):
    """What a copy is a copy of."""

    LESSON = "lesson"
    EXERCISES = "exercises"
    SOLUTION = "solution"

    def source(self, lesson: Lesson, root: Path) -> Path:
        """The course's own file."""
        files = {
            Kind.LESSON: lesson.notebook,
            Kind.EXERCISES: lesson.exercise,
            Kind.SOLUTION: lesson.solution,
        }
        return files[self](root)

    def copy(self, lesson: Lesson, root: Path) -> Path:
        """The learner's copy."""
        files = {
            Kind.LESSON: lesson.lesson_copy,
            Kind.EXERCISES: lesson.work,
            Kind.SOLUTION: lesson.solution_copy,
        }
        return files[self](root)


class Blocked(RuntimeError):
    """A copy that could not be made; the message says why and what to do."""


@dataclass(frozen=True)
class Copied:
    """What became of a learner's copy.

    `what` is "made", "kept", "renewed", "new beside", "moved over", "restored", "reset"
    or "unreadable".
    """

    path: Path
    what: str
    message: str


@dataclass(frozen=True)
class Made:
    """What a copy was made from, as its metadata has it.

    Attributes:
        version: digest of the cells of the course's file; None when nobody knows.
        cells: digest of the cells of the copy, whose links differ; None in copies that
            were made before links were changed.
        outputs: digest of the outputs of the course's file.
    """

    version: str | None
    cells: str | None
    outputs: str | None


@dataclass(frozen=True)
class Fresh:
    """A copy as it would be made now."""

    notebook: dict[str, Any]
    made: Made

    @property
    def text(self) -> str:
        """The file; it takes longer than all the rest, and is seldom wanted."""
        return _dump(self.notebook)


def new_path(lesson: Lesson, root: Path, kind: Kind = Kind.EXERCISES) -> Path:
    """Where a newer version is laid beside an edited copy."""
    return kind.copy(lesson, root).with_suffix(".new.ipynb")


def find_copy(path: str, root: Path) -> tuple[Lesson, Kind] | None:
    """Whose copy lies, or would lie, at `path`; None when it is another file.

    Args:
        path: relative to the course's folder, as in
            "work/lessons/04-peft/05-lora.lesson.ipynb".
    """
    if not path.startswith("work/"):
        return None
    for lesson in lessons():
        for kind in Kind:
            if kind.copy(lesson, root) == root / path:
                return lesson, kind
    return None


def former_path(path: Path) -> Path:
    """The name that a copy of a lesson or a solution had before: without its kind."""
    for kind in ("lesson", "solution"):
        name = re.sub(rf"\.{kind}(?=\.|$)", "", path.name)
        path = path.with_name(name)
    return path


def take_over(lesson: Lesson, root: Path, kind: Kind) -> None:
    """Renames a copy that has its former name, and a new version beside it.

    Raises:
        Blocked: the folder cannot be written.
    """
    for path in (kind.copy(lesson, root), new_path(lesson, root, kind)):
        former = former_path(path)
        if former != path and former.is_file() and not path.exists():
            known = _known(root).get(_key(former, root), {})
            _move(former, path)
            if known:
                _note(path, root, **known)


def fresh_copy(lesson: Lesson, root: Path, kind: Kind) -> Fresh:
    """The copy that the course's file gives now: its links changed, its version noted.

    Raises:
        FileNotFoundError: the course has no such file yet.
        Blocked: the course's file is broken.
    """
    source = kind.source(lesson, root)
    if not source.is_file():
        raise FileNotFoundError(f"{lesson.slug} has no {kind.value} yet: it is planned")
    try:
        course = read_notebook(source)
    except Unreadable as error:
        raise Blocked(
            f"{_name(source, root)} is the course's own file, and broken: {error}. "
            f"`git checkout -- {_name(source, root)}` brings it back"
        ) from None
    copy = kind.copy(lesson, root)
    given = version_of(course) or version(course)
    outputs = [cell.get("outputs") for cell in course["cells"]]
    for cell in course["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = with_links_of_a_copy(cell["source"], source, copy, root)
    if kind is Kind.LESSON:
        _link_terms(course["cells"], lesson, root)
    made = Made(given, version(course), _digest(outputs))
    metadata = {k: v for k, v in course["metadata"].items() if k != "jupytext"}
    note = {"lesson": lesson.slug, "version": made.version}
    note |= {"cells": made.cells, "outputs": made.outputs}
    return Fresh(course | {"metadata": metadata | {"llmlab": note}}, made)


def _link_terms(cells: list[dict[str, Any]], lesson: Lesson, root: Path) -> None:
    """Links each term of the glossary where the lesson first uses it."""
    glossary = root / terms.GLOSSARY
    if not glossary.is_file():
        return
    way = os.path.relpath(root / GLOSSARY_PAGE, lesson.lesson_copy(root).parent)
    linker = terms.Linker.to_page(glossary, lesson.slug, Path(way).as_posix())
    for cell in cells:
        if cell["cell_type"] == "markdown":
            cell["source"] = linker.link(cell["source"])


def write_glossary(root: Path) -> None:
    """Writes work/GLOSSARY.md, where the copies of lessons link to.

    Raises:
        Blocked: the folder cannot be written.
    """
    glossary = root / terms.GLOSSARY
    if glossary.is_file():
        _write(root / GLOSSARY_PAGE, terms.page(glossary))


def start(lesson: Lesson, root: Path, kind: Kind = Kind.EXERCISES) -> Copied:
    """Makes sure that the learner has a copy; an edited one is never written to.

    Raises:
        FileNotFoundError: the course has no such file yet.
        Blocked: the folder cannot be written.
    """
    fresh = fresh_copy(lesson, root, kind)
    take_over(lesson, root, kind)
    path = kind.copy(lesson, root)
    name = _name(path, root)
    if not path.exists():
        _write(path, fresh.text)
        _remember(path, root, fresh.made)
        return Copied(path, "made", f"{name} is yours: open it in JupyterLab")
    try:
        notebook = read_notebook(path)
    except Unreadable as error:
        cure = f"move it away, and `llmlab start {lesson.slug}` makes a fresh one"
        message = f"{name} is kept as it is, but {error}: mend it, or {cure}"
        return Copied(path, "unreadable", message)
    made = _made(notebook, _known(root).get(_key(path, root), {}))
    if _is_untouched(notebook, made):
        if made == fresh.made:
            return Copied(path, "kept", f"{name} is yours already")
        _write(path, fresh.text)
        _remember(path, root, fresh.made)
        message = f"{name} was untouched: it now is the course's new version"
        return Copied(path, "renewed", message)
    reads_as_new = version(notebook) in (fresh.made.version, fresh.made.cells)
    if made.version == fresh.made.version or reads_as_new:
        return Copied(path, "kept", f"{name} is yours already")
    return _lay_beside(lesson, root, kind, fresh)


def _lay_beside(lesson: Lesson, root: Path, kind: Kind, fresh: Fresh) -> Copied:
    path = kind.copy(lesson, root)
    beside = new_path(lesson, root, kind)
    kept = ""
    known = _known(root).get(_key(path, root), {})
    if not beside.exists() or known.get("new") != fresh.made.version:
        if beside.exists() and not _file_is_untouched(beside):
            old = _free(path, "old")
            _move(beside, old)
            kept = f" What you wrote into the former {beside.name} is in {old.name}."
        _write(beside, fresh.text)
        _note(path, root, new=fresh.made.version)
    message = (
        f"the course changed {lesson.slug}. Your {_name(path, root)} is kept;"
        f" the new version lies beside it as {beside.name}.{kept} To move over:"
        f" copy what you wrote into it, then `llmlab start {lesson.slug} --use-new`"
    )
    return Copied(path, "new beside", message)


def use_new(lesson: Lesson, root: Path, kind: Kind = Kind.EXERCISES) -> Copied:
    """Makes `<topic>.new.ipynb` the copy; the former stays as `<topic>.old-<n>.ipynb`.

    Raises:
        Blocked: there is no newer version, or the folder cannot be written.
    """
    take_over(lesson, root, kind)
    path = kind.copy(lesson, root)
    beside = new_path(lesson, root, kind)
    if not beside.exists():
        name = _name(beside, root)
        raise Blocked(
            f"there is no {name}: your copy is of the course's version already"
        )
    known = _known(root).get(_key(path, root), {})
    try:
        made = _made(read_notebook(beside), {"copy": known.get("new")})
    except Unreadable:
        made = Made(known.get("new"), None, None)
    old = _free(path, "old")
    if path.exists():
        _move(path, old)
    _move(beside, path)
    _remember(path, root, made)
    name = _name(path, root)
    message = f"{name} is the new version; your former one is {old.name}"
    return Copied(path, "moved over", message)


def reset(lesson: Lesson, root: Path, kind: Kind = Kind.LESSON) -> Copied:
    """Makes a fresh copy; the former one stays as `<topic>.old-<n>.ipynb`.

    Raises:
        FileNotFoundError: the course has no such file yet.
        Blocked: the folder cannot be written; the copy is as it was.
    """
    fresh = fresh_copy(lesson, root, kind)
    take_over(lesson, root, kind)
    path = kind.copy(lesson, root)
    name = _name(path, root)
    if not path.exists():
        return start(lesson, root, kind)
    if path.is_file() and path.read_bytes() == fresh.text.encode():
        return Copied(path, "kept", f"{name} is as the course gives it")
    old = _free(path, "old")
    _move(path, old)
    try:
        _write(path, fresh.text)
    except Blocked:
        _move(old, path)
        raise
    _remember(path, root, fresh.made)
    beside = new_path(lesson, root, kind)
    if beside.exists() and _file_is_untouched(beside):
        beside.unlink()  # it is what the copy is now, or older
    message = f"{name} is fresh; your former one is {old.name}. {RELOAD}"
    return Copied(path, "reset", message)


def restore_checks(lesson: Lesson, root: Path) -> Copied:
    """Puts the course's check cells back where they were changed; other cells stay.

    Raises:
        FileNotFoundError: there is no copy, or no exercise.
        Blocked: it is no notebook, or the folder cannot be written.
    """
    path = lesson.work(root)
    name = _name(path, root)
    if not path.is_file():
        raise FileNotFoundError(
            f"{name} does not exist: `llmlab start {lesson.slug}` makes it"
        )
    try:
        notebook = read_notebook(path)
    except Unreadable as error:
        raise Blocked(f"{name} cannot be mended: {error}") from None
    course = json.loads(lesson.exercise(root).read_text(encoding="utf-8"))
    cells, mended = with_checks(notebook["cells"], course, lesson.exercise(root))
    if not mended:
        message = f"the check cells of {name} are as the course gives them"
        return Copied(path, "kept", message)
    backup = _free(path, "before-restore")
    _write(backup, path.read_text(encoding="utf-8"))
    if notebook.get("nbformat_minor", 0) < 5:  # ids came with version 4.5 of the format
        cells = [{k: v for k, v in c.items() if k != "id"} for c in cells]
    _write(path, _dump(notebook | {"cells": cells}))
    message = (
        f"put back: {', '.join(mended)}. Your other cells stay; the file as it was is"
        f" {backup.name}. {RELOAD}"
    )
    return Copied(path, "restored", message)


def with_checks(
    cells: list[dict[str, Any]], course: dict[str, Any], exercise: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """The cells with each of the course's checks once, and which had to be put back."""
    from llmlab.course.grading.graded_copy import defines, goes_by, place_of_check

    pristine = pristine_checks(exercise)
    given = {c["id"]: c | {"source": "".join(c["source"])} for c in course["cells"]}
    cells = list(cells)
    mended = []
    for name in pristine:
        state, where = find_checks(cells, pristine)[name]
        if state == "intact" and len(where) == 1:
            continue
        mended.append(name)
        # The place: where the changed check stands, else after the learner's answer.
        place = place_of_check(cells, name, [])
        for i, cell in enumerate(cells):
            if defines(cell["source"], name) or goes_by(cell, f"exercise-{name}"):
                place = i + 1
        if where:
            place = where[0]
        others = [(i, c) for i, c in enumerate(cells) if i not in where]
        before = [c for i, c in others if i < place]
        after = [c for i, c in others if i >= place]
        cells = [*before, given[f"check-{name}"], *after]
    return cells, mended


def start_all(root: Path) -> list[Copied]:
    """The copies of all exercises, and of the lessons and solutions opened so far.

    `llmlab lab` calls this before it opens JupyterLab.

    Raises:
        Blocked: the folder cannot be written.
    """
    done = []
    for lesson in built_lessons(root):
        for kind in Kind:
            take_over(lesson, root, kind)
            wanted = kind is Kind.EXERCISES or kind.copy(lesson, root).exists()
            if wanted and kind.source(lesson, root).is_file():
                done.append(start(lesson, root, kind))
    return done


def begin(lesson: Lesson, root: Path) -> None:
    """Notes that the learner asked for these exercises by name.

    `llmlab check` then marks them, although nothing is written into them yet.

    Raises:
        Blocked: the folder cannot be written.
    """
    _note(lesson.work(root), root, begun="asked for")


def is_begun(lesson: Lesson, root: Path) -> bool:
    """Whether the learner wrote into the exercises, or asked for them by name.

    `llmlab lab` lays out the copies of all lessons: that alone begins none. A file that
    cannot be read was begun: it has to be told of.
    """
    path = lesson.work(root)
    if not path.exists():
        return False
    known = _known(root).get(_key(path, root), {})
    if known.get("begun"):
        return True
    try:
        notebook = read_notebook(path)
    except Unreadable:
        return True
    made = _made(notebook, known)
    return not _is_untouched(notebook, made)


def _made(notebook: dict[str, Any], known: dict[str, Any]) -> Made:
    """What a copy says it was made from.

    `known` stands in where an editor dropped it.
    """
    note = notebook["metadata"].get("llmlab")
    if isinstance(note, dict) and note.get("version"):
        return Made(note["version"], note.get("cells"), note.get("outputs"))
    return Made(known.get("copy"), known.get("cells"), known.get("outputs"))


def _is_untouched(notebook: dict[str, Any], made: Made) -> bool:
    """Whether the cells read as they were given; outputs and ids do not count."""
    return version(notebook) in (made.version, made.cells)


def _file_is_untouched(path: Path) -> bool:
    try:
        notebook = read_notebook(path)
    except Unreadable:
        return False
    return _is_untouched(notebook, _made(notebook, {}))


def _digest(outputs: list[Any]) -> str:
    return hashlib.sha256(json.dumps(outputs).encode()).hexdigest()[:12]


def _dump(notebook: dict[str, Any]) -> str:
    """The notebook as a file; sources are lists of lines, as nbformat writes them."""
    cells = [c | {"source": c["source"].splitlines(True)} for c in notebook["cells"]]
    return json.dumps(notebook | {"cells": cells}, indent=1, ensure_ascii=False) + "\n"


def _known(root: Path) -> dict[str, dict[str, Any]]:
    """work/.copies.json; empty when broken: the copies' own metadata come first."""
    try:
        text = (root / "work" / ".copies.json").read_text(encoding="utf-8")
        return {k: v for k, v in json.loads(text).items() if isinstance(v, dict)}
    except (OSError, ValueError, AttributeError):
        return {}


def _key(path: Path, root: Path) -> str:
    """A copy's name in .copies.json, as in 'lessons/04-peft/05-lora.lesson'."""
    return path.relative_to(root / "work").with_suffix("").as_posix()


def _remember(path: Path, root: Path, made: Made) -> None:
    _note(path, root, copy=made.version, cells=made.cells, outputs=made.outputs)


def _note(path: Path, root: Path, **note: str | None) -> None:
    record = root / "work" / ".copies.json"
    try:
        with locked(root / "work" / ".copies.lock"):
            known = _known(root)
            key = _key(path, root)
            known[key] = known.get(key, {}) | note
            text = json.dumps(known, indent=1, sort_keys=True) + "\n"
            write_atomically(record, text)
    except OSError as error:
        raise _blocked(record, error) from None


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, text)
    except OSError as error:
        raise _blocked(path, error) from None


def _move(path: Path, to: Path) -> None:
    try:
        path.rename(to)
    except OSError as error:
        raise _blocked(path, error) from None


def _blocked(path: Path, error: OSError) -> Blocked:
    return Blocked(
        f"{path.parent} cannot be written ({error.strerror or error}): make it"
        " writable, or copy the course elsewhere"
    )


def _free(path: Path, word: str) -> Path:
    n = 1
    while (beside := path.with_suffix(f".{word}-{n}.ipynb")).exists():
        n += 1
    return beside


def _name(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
