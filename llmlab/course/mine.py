"""What a learner wrote and passed, as functions that later code can use.

    from mine import allocate

gives the learner's own `allocate`, read from their notebook in work/ and marked by its
check a moment ago. `llmlab serve --mine` collects all pieces of the engine so.

Of a notebook only what defines is run: imports, functions, classes, assignments. What
it calls or prints for its own sake is left out, and so are its checks.

`collect` does the same in a process of its own, where a loop that does not end can be
stopped.
"""

from __future__ import annotations

import ast
import contextlib
import json
import linecache
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llmlab.course import standing
from llmlab.course.grading.graded_copy import Unreadable, read_notebook
from llmlab.course.grading.solutions import load_check
from llmlab.course.syllabus import Lesson, course_root, find, lessons
from llmlab.course.words import did_you_mean

DEFINES = (
    ast.AnnAssign,
    ast.Assign,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.FunctionDef,
    ast.Import,
    ast.ImportFrom,
)
LONGEST = 10.0  # seconds that one exercise may take to be read and marked
START = 120.0  # seconds that the process may take to import torch
WORDS = {
    "right": "right",
    "not done": "not done yet",
    "wrong": "not right yet",
    "error": "it raised an error",
    "missing": "not in the notebook",
    "no copy": "not begun",
    "unreadable": "the notebook cannot be read",
    "slow": "too slow",
}

Cells = tuple[tuple[str, str], ...]  # (where it stands, the code that defines)


@dataclass(frozen=True)
class Own:
    """One exercise, as the learner's notebook has it.

    Attributes:
        outcome: a key of WORDS; only "right" may be used.
        why: what stands against it, in a sentence; "" when it is right.
        seconds: that reading and marking it took.
        cells: what was run to define it, to be run again elsewhere.
    """

    lesson: str
    name: str
    outcome: str
    why: str = ""
    seconds: float = 0.0
    cells: Cells = ()

    @property
    def is_right(self) -> bool:
        """Whether its check has just said so."""
        return self.outcome == "right"


# Reading a notebook -------------------------------------------------------------------


