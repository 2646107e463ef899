"""The front's side of the worker: starts it, watches it, starts it again.

    submit   a request: its number; what becomes of it arrives in the caller's queue
    abort    nobody waits for it any more
    health   whether the worker is ready, and what happened when it is not

Two threads read from and write to the worker's pipe, so that HTTP is answered whatever
the worker does. A worker that has ended, was killed, or has not moved for `stall`
seconds is replaced. Whoever waited for it is told so, with the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from llmlab.inference.serving import worker
from llmlab.inference.serving.openai_api import Refused

TRIES = 3  # starts in a row that fail before it gives up
PATIENCE = 5.0  # seconds that a worker has to stop when it is told to


@dataclass
class Health:
    """How the worker is.

    Attributes:
        state: "starting", "ready", "broken" (it cannot be started) or "stopped".
        reason: why it is not ready, or why it was started again.
        restarts: how often it was.
        left_out: pieces that failed, with the reason: ours stand in their place.
        counts: how full the engine is, after its last step.
    """

    state: str = "starting"
    reason: str = "the model is being loaded"
    restarts: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Running:
    """One worker process."""

    process: Any
    connection: Connection
    piece: Any  # the name of the learner's function that runs now
    outbox: queue.SimpleQueue


class Supervisor:
    """Owns the worker. All methods are called on the event loop's thread.

    Args:
        prepare: what the worker does first: see `worker.Prepare`.
        method: how the process starts: "forkserver", "spawn" or "fork".
        preload: modules that the fork server imports, once.
        stall: seconds without a word from a worker that has something to do.
        told: called with each change of health that somebody may want to read.
        stepped: called with the counts after each step.
    """

    def __init__(
        self,
        prepare: worker.Prepare,
        *,
        method: str = "forkserver",
        preload: tuple[str, ...] = ("llmlab.inference.engine",),
        stall: float = 60.0,
        told: Callable[[str], None] = lambda text: None,
        stepped: Callable[[Mapping[str, Any]], None] = lambda counts: None,
    ) -> None:
        self.health = Health()
        self._prepare = prepare
        self._context = multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload(list(preload))
        self._stall = stall
        self._told = told
        self._stepped = stepped
        self._queues: dict[int, asyncio.Queue] = {}
        self._next = 0
        self._failed_starts = 0
        self._heard = time.monotonic()
        self._killed_for = ""
        self._running: Running | None = None
        self._ready = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watch: asyncio.Task | None = None

    # What the server calls ----------------------------------------------------------

    def start(self) -> None:
        """Starts the worker, and does not wait for it."""
        self._loop = asyncio.get_running_loop()
        self._watch = self._loop.create_task(self._watching())
        self._begin()

    async def ready(self) -> None:
        """Waits until the worker is ready.

        Raises:
            RuntimeError: it cannot be started; the text says why.
        """
        await self._ready.wait()
        if self.health.state != "ready":
            raise RuntimeError(self.health.reason)

    @property
    def pid(self) -> int | None:
        """The worker's process."""
        return self._running.process.pid if self._running else None

    @property
    def in_flight(self) -> int:
        """Requests that wait for an answer."""
        return len(self._queues)

    def submit(
        self,
        inbox: asyncio.Queue,
        tokens: list[int],
        sampling: Mapping[str, Any],
        adapter: str | None,
    ) -> int:
        """Hands a request over.

        Into `inbox` come (number, "token", token, finished), and for a request that is
        not served, or not to its end, (number, "refused", why) or (number, "failed",
        why).

        Raises:
            Refused: there is no worker now.
        """
        if self.health.state != "ready":
            raise Refused(
                f"the worker is {self.health.state}: {self.health.reason}",
                status=503,
                code="worker_not_ready",
                wait=2 if self.health.state == "starting" else 30,
            )
        number = self._next
        self._next += 1
        if not self._queues:
            self._heard = time.monotonic()  # it had nothing to say before
        self._queues[number] = inbox
        self._running.outbox.put(("add", number, tokens, dict(sampling), adapter))
        return number

    def abort(self, number: int) -> None:
        """Ends a request, if it has not ended by itself."""
        if self._queues.pop(number, None) is not None and self._running:
            self._running.outbox.put(("abort", number))

    async def close(self) -> None:
        """Stops the worker; it is killed when it does not stop by itself."""
        if self._watch:
            self._watch.cancel()
        self.health.state = "stopped"
        self.health.reason = "the server is shutting down"
        self._ready.set()
        self._fail_all("the server is shutting down")
        running = self._running
        self._running = None
        if running is None:
            return
        running.outbox.put(("stop",))
        await asyncio.to_thread(running.process.join, PATIENCE)
        self._end(running)

    # The worker's life --------------------------------------------------------------

    def _begin(self) -> None:
        ours, theirs = self._context.Pipe()
        piece = self._context.RawArray(ctypes.c_char, worker.LONGEST_NAME + 1)
        is_fork = self._context.get_start_method() == "fork"
        process = self._context.Process(
            target=worker.run,
            args=(theirs, piece, self._prepare, sorted(self.health.left_out), is_fork),
            name="llmlab-worker",
            daemon=True,
        )
        process.start()
        theirs.close()  # else its end would not be seen
        running = Running(process, ours, piece, queue.SimpleQueue())
        self._running = running
        self._heard = time.monotonic()
        for target in (self._reading, self._writing):
            threading.Thread(target=target, args=(running,), daemon=True).start()

    def _reading(self, running: Running) -> None:
        """A thread: passes on what the worker says."""
        while True:
            try:
                message = running.connection.recv()
            except (EOFError, OSError):
                self._soon(self._ended, running)
                return
            self._soon(self._hear, running, message)

    def _writing(self, running: Running) -> None:
        """A thread: tells the worker, however long it takes to listen."""
        while True:
            message = running.outbox.get()
            if message is None:
                return
            try:
                running.connection.send(message)
            except (OSError, ValueError):
                return  # it has ended: `_reading` sees that, too

    def _soon(self, function: Callable, *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            self._loop.call_soon_threadsafe(function, *args)

    def _hear(self, running: Running, message: tuple) -> None:
        if running is not self._running:
            return  # of a worker that has been replaced
        self._heard = time.monotonic()
        kind, *rest = message
        getattr(self, f"_hear_{kind}")(*rest)

    def _hear_ready(self, facts: dict[str, Any]) -> None:
        self._failed_starts = 0
        self.health.state = "ready"
        self.health.counts = facts["counts"]
        self._stepped(facts["counts"])
        if not self.health.restarts and not self.health.left_out:
            self.health.reason = ""
        self._ready.set()
        self._told("ready")

    def _hear_broken(self, why: str) -> None:
        """It could not load what it serves: another try would end in the same way."""
        self._failed_starts = TRIES
        self._killed_for = f"the worker could not start: {why}"

    def _hear_step(self, events: list, counts: dict[str, Any]) -> None:
        self.health.counts = counts
        for number, token, finished in events:
            inbox = self._queues.get(number)
            if finished:
                self._queues.pop(number, None)
            if inbox is not None:
                inbox.put_nowait((number, "token", token, finished))
        self._stepped(counts)

    def _hear_refused(self, number: int, why: str) -> None:
        inbox = self._queues.pop(number, None)
        if inbox is not None:
            inbox.put_nowait((number, "refused", why))

    def _hear_failed(self, numbers: list[int], why: str, pieces: list[str]) -> None:
        for piece in pieces:
            self._leave_out(piece, why)
        if pieces:
            why = f"your {' or '.join(pieces)} failed while serving: {why}"
        for number in numbers:
            inbox = self._queues.pop(number, None)
            if inbox is not None:
                inbox.put_nowait((number, "failed", why))
        if not pieces:
            self._told(f"a step failed ({why}); the engine has been made anew")

    def _leave_out(self, piece: str, why: str) -> None:
        """Notes that a learner's function is not used any more."""
        self.health.left_out[piece] = why
        self._told(
            f"your {piece} failed while serving: {why}. From now on ours stands in its"
            " place"
        )

    def _ended(self, running: Running) -> None:
        """The pipe is closed: the process is gone, or going."""
        if running is not self._running:
            return
        self._running = None
        running.process.join(1)
        why = self._killed_for or f"the worker {_how(running.process.exitcode)}"
        self._killed_for = ""
        piece = running.piece.value.decode(errors="replace")
        self._end(running)
        if piece:
            self._leave_out(piece, why)
            why = f"your {piece} failed while serving: {why}"
        self._fail_all(why)
        was_ready = self.health.state == "ready"
        self._failed_starts = 0 if was_ready else self._failed_starts + 1
        self.health.reason = why
        if self._failed_starts >= TRIES:
            self.health.state = "broken"
            self._ready.set()
            self._told(f"{why}. It is not started again")
            return
        self.health.state = "starting"
        self.health.restarts += 1
        self._ready.clear()
        self._told(f"{why}. It is being started again")
        self._begin()

    def _end(self, running: Running) -> None:
        """Nothing of it stays: no process, no thread, no open file."""
        if running.process.is_alive():
            running.process.kill()
        running.process.join()
        running.outbox.put(None)
        running.connection.close()

    def _fail_all(self, why: str) -> None:
        for number, inbox in self._queues.items():
            inbox.put_nowait((number, "failed", why))
        self._queues.clear()

    async def _watching(self) -> None:
        """Kills a worker that has something to do and has not moved for too long."""
        while True:
            await asyncio.sleep(min(1.0, self._stall / 4))
            silent = time.monotonic() - self._heard
            busy = self.health.state == "ready" and self._queues
            if busy and silent > self._stall and self._running:
                self._killed_for = f"the worker was silent for {self._stall:g} seconds"
                self._running.process.kill()
                self._heard = time.monotonic()


def _how(code: int | None) -> str:
    """How a process ended."""
    if code is None or code >= 0:
        return f"ended with status {code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"
