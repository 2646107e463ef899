"""A run's whole family of processes: what it started, and what those started.

A notebook's cells may start anything: a process in a group of its own, one that lives
on when its parent ends. Each inherits a variable that only this run has. So it is found
by its parents as long as they live, and by the variable afterwards.

The warm process (`llmlab.course.kernels`) is left alone, whichever run started it: it
serves the next one, too, and ends with its owner. A kernel that was forked from it ends
by itself when who asked for it is gone.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import psutil

WARM = "llmlab.course.kernels.warm_process"
ROUNDS = 20  # a process may start another one while it is being ended
SIGNALS = ("SIGTERM", "SIGHUP")


def members(root: int | None, variable: str, value: str) -> list[psutil.Process]:
    """The processes of a run, this one left out.

    Args:
        root: the run's first process; None: it is gone.
        variable: the name of an environment variable that only this run has.
        value: what it holds.
    """
    found: dict[int, psutil.Process] = {}
    if root is not None:
        with suppress(psutil.Error):
            process = psutil.Process(root)
            for each in (process, *process.children(recursive=True)):
                found[each.pid] = each
    for each in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if each.pid not in found and each.environ().get(variable) == value:
                found[each.pid] = each
    found.pop(psutil.Process().pid, None)
    return [process for process in found.values() if not is_warm(process)]


def is_warm(process: psutil.Process) -> bool:
    """Whether it is the warm process, or a kernel that was forked from it."""
    try:
        return any(WARM in word for word in process.cmdline())
    except psutil.Error:
        return False


def end(root: int | None, variable: str, value: str) -> None:
    """Kills all members of a run, and waits until they are gone."""
    for _ in range(ROUNDS):
        living = [p for p in members(root, variable, value) if not _is_over(p)]
        if not living:
            return
        for process in living:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(living, timeout=1)


def _is_over(process: psutil.Process) -> bool:
    """Whether it has ended, although its parent may not have taken notice yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Inside, a signal to end raises SystemExit, so that what is running is ended too.

    It does nothing outside the main thread, where signals cannot be handled.
    """
    before = {}
    for name in SIGNALS:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is None or signal.getsignal(number) is signal.SIG_IGN:
            continue  # ignored, as under nohup: it stays so
        with suppress(ValueError):
            before[number] = signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # once is enough: what follows cleans up
    raise SystemExit(128 + number)
