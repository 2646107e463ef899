"""Runs of pytest that begin as forks of one process, which has imported nbval."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

PROGRAM = """
import json, os, signal, sys
import llmlab.course.grading.nbval_plugin  # before nbval: it leaves a grammar out
import nbval.plugin
import pytest

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a run that ended is no zombie
for line in sys.stdin:
    asked = json.loads(line)
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.dup2(os.open(asked["input"], os.O_RDONLY), 0)  # waits for who writes
    sys.stdin = open(0, closefd=False)
    output = os.open(asked["output"], os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.exit(pytest.main(asked["arguments"]))
"""


class ForkedPytest:
    """Stands for the module `subprocess` where `python -m pytest` is started."""

    PIPE = subprocess.PIPE
    STDOUT = subprocess.STDOUT
    DEVNULL = subprocess.DEVNULL
    TimeoutExpired = subprocess.TimeoutExpired

    def __init__(self) -> None:
        self.program = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """Ends the process; a run that still goes on does not end with it."""
        self.program.communicate()

    def Popen(self, command, *, cwd, env, start_new_session, **options):
        """Starts a run, with the streams that a graded copy has."""
        if command[:3] != [sys.executable, "-m", "pytest"] or not start_new_session:
            raise ValueError(f"{command} is no run of pytest in a session of its own")
        folder = Path(tempfile.mkdtemp())
        (folder / "output").touch()
        os.mkfifo(folder / "input")
        asked = {"arguments": command[3:], "cwd": str(cwd), "env": env}
        asked |= {name: str(folder / name) for name in ("input", "output")}
        print(json.dumps(asked), file=self.program.stdin, flush=True)
        return Run(int(self.program.stdout.readline()), folder)


class Run:
    """One run, with the methods of a `Popen` that are used of it."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid = pid
        self.folder = folder
        try:
            self.process = psutil.Process(pid)
        except psutil.NoSuchProcess:
            self.process = None  # it has ended

    def communicate(self, text: str, timeout: float) -> tuple[str, None]:
        """Writes `text` to it; (what it printed, nothing), at its end."""
        (self.folder / "input").write_text(text)
        try:
            self._end(timeout)
        except psutil.TimeoutExpired:
            raise subprocess.TimeoutExpired("pytest", timeout) from None
        return (self.folder / "output").read_text(errors="replace"), None

    def wait(self) -> None:
        """Waits for its end."""
        self._end(None)
        shutil.rmtree(self.folder)

    def _end(self, timeout: float | None) -> None:
        if self.process is not None:
            self.process.wait(timeout)