def defining_cells(lesson: Lesson, root: Path) -> Cells:
    """The code of a learner's notebook that defines something, cell by cell.

    Raises:
        FileNotFoundError: there is no copy.
        Unreadable: it is no notebook.
    """
    path = lesson.work(root)
    if not path.is_file():
        raise FileNotFoundError(f"`llmlab start {lesson.short}` makes your copy")
    out = []
    code = [c for c in read_notebook(path)["cells"] if c["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        kept = only_definitions(cell["source"])
        if kept:
            out.append((f"<{lesson.work(root).name}, code cell {number}>", kept))
    return tuple(out)


def only_definitions(source: str) -> str:
    """The source with every other statement blanked out: lines keep their numbers.

    What is no Python (a cell with magics, or half written) defines nothing.
    """
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        return ""
    kept = [node for node in body if isinstance(node, DEFINES)]
    wanted = {number for node in kept for number in _lines_of(node)}
    others = {number for node in body if node not in kept for number in _lines_of(node)}
    if wanted & others:  # two statements share a line
        return "\n".join(ast.unparse(node) for node in kept)
    lines = source.splitlines()
    out = [line if i in wanted else "" for i, line in enumerate(lines, 1)]
    return "\n".join(out) if kept else ""


def _lines_of(node: ast.stmt) -> range:
    """Where a statement stands, with its decorators."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(each.lineno for each in decorators)])
    return range(first, node.end_lineno + 1)


def run(cells: Cells) -> tuple[dict[str, Any], str]:
    """The names that cells define, and the first error among them or "".

    A cell that fails ends there; those after it run, as in a notebook.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    complaint = ""
    for where, source in cells:
        lines = source.splitlines(keepends=True)
        linecache.cache[where] = (len(source), None, lines, where)
        try:
            exec(compile(source, where, "exec"), names)
        except (Exception, SystemExit) as error:
            complaint = complaint or f"{where} raised {type(error).__name__}: {error}"
    return names, complaint


def function(own: Own) -> Callable:
    """The function of an exercise that was right when it was looked at.

    Raises:
        ValueError: it was not.
    """
    if not own.is_right:
        raise ValueError(f"own={own.name!r} is {WORDS[own.outcome]}: {own.why}")
    return run(own.cells)[0][own.name]


# Marking ------------------------------------------------------------------------------


def look(lesson: Lesson, root: Path, name: str) -> Own:
    """Read one exercise from the learner's notebook, and mark it."""
    began = time.monotonic()

    def found(outcome: str, why: str = "", cells: Cells = ()) -> Own:
        seconds = round(time.monotonic() - began, 2)
        return Own(lesson.slug, name, outcome, why, seconds, cells)

    try:
        cells = defining_cells(lesson, root)
    except FileNotFoundError as error:
        return found("no copy", str(error))
    except Unreadable as error:
        return found("unreadable", str(error))
    names, complaint = run(cells)
    if name not in names:
        return found("missing", complaint or f"no cell defines `{name}`")
    verdict = load_check(lesson).exercises[name].verdict(names[name])
    if verdict.outcome == "right":
        return found("right", cells=cells)
    return found(verdict.outcome, verdict.message.split("\n")[0])


def own(name: str, root: Path | None = None) -> Callable:
    """What `from mine import name` gives: the learner's function, marked just now.

    Raises:
        ImportError: no exercise has that name, several have, or it is not right yet.
    """
    try:
        root = root or course_root()
    except FileNotFoundError as error:
        raise ImportError(str(error)) from None
    asked = asking(root)
    if name not in asked:
        near = did_you_mean(get_close_matches(name, asked, n=3))
        raise ImportError(
            f"no exercise is called {name!r}. {near} A file of your own that is called"
            " mine.py cannot be imported: give it another name".replace("  ", " ")
        )
    if len(asked[name]) > 1:
        places = ", ".join(lesson.slug for lesson in asked[name])
        raise ImportError(
            f"{name!r} is asked for in several lessons: {places}. Name one:"
            f' `mine.lesson("{asked[name][0].short}").{name}`'
        )
    return checked(asked[name][0], name, root)


def checked(lesson: Lesson, name: str, root: Path) -> Callable:
    """The learner's function.

    Raises:
        ImportError: it is not right yet.
    """
    found = look(lesson, root, name)
    if found.is_right:
        return function(found)
    why = f" ({found.why})" if found.why else ""
    raise ImportError(
        f"{name} of {lesson.slug} is {WORDS[found.outcome]}{why}."
        f" `llmlab check {lesson.short}` marks it"
    )


def asking(root: Path) -> dict[str, list[Lesson]]:
    """exercise → the lessons that ask for one of that name."""
    out: dict[str, list[Lesson]] = {}
    for lesson in lessons():
        if lesson.exercise(root).is_file():
            for name in standing.exercise_names(lesson, root):
                out.setdefault(name, []).append(lesson)
    return out


class OfLesson:
    """The learner's functions of one lesson, each marked when it is asked for."""

    def __init__(self, name: str) -> None:
        self._lesson = find(name)
        self._root = course_root()

    def __dir__(self) -> list[str]:
        return standing.exercise_names(self._lesson, self._root)

    def __getattr__(self, name: str) -> Callable:
        known = self.__dir__()
        if name not in known:
            names = ", ".join(known)
            raise AttributeError(f"{self._lesson.slug} asks for {names}, not {name!r}")
        return checked(self._lesson, name, self._root)


# In a process of its own --------------------------------------------------------------


def collect(
    wanted: Sequence[tuple[str, str]],
    root: Path,
    *,
    seconds: float = LONGEST,
    told: Callable[[Own], None] = lambda own: None,
) -> list[Own]:
    """Look at each exercise, where the learner's code can do no harm to this process.

    Args:
        wanted: (lesson, exercise) pairs.
        seconds: that one exercise may take; one that takes longer is "slow".
        told: called with each as soon as it is known.
    """
    found: list[Own] = []
    while len(found) < len(wanted):
        left = wanted[len(found) :]
        for own in _looking(left, root, seconds):
            found.append(own)
            told(own)
    return found


def _looking(
    wanted: Sequence[tuple[str, str]], root: Path, seconds: float
) -> Iterable[Own]:
    """As many as one process gets through; one that it did not survive is the last."""
    command = [sys.executable, "-m", "llmlab.course.mine", str(root)]
    command += [word for pair in wanted for word in pair]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    lines: queue.Queue[str] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    reader.start()
    try:
        lines.get(timeout=START)  # it has imported what marks
        for lesson, name in wanted:
            try:
                line = lines.get(timeout=seconds)
            except queue.Empty:
                why = f"reading and marking it took over {seconds:g} seconds"
                yield Own(lesson, name, "slow", why, seconds)
                return
            if not line:
                yield Own(lesson, name, "error", "it ended the process that marks it")
                return
            told = json.loads(line)
            cells = tuple((where, source) for where, source in told.pop("cells"))
            yield Own(**told, cells=cells)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _read(stream: Any, lines: queue.Queue[str]) -> None:
    """Passes lines on; "" when there are no more."""
    with contextlib.suppress(ValueError):  # it was closed
        for line in stream:
            lines.put(line)
    lines.put("")


def _main(root: Path, words: Sequence[str]) -> None:
    """Prints a line when it is ready, then one for each exercise."""
    import torch  # noqa: F401  it takes seconds that are nobody's exercise

    out = sys.stdout
    sys.stdout = sys.stderr  # what the learner's code prints
    print("ready", file=out, flush=True)
    for lesson, name in zip(words[::2], words[1::2], strict=True):
        found = look(find(lesson), root, name)
        print(json.dumps(asdict(found)), file=out, flush=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2:])
