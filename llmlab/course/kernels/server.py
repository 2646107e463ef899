"""The warm process: imports everything once, then forks a kernel on request.

It has one thread at all times, and makes sure of that before each fork. NumPy's and
SciPy's OpenBLAS start threads when they are imported; OpenBLAS itself ends them before
a fork and starts as many again when they are needed, so one fork for nothing leaves the
process with a single thread.

It ends when its owner ends, when it was idle for long, when memory is short, and when
it is told to retire while it has no kernels.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmlab.course.kernels import memory
from llmlab.course.kernels.wire import NotOurs, check_peer, receive_request, send

IDLE_SECONDS = 600.0
REQUEST_SECONDS = 2.0  # for one request to arrive whole


@dataclass
class Running:
    """A kernel that this process started: its end, watched, and who is told of it."""

    pid: int
    watch: int  # a pidfd
    teller: socket.socket


@dataclass
class NewKernel:
    """In the new kernel: what was asked for, and the way to report."""

    request: dict[str, Any]
    streams: list[int]
    teller: socket.socket
    client: int  # a pidfd of the process that asked


@dataclass
class Server:
    """The loop. `serve` returns in the process that is to be a kernel, or never.

    Args:
        listener: the bound socket.
        owner: a pidfd of the process with which this one ends.
        close_in_child: further open files that no kernel may keep.
        idle: seconds without a kernel or a request after which it ends.
        available: bytes of memory that can be had.
    """

    listener: socket.socket
    owner: int
    path: Path
    close_in_child: list[int] = field(default_factory=list)
    idle: float = IDLE_SECONDS
    available: Callable[[], int] = memory.available
    running: list[Running] = field(default_factory=list)

    def serve(self) -> NewKernel | None:
        """Answers requests; returns `NewKernel` in a new kernel and None at the end."""
        last = time.monotonic()
        while True:
            poll = select.poll()
            poll.register(self.listener, select.POLLIN)
            poll.register(self.owner, select.POLLIN)
            for one in self.running:
                poll.register(one.watch, select.POLLIN)
            wait = None
            if not self.running:
                wait = max(0.0, last + self.idle - time.monotonic())
            ready = {
                file for file, _ in poll.poll(None if wait is None else wait * 1e3)
            }
            if self.reap(ready):
                last = time.monotonic()
            if self.owner in ready:
                return None
            if self.listener.fileno() in ready:
                last = time.monotonic()
                forked, stay = self.answer()
                if forked is not None:
                    return forked
                if not stay:
                    return None
            elif not self.running and time.monotonic() >= last + self.idle:
                return None

    def reap(self, ready: set[int]) -> int:
        """Tells of each kernel that ended, how it ended; returns how many did."""
        ended = [one for one in self.running if one.watch in ready]
        for one in ended:
            _, status = os.waitpid(one.pid, 0)
            with suppress(OSError):
                send(one.teller, {"exit": os.waitstatus_to_exitcode(status)})
            one.teller.close()
            os.close(one.watch)
            self.running.remove(one)
        return len(ended)

    def answer(self) -> tuple[NewKernel | None, bool]:
        """Takes one request. (what a new kernel needs, whether to go on)"""
        try:
            end, _ = self.listener.accept()
        except OSError:
            return None, True
        streams: list[int] = []
        kept = False
        try:
            end.settimeout(REQUEST_SECONDS)
            client = check_peer(end)
            request, streams = receive_request(end)
            if request.get("ask") == "retire":
                free = not self.running
                send(end, {"retired": free})
                return None, not free
            if request.get("ask") == "state":
                send(end, {"pid": os.getpid(), "kernels": len(self.running)})
                return None, True
            refused, stay = self.refuse()
            if refused:
                send(end, {"refused": refused})
                return None, stay
            os.utime(self.path)
            forked = self.fork(request, streams, end, client)
            kept = True
            return forked, True
        except (OSError, NotOurs) as error:
            with suppress(OSError):
                send(end, {"refused": str(error) or type(error).__name__})
            return None, True
        finally:
            if not kept:
                end.close()
                for file in streams:
                    os.close(file)

    def refuse(self) -> tuple[str, bool]:
        """(why no kernel can be forked now or nothing, whether to go on serving)."""
        if self.available() < memory.TO_FORK:
            return "memory is short", bool(self.running)
        if threads() != 1:
            return f"it has {threads()} threads, and a fork needs one", False
        return "", True

    def fork(
        self,
        request: dict[str, Any],
        streams: list[int],
        end: socket.socket,
        client: int,
    ) -> NewKernel | None:
        """Forks; `NewKernel` in the child, None in the warm process.

        Raises:
            OSError: the system refuses, or the process that asked is gone.
        """
        asked = os.pidfd_open(client)
        try:
            pid = os.fork()
        except OSError:
            os.close(asked)
            raise
        if pid == 0:
            for one in self.running:
                one.teller.close()
                os.close(one.watch)
            for file in (self.owner, *self.close_in_child):
                os.close(file)
            self.listener.close()
            return NewKernel(request, streams, end, asked)
        os.close(asked)
        for file in streams:
            os.close(file)
        self.running.append(Running(pid, os.pidfd_open(pid), end))
        with suppress(OSError):  # the kernel notices by itself that nobody waits
            send(end, {"pid": pid})
        return None


def threads() -> int:
    """How many threads this process has, those of C libraries among them."""
    return len(os.listdir("/proc/self/task"))
