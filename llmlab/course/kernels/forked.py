"""A kernel that was forked elsewhere, with the methods of a `Popen`."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import subprocess
from contextlib import suppress
from typing import Any

from llmlab.course.kernels.starting import Cold
from llmlab.course.kernels.wire import Lines

FORK_SECONDS = 5.0  # for the warm process to fork
READY_SECONDS = 30.0  # for the kernel to bind its ports
EXIT_SECONDS = 1.0  # for the exit status of a process that has ended
UNKNOWN = 1  # the exit status when the warm process ended before it could tell


class Forked:
    """A kernel that is no child of this process, with the methods of a `Popen`.

    Its end is seen through a pidfd; its exit status is told by the warm process.
    """

    stdin = stdout = stderr = None

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.lines = Lines()
        self.pid = 0
        self.watch = -1
        self.ports: dict[str, int] = {}
        self.returncode: int | None = None

    async def started(self) -> None:
        """Waits until the kernel has bound its ports.

        Raises:
            Cold: the kernel was refused.
            OSError: the warm process or the kernel ended.
            TimeoutError: one of them took too long.
        """
        self.end.setblocking(False)
        loop = asyncio.get_running_loop()
        wait = FORK_SECONDS
        while not self.ports:
            data = await asyncio.wait_for(loop.sock_recv(self.end, 1 << 12), wait)
            if not data:
                raise ConnectionError("it ended")
            for message in self.lines.take(data):
                self.note(message)
            if self.pid:
                wait = READY_SECONDS
        if not self.pid:
            raise ConnectionError("it did not say which process the kernel is")

    def note(self, message: dict[str, Any]) -> None:
        """Takes one message in.

        Raises:
            Cold: it is a refusal.
        """
        if "refused" in message:
            raise Cold(f"the warm process refused: {message['refused']}")
        if "pid" in message:
            self.pid = message["pid"]
            self.watch = os.pidfd_open(self.pid)
        if "ready" in message:
            self.ports = message["ready"]
        if "exit" in message:
            self.returncode = message["exit"]

    def give_up(self) -> None:
        """Makes sure that no half-started kernel stays."""
        if self.watch >= 0:
            with suppress(OSError):
                signal.pidfd_send_signal(self.watch, signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """Closes what is open here."""
        self.end.close()
        if self.watch >= 0:
            os.close(self.watch)
            self.watch = -1

    def poll(self) -> int | None:
        """The exit status, or None while the kernel runs."""
        if self.returncode is None and readable(self.watch, 0):
            self.read_status()
            self.close()
        return self.returncode

    def read_status(self) -> None:
        """Waits a moment for the exit status of the kernel, which has ended."""
        while self.returncode is None:
            data = b""
            if readable(self.end.fileno(), EXIT_SECONDS):
                with suppress(OSError):
                    data = self.end.recv(1 << 12)
            if not data:
                self.returncode = UNKNOWN
                return
            for message in self.lines.take(data):
                self.note(message)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the kernel's end and returns its exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        if self.returncode is None and not readable(self.watch, timeout):
            raise subprocess.TimeoutExpired("kernel", timeout or 0)
        status = self.poll()
        return UNKNOWN if status is None else status

    def send_signal(self, number: int) -> None:
        """Sends a signal to the kernel's process, if it still runs."""
        if self.poll() is None:
            signal.pidfd_send_signal(self.watch, number)

    def terminate(self) -> None:
        """Asks the kernel to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the kernel."""
        self.send_signal(signal.SIGKILL)


def readable(file: int, seconds: float | None) -> bool:
    """Whether there is something to read, within so many seconds."""
    watch = select.poll()
    watch.register(file, select.POLLIN)
    return bool(watch.poll(None if seconds is None else seconds * 1000))
