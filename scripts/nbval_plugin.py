"""A pytest plugin over nbval: records each notebook's time and memory.

It also holds fresh exercises to their rule.

A notebook whose last cell leaves a process running fails.

Outputs are compared as `llmlab.course.numbers` says: words exactly, numbers within a
tolerance that a cell may declare by a tag (`numbers-within-5%`). Source code shown from
the package is compared exactly.

With `--fresh-exercises`, a notebook as it is given out must fail at its check cells and
nowhere else. Records go to the folder `LLMLAB_RECORD`, one JSON file a notebook; the
book's "last verified" page is made from them.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import psutil
import pytest

from llmlab.course.grammar import leave_out_grammar

leave_out_grammar()  # before nbformat is imported

from nbformat import NotebookNode  # noqa: E402
from nbval.plugin import IPyNbCell, IPyNbFile  # noqa: E402

from llmlab.course.numbers import EXACT, Tolerance, differences, tolerance_of  # noqa: E402

# The kinds of output that hold text for people; drawings and data are compared exactly.
TEXTS = ("text", "text/plain", "text/html", "text/markdown", "text/latex", "evalue")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fresh-exercises",
        action="store_true",
        help="each check cell must fail, and no other cell",
    )


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    cells = [item for item in items if isinstance(item, IPyNbCell)]
    last_of_notebook = {}
    for item in cells:
        compare_numbers(item)
        last_of_notebook[item.parent] = item
    for item in last_of_notebook.values():
        item.is_last = True
    if not config.getoption("--fresh-exercises"):
        return
    for item in cells:
        if "check" in item.cell.metadata.get("tags", []):
            item.add_marker(pytest.mark.xfail(strict=True, reason="not solved yet"))


def compare_numbers(item: IPyNbCell) -> None:
    """Put the comparison of numbers before nbval's own, in one cell.

    Raises:
        pytest.UsageError: a tag that declares no tolerance that is known.
    """
    try:
        tolerance = tolerance_of(item.cell.metadata.get("tags", []))
    except ValueError as error:
        where = f"{item.parent.path}: cell {item.cell_num}"
        raise pytest.UsageError(f"{where}: {error}") from None
    as_nbval_does = item.compare_outputs

    def compare(found, stored, skip_compare=None) -> bool:
        settled, said = settle(item, found, stored, tolerance)
        same = as_nbval_does(settled, stored, skip_compare)
        if not same:
            item.comparison_traceback.extend(said)
        return same

    item.compare_outputs = compare


def settle(
    item: IPyNbCell,
    found: list[NotebookNode],
    stored: list[NotebookNode],
    tolerance: Tolerance,
) -> tuple[list[NotebookNode], list[str]]:
    """The outputs found, each replaced by the stored one where both say the same.

    The second value says what differs in the others, a sentence each.
    """
    found = copy.deepcopy(found)
    said = []
    old = by_kind(stored)
    for kind, places in by_kind(found).items():
        pairs = zip(places, old.get(kind, []), strict=False)
        for (holder, key), (old_holder, old_key) in pairs:
            stored_text = old_holder[old_key]
            why = differences(
                item.sanitize(stored_text),
                item.sanitize(holder[key]),
                EXACT if is_source(holder) else tolerance,
                html=kind == "text/html",
            )
            if not why:
                holder[key] = stored_text
            said += [f"  {kind}: {sentence}" for sentence in why]
    return found, said


def by_kind(
    outputs: list[NotebookNode],
) -> dict[str, list[tuple[NotebookNode, str]]]:
    """Where each kind of text lies, in order: nbval compares outputs kind by kind."""
    found = defaultdict(list)
    for output in outputs:
        for kind, holder, key in texts_of(output):
            found[kind].append((holder, key))
    return found


def texts_of(output: NotebookNode) -> Iterator[tuple[str, NotebookNode, str]]:
    """(kind, what holds it, under which key) of one output's texts."""
    for holder in (output, output.get("data", {})):
        for key in TEXTS:
            if isinstance(holder.get(key), str):
                stream = output.get("name", "") if key == "text" else key
                yield stream, holder, key


def is_source(holder: NotebookNode) -> bool:
    """Whether an output shows source code, as Pygments marks it.

    No CPU changes that.
    """
    return 'class="highlight"' in holder.get("text/html", "")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item):
    started = time.time()
    outcome = yield
    notebook = item.parent
    if isinstance(notebook, IPyNbFile):
        notebook.seconds = getattr(notebook, "seconds", 0.0) + time.time() - started
        notebook.peak = max(getattr(notebook, "peak", 0.0), peak_mib(notebook))
        record(notebook, item.config.rootpath)
        if getattr(item, "is_last", False) and outcome.excinfo is None:
            left = left_running(notebook)
            if left:
                message = f"the notebook leaves processes behind: {', '.join(left)}"
                outcome.force_exception(AssertionError(message))


def left_running(notebook: IPyNbFile, seconds: float = 10.0) -> list[str]:
    """Children of the kernel that are there now and still there after some seconds."""
    try:
        kernel = psutil.Process(notebook.kernel.km.provisioner.pid)
        children = kernel.children(recursive=True)
    except (psutil.Error, AttributeError):
        return []
    _, alive = psutil.wait_procs(children, timeout=seconds)
    running = [process for process in alive if process.is_running()]
    return [" ".join(process.cmdline())[-200:] for process in running]


def peak_mib(notebook: IPyNbFile) -> float:
    """The most memory that the kernel and its children ever held.

    Where the system is not Linux, what they hold now.
    """
    try:
        kernel = psutil.Process(notebook.kernel.km.provisioner.pid)
        processes = [kernel, *kernel.children(recursive=True)]
        return sum(map(highest, processes)) / 2**20
    except (psutil.Error, AttributeError):
        return 0.0


def highest(process: psutil.Process) -> int:
    """Bytes: the process's own high-water mark where the system keeps one."""
    try:
        text = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return process.memory_info().rss
    for line in text.splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return process.memory_info().rss


def record(notebook: IPyNbFile, root: Path) -> None:
    folder = os.environ.get("LLMLAB_RECORD")
    if not folder:
        return
    name = Path(notebook.path).resolve().relative_to(root).as_posix()
    took = {
        "seconds": round(notebook.seconds, 1),
        "peak_mib": round(notebook.peak),
        "date": date.today().isoformat(),
    }
    text = json.dumps({"notebook": name, **took})
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{name.replace('/', '__')}.json").write_text(text)
