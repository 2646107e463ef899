"""A pytest plugin beside nbval: bounds each cell in time and output, notices a dead
kernel, and records what happened.

`llmlab check` runs `pytest -p llmlab.course.grading.nbval_plugin --nbval-lax
copy.ipynb`; one JSON object per cell is written to the file named by LLMLAB_RECORD:
{"cell": index, "status": "ok" | "error" | "timeout" | "died", "verdict": …, "error":
…}.
"""

from __future__ import annotations

import json
import os
import queue
import re
import time
from pathlib import Path
from typing import Any

import pytest

from llmlab.course.grammar import leave_out_grammar

leave_out_grammar()  # here, because nbval imports nbformat after this

MIME = "application/vnd.llmlab.verdict+json"
PREAMBLE_SECONDS = 300.0  # the first cell is ours: it imports torch
# for what a cell printed to arrive, and for an interrupted cell to stop
OUTPUT_SECONDS = 15
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class KernelDied(Exception):
    """The kernel's process ended while a cell ran."""


def bound(kernel: Any, least: float) -> None:
    """Replaces the kernel's wait for a reply: `timeout` (or `least`) bounds the whole
    cell, and death ends the wait at once.
    """

    def await_reply(msg_id: str, timeout: float | None = None) -> None:
        end = time.monotonic() + max(timeout or 1e9, least)
        while True:
            try:
                message = kernel.get_message(stream="shell", timeout=0.2)
            except queue.Empty:
                if not kernel.is_alive():
                    raise KernelDied from None
                if time.monotonic() > end:
                    raise
                continue
            if message["parent_header"].get("msg_id") == msg_id:
                return

    kernel.await_reply = await_reply


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: Any) -> Any:
    """Bounds the kernel, runs the cell, and lets the next cells count even when this
    one timed out.
    """
    kernel = item.parent.kernel
    item.output_timeout = OUTPUT_SECONDS
    bound(kernel, least=PREAMBLE_SECONDS if item.cell_num == 0 else 0)
    try:
        return (yield)
    finally:
        item.llmlab_timed_out, item.parent.timed_out = item.parent.timed_out, False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    """Writes down what became of the cell."""
    report = yield
    if call.when == "call":
        entry = {
            "cell": item.cell.metadata.get("llmlab_index"),
            "seconds": round(call.duration, 2),
        } | outcome(item, call)
        with Path(os.environ["LLMLAB_RECORD"]).open("a", encoding="utf-8") as f:
            f.write(json.dumps(entry) + "\n")
    return report


def outcome(item: Any, call: Any) -> dict[str, Any]:
    """The status of one cell, with its verdict or error."""
    outputs = item.test_outputs or []
    entry: dict[str, Any] = {
        "status": "ok",
        "verdict": next(filter(None, map(_verdict, outputs)), None),
    }
    errors = [o for o in outputs if o.output_type == "error"]
    if errors:
        entry |= {
            "status": "error",
            "error": f"{errors[-1].ename}: {errors[-1].evalue}"[:2000],
            "where": _where(errors[-1]),
        }
    if call.excinfo is not None and not errors:
        entry |= {"status": "error", "error": str(call.excinfo.value)[:2000]}
    if call.excinfo is not None and (
        call.excinfo.errisinstance(KernelDied)
        or "Kernel dead" in str(call.excinfo.value)
    ):
        entry["status"] = "died"
    elif getattr(item, "llmlab_timed_out", False):
        entry["status"] = "timeout"
    if not item.parent.kernel.is_alive():
        entry["status"] = "timeout" if entry["status"] == "timeout" else "died"
        entry["killed"] = True
    return entry


def _verdict(output: Any) -> dict[str, Any] | None:
    return (
        output.get("data", {}).get(MIME)
        if output.output_type == "display_data"
        else None
    )


def _where(error: Any) -> str:
    """The traceback's arrow line: '----> 3 y = x @ w'."""
    text = ESCAPES.sub("", "\n".join(error.traceback))
    arrows = [line for line in text.splitlines() if re.match(r"-+> *\d+ ", line)]
    return re.sub(r"-+> *", "line ", arrows[0], count=1)[:200] if arrows else ""
