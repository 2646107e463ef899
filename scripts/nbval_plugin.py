"""A pytest plugin over nbval: records each notebook's time and memory, and holds fresh exercises to their rule.

A notebook whose last cell leaves a process running fails.

With `--fresh-exercises`, a notebook as it is given out must fail at its check cells and nowhere else. Records go to
the folder `LLMLAB_RECORD`, one JSON file a notebook; the book's "last verified" page is made from them.
"""

from __future__ import annotations

import json
import os
import time
from datetime import date
from pathlib import Path

import psutil
import pytest
from nbval.plugin import IPyNbCell, IPyNbFile


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fresh-exercises", action="store_true", help="each check cell must fail, and no other cell")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in {item.parent: item for item in items if isinstance(item, IPyNbCell)}.values():
        item.is_last = True
    if not config.getoption("--fresh-exercises"):
        return
    for item in items:
        if isinstance(item, IPyNbCell) and "check" in item.cell.metadata.get("tags", []):
            item.add_marker(pytest.mark.xfail(strict=True, reason="not solved yet"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item):
    started = time.time()
    outcome = yield
    notebook = item.parent
    if isinstance(notebook, IPyNbFile):
        notebook.seconds = getattr(notebook, "seconds", 0.0) + time.time() - started
        notebook.peak = max(getattr(notebook, "peak", 0.0), peak_mib(notebook))
        record(notebook, item.config.rootpath)
        if getattr(item, "is_last", False) and outcome.excinfo is None and (left := left_running(notebook)):
            outcome.force_exception(AssertionError(f"the notebook leaves processes behind: {', '.join(left)}"))


def left_running(notebook: IPyNbFile, seconds: float = 10.0) -> list[str]:
    """Children of the kernel that are there now and still there after some seconds."""
    try:
        children = psutil.Process(notebook.kernel.km.provisioner.pid).children(recursive=True)
    except (psutil.Error, AttributeError):
        return []
    _, alive = psutil.wait_procs(children, timeout=seconds)
    return [" ".join(process.cmdline())[-200:] for process in alive if process.is_running()]


def peak_mib(notebook: IPyNbFile) -> float:
    """The most memory that the kernel and its children hold now, or on Linux ever held."""
    try:
        kernel = psutil.Process(notebook.kernel.km.provisioner.pid)
        return sum(highest(process) for process in [kernel, *kernel.children(recursive=True)]) / 2**20
    except (psutil.Error, AttributeError):
        return 0.0


def highest(process: psutil.Process) -> int:
    """Bytes: the process's own high-water mark where the system keeps one."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return process.memory_info().rss


def record(notebook: IPyNbFile, root: Path) -> None:
    folder = os.environ.get("LLMLAB_RECORD")
    if not folder:
        return
    name = Path(notebook.path).resolve().relative_to(root).as_posix()
    took = {"seconds": round(notebook.seconds, 1), "peak_mib": round(notebook.peak), "date": date.today().isoformat()}
    text = json.dumps({"notebook": name, **took})
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{name.replace('/', '__')}.json").write_text(text)
