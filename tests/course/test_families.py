"""Nothing that a run started lives on when it is told to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llmlab.course import families
from tests.course.learner import ROOT, WELCOME, code, course, notebook

NAME = "LLMLAB_TEST_FAMILY"
# It starts a process in a session of its own, ends the one between, and waits.
PARENT = """
import os, subprocess, sys, time
if os.fork() == 0:
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    print(child.pid, flush=True)
    os._exit(0)
os.wait()
{then}
"""


def start(then: str, value: str) -> tuple[subprocess.Popen, psutil.Process]:
    """(a parent, its orphaned grandchild)."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(then=then)],
        env=os.environ | {NAME: value},
        stdout=subprocess.PIPE,
        text=True,
    )
    return parent, psutil.Process(int(parent.stdout.readline()))


def gone(process: psutil.Process, seconds: float = 10) -> bool:
    """Whether it ends in time."""
    try:
        process.wait(seconds)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def heed_signals() -> None:
    """In a new process: under nohup, or in a shell's background, some are ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("then", ["time.sleep(600)", ""], ids=["lives", "is gone"])
def test_an_orphan_in_a_session_of_its_own_is_ended(then, tmp_path):
    value = str(tmp_path)
    parent, orphan = start(then, value)
    if not then:
        parent.wait(20)
    families.end(parent.pid, NAME, value)
    parent.wait(20)
    assert gone(orphan)
    assert families.members(None, NAME, value) == []


def test_another_run_is_left_alone(tmp_path):
    parent, orphan = start("time.sleep(600)", str(tmp_path / "other"))
    families.end(None, NAME, str(tmp_path))
    assert orphan.is_running() and parent.poll() is None
    families.end(parent.pid, NAME, str(tmp_path / "other"))
    parent.wait(20)
    assert gone(orphan)


def test_the_warm_process_is_left_alone(tmp_path):
    from llmlab.course.kernels.starting import PROGRAM

    assert families.WARM in PROGRAM
    program = f"import time; time.sleep(600)  # {PROGRAM!r}"
    warm = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {NAME: str(tmp_path)}
    )
    families.end(None, NAME, str(tmp_path))
    assert warm.poll() is None
    warm.kill()
    warm.wait()


def test_this_process_is_no_member(monkeypatch):
    mine = psutil.Process().pid
    found = families.members(mine, "PATH", os.environ["PATH"])
    assert mine not in [process.pid for process in found]


@pytest.mark.parametrize("name", families.SIGNALS)
def test_a_signal_lets_what_is_running_be_ended(name, tmp_path):
    script = """
import time
from llmlab.course.families import ending_on_signals
with ending_on_signals():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("ended", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=heed_signals,
    )
    assert process.stdout.readline() == "ready\n"
    number = getattr(signal, name)
    process.send_signal(number)
    assert process.communicate(timeout=20)[0] == "ended\n"
    assert process.returncode == 128 + number


def test_the_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with families.ending_on_signals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


CELL = """
import multiprocessing, os, subprocess, time
from pathlib import Path
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
fork = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
fork.start()
pids = [os.getpid(), child.pid, fork.pid]
Path({file!r}).write_text(" ".join(map(str, pids)) + ".")
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_lives_on_after_a_check_that_was_stopped(tmp_path, number):
    root = course(tmp_path / "course")
    file = tmp_path / "pids"

    def add(cells):
        cells.insert(1, code(CELL.format(file=str(file)), "a"))

    path = WELCOME.work(root)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(notebook(change=add)))
    command = [sys.executable, "-m", "llmlab.course.cli.main", "check", "--cold"]
    check = subprocess.Popen(
        [*command, "welcome"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=heed_signals,
    )
    try:
        started = [psutil.Process(pid) for pid in _pids(file, check)]
        check.send_signal(number)
        assert check.wait(30) != 0
        assert [p for p in started if not gone(p, 3)] == []
    finally:
        check.kill()
        for process in psutil.process_iter():
            if process.pid in _pids(file, None):
                process.kill()


def _pids(file: Path, check: subprocess.Popen | None) -> list[int]:
    """The processes that the cell names, once it has named them."""
    end = time.monotonic() + 120
    while check is not None and time.monotonic() < end and check.poll() is None:
        if file.is_file() and file.read_text().endswith("."):
            break
        time.sleep(0.1)
    return [int(pid) for pid in file.read_text().rstrip(".").split()]
