"""Runs a graded copy: pytest with nbval and our plugin, bounded in time.

It runs in a process group of its own. When it ends, or is stopped, whatever its cells
started ends with it.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from llmlab.course import families

CELL_SECONDS = 60.0  # one cell, the check included
STOP_SECONDS = 15.0  # for a cell that was interrupted to stop
NOTEBOOK_SECONDS = 900.0  # all of it
RECORD = "LLMLAB_RECORD"  # names the record; no other run has its value
DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY")  # no window may open


def run_copy(
    notebook: dict[str, Any],
    checks: list[int],
    cell_seconds: float = CELL_SECONDS,
    stop_seconds: float = STOP_SECONDS,
    seconds: float = NOTEBOOK_SECONDS,
) -> tuple[list[dict[str, Any]], str]:
    """Runs each cell through nbval in one fresh kernel.

    Args:
        checks: the cells that mark. For each a number is drawn that its verdict must
            carry. It stands in no cell and no file: the plugin reads it from its
            standard input, and hands it over with the request to run the cell.

    Returns:
        what the plugin recorded, cell by cell (see
        `llmlab.course.grading.nbval_plugin`); and a complaint when it ended early.
    """
    with tempfile.TemporaryDirectory(prefix="llmlab-check-") as name:
        folder = Path(name)
        copy = folder / "copy.ipynb"
        record = folder / "record.jsonl"
        copy.write_text(json.dumps(notebook), encoding="utf-8")
        (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        limits = [
            f"--nbval-cell-timeout={cell_seconds:g}",
            f"--llmlab-stop-seconds={stop_seconds:g}",
        ]
        numbers = {index: secrets.token_hex(16) for index in checks}
        output, ended = _pytest(folder, copy, record, limits, numbers, seconds)
        entries = []
        if record.exists():
            for line in record.read_text(encoding="utf-8").splitlines():
                if line.endswith("}"):  # else it was stopped while it wrote
                    entries.append(json.loads(line))
    if not ended:
        return entries, f"the notebook was stopped after {seconds:g} seconds"
    if len(entries) < len(notebook["cells"]):
        return entries, f"nbval ended early: {output.strip()[-600:]}"
    return entries, ""


def _pytest(
    folder: Path,
    copy: Path,
    record: Path,
    limits: list[str],
    numbers: dict[int, str],
    seconds: float,
) -> tuple[str, bool]:
    """(what it printed, whether it ended by itself)."""
    command = [sys.executable, "-m", "pytest"]
    for plugin in ("llmlab.course.grading.nbval_plugin", "nbval.plugin"):  # ours first
        command += ["-p", plugin]
    command += ["-p", "no:cacheprovider"]
    command += [
        "--nbval-lax",
        "--nbval-current-env",
        "--nbval-kernel-startup-timeout=180",
        *limits,
        "--disable-warnings",
        "-q",
    ]
    command += ["--rootdir", str(folder), "-c", str(folder / "pytest.ini"), str(copy)]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(folder, record),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        return process.communicate(json.dumps(numbers), timeout=seconds)[0], True
    except subprocess.TimeoutExpired:
        return "", False
    finally:  # also on Ctrl-C and, under `llmlab check`, when it is told to end
        families.end(process.pid, RECORD, str(record))
        process.wait()


def environment(folder: Path, record: Path) -> dict[str, str]:
    """The learner's environment, without what makes one run differ from another."""
    drop = {*DISPLAYS, "PYTEST_ADDOPTS", "PYTHONSTARTUP"}
    own = {}
    for name, value in os.environ.items():
        if name not in drop and not name.startswith(("COV_", "COVERAGE_")):
            own[name] = value
    return own | {
        RECORD: str(record),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "IPYTHONDIR": str(folder / "ipython"),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
