"""Threads that take turns, always in the same order: one runs, the others wait.

A rank keeps the turn until it has to wait for another. Then the next rank that can go
on gets it. So results, ledger, random numbers and printed lines never depend on timing,
and when nobody can go on, that is a deadlock, known at once. Each task has its own copy
of torch's global random state, as a forked process has.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch


@runtime_checkable
class Waiting(Protocol):
    """What a task waits for."""

    def ready(self) -> bool:
        """Whether it may go on."""


class Stopped(BaseException):
    """Unwinds a task after another has failed.

    Not an Exception, so that no `except Exception` stops it.
    """


def gone(threads: list[threading.Thread], seconds: float = 2.0) -> None:
    """Wait until the system has ended them (on Linux, where it can be seen).

    `join` returns before: their buffers of MKL are still being given back, under a
    lock. A process that is forked in that moment has the lock, and nobody opens it.
    """
    end = time.monotonic() + seconds
    for thread in threads:
        task = f"/proc/self/task/{thread.native_id}"
        while os.path.exists(task) and time.monotonic() < end:
            time.sleep(0.0001)


class Turns:
    """Runs n functions in threads, one at a time.

    `stuck(waits)` is asked for the error to raise when nobody can go on; waits[i] is
    what task i waits for, None if it is done.
    """

    def __init__(self, stuck: Callable[[list], BaseException]) -> None:
        self.stuck = stuck
        self.failed: tuple[int, BaseException] | None = None

    def run(self, functions: list[Callable]) -> list:
        """Run all to the end and return their results.

        Re-raise the first failure (`self.failed` has the task's number).

        Interrupting the caller (Ctrl-C) stops the tasks too.
        """
        n = len(functions)
        self.waits: list[Waiting | None] = [None] * n
        self.alive = [True] * n
        self.gates = [threading.Semaphore(0) for _ in range(n)]
        self.random = [torch.get_rng_state() for _ in range(n)]
        self.results: list = [None] * n
        grad = torch.is_grad_enabled()
        self.threads = [
            threading.Thread(
                target=self._task, args=(i, f, grad), daemon=True, name=f"rank {i}"
            )
            for i, f in enumerate(functions)
        ]
        before = torch.get_rng_state()
        try:
            for thread in self.threads:
                thread.start()
            self._give(0)
            for thread in self.threads:
                thread.join()
            gone(self.threads)
        except BaseException as interrupt:
            self._fail(-1, interrupt)
            self._interrupt()
            raise
        finally:
            torch.set_rng_state(before)
        if self.failed:
            raise self.failed[1]
        return self.results

    def wait(self, i: int, what: Waiting) -> None:
        """Called by task i: give the turn away until `what` is ready."""
        if self.failed:
            raise Stopped
        if what.ready():
            return
        self.waits[i] = what
        self._pass_on(i)
        self.gates[i].acquire()
        self.waits[i] = None
        if self.failed:
            raise Stopped

    def _task(self, i: int, function: Callable, grad: bool) -> None:
        self.gates[i].acquire()
        try:
            if not self.failed:
                with torch.set_grad_enabled(grad):
                    self.results[i] = function()
        except Stopped:
            pass
        except BaseException as error:
            self._fail(i, error)
        self.alive[i] = False
        if not self.failed and any(self.alive):
            self._pass_on(i)

    def _pass_on(self, i: int) -> None:
        """Give the turn to the next task after i that can go on; none: a deadlock."""
        n = len(self.alive)
        self.random[i] = torch.get_rng_state()
        for j in [(i + k) % n for k in range(1, n + 1)]:
            if self.alive[j] and (self.waits[j] is None or self.waits[j].ready()):
                return self._give(j)
        self._fail(
            -1,
            self.stuck(
                [
                    w if alive else None
                    for w, alive in zip(self.waits, self.alive, strict=True)
                ]
            ),
        )

    def _give(self, i: int) -> None:
        torch.set_rng_state(self.random[i])
        self.gates[i].release()

    def _fail(self, i: int, error: BaseException) -> None:
        """Keep the first failure and wake everybody, to unwind."""
        if self.failed is None:
            self.failed = (i, error)
            for gate in self.gates:
                gate.release()

    def _interrupt(self) -> None:
        """Raise `Stopped` in the thread that is running (the others wake and stop by
        themselves).
        """
        for thread in self.threads:
            if thread.is_alive() and thread.ident:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread.ident), ctypes.py_object(Stopped)
                )
