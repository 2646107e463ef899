"""A pytest plugin beside nbval: limits each cell, and records what happened.

It bounds a cell's time and output, and notices when the kernel dies.

`llmlab check` runs

    pytest -p llmlab.course.grading.nbval_plugin --nbval-lax copy.ipynb

One JSON object per cell is written to the file that LLMLAB_RECORD names:

    {"cell": index, "status": "ok" | "error" | "timeout" | "died",
     "verdict": …, "error": …}
"""

from __future__ import annotations

import json
import os
import queue
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmlab.course.grammar import leave_out_grammar

leave_out_grammar()  # here, because nbval imports nbformat after this

MIME = "application/vnd.llmlab.verdict+json"
NUMBERS: dict[int, str] = {}  # cell → the number that its verdict must carry
PREAMBLE_SECONDS = 300.0  # the first cell is ours: it imports torch
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class KernelDied(Exception):
    """The kernel's process ended while a cell ran."""


def bound(kernel: Any, least: float) -> None:
    """Replaces the kernel's wait for a reply.

    `timeout` (or `least`) bounds the whole cell, and the wait ends at once when the
    kernel dies.
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


def hand_over(kernel: Any, number: str) -> None:
    """Sends `number` along with the request that runs a check's cell.

    It goes in the message's metadata, so it stands neither in a cell nor in a file.
    """
    session = kernel.kc.session
    plain = type(session).msg

    def msg(kind: str, *args: Any, **options: Any) -> dict[str, Any]:
        message = plain(session, kind, *args, **options)
        if kind == "execute_request":
            message["metadata"]["llmlab_number"] = number
        return message

    session.msg = msg


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests() -> Any:
    """Reads the numbers, before pytest takes the standard input away."""
    for index, number in json.load(sys.stdin).items():
        NUMBERS[int(index)] = number
    return (yield)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that `llmlab check` gives."""
    parser.addoption(
        "--llmlab-stop-seconds",
        type=float,
        default=15.0,
        help="for a cell's output to arrive, and for an interrupted cell to stop",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: Any) -> Any:
    """Bounds the kernel and runs the cell.

    The next cells count even when this one timed out.
    """
    kernel = item.parent.kernel
    item.output_timeout = item.config.getoption("--llmlab-stop-seconds")
    bound(kernel, least=PREAMBLE_SECONDS if item.cell_num == 0 else 0)
    hand_over(kernel, NUMBERS.get(item.cell.metadata.get("llmlab_index"), ""))
    try:
        return (yield)
    finally:
        item.llmlab_timed_out = item.parent.timed_out
        item.parent.timed_out = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    """Writes down what became of the cell."""
    report = yield
    if call.when == "call":
        entry = {
            "cell": item.cell.metadata.get("llmlab_index"),
            "seconds": round(call.duration, 2),
        }
        entry |= outcome(item, call)
        with Path(os.environ["LLMLAB_RECORD"]).open("a", encoding="utf-8") as f:
            f.write(json.dumps(entry) + "\n")
    return report


def outcome(item: Any, call: Any) -> dict[str, Any]:
    """The status of one cell, with its verdict or error."""
    outputs = item.test_outputs or []
    failure = call.excinfo  # what nbval raised, if it did
    number = NUMBERS.get(item.cell.metadata.get("llmlab_index"))
    entry: dict[str, Any] = {"status": "ok", "verdict": _verdict(outputs, number)}
    errors = [o for o in outputs if o.output_type == "error"]
    if errors:
        last = errors[-1]
        entry["status"] = "error"
        entry["error"] = f"{last.ename}: {last.evalue}"[:2000]
        entry["where"] = _where(last)
    elif failure is not None:
        entry["status"] = "error"
        entry["error"] = str(failure.value)[:2000]
    if failure is not None and _kernel_died(failure):
        entry["status"] = "died"
    elif getattr(item, "llmlab_timed_out", False):
        entry["status"] = "timeout"
    if not item.parent.kernel.is_alive():
        entry["killed"] = True
        if entry["status"] != "timeout":
            entry["status"] = "died"
    return entry


def _kernel_died(failure: Any) -> bool:
    return failure.errisinstance(KernelDied) or "Kernel dead" in str(failure.value)


def _verdict(outputs: list[Any], number: str | None) -> dict[str, Any] | None:
    """The verdict among the outputs of a cell.

    It is one when it stands alone and carries the number of this cell, which is taken
    out: what is recorded can be read by later cells.
    """
    found = []
    for output in outputs:
        if output.output_type == "display_data" and MIME in output.get("data", {}):
            found.append(output["data"][MIME])
    if len(found) != 1 or not isinstance(found[0], dict):
        return None
    signed = number is not None and found[0].pop("token", None) == number
    return found[0] if signed else None


def _where(error: Any) -> str:
    """The traceback's arrow line: '----> 3 y = x @ w'."""
    text = ESCAPES.sub("", "\n".join(error.traceback))
    for line in text.splitlines():
        if re.match(r"-+> *\d+ ", line):
            return re.sub(r"-+> *", "line ", line, count=1)[:200]
    return ""
