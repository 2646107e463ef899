"""The process that owns the engine: requests in, tokens out.

    front (HTTP)  ── ("add", number, tokens, sampling, adapter) ──►  worker
                  ── ("abort", number) ───────────────────────────►
                  ◄── ("ready", facts) ────────────────────────────
                  ◄── ("step", events, counts) ────────────────────
                  ◄── ("refused", number, why) ────────────────────
                  ◄── ("failed", numbers, why, pieces) ────────────
                  ◄── ("broken", why) ─────────────────────────────

A request has the number that the front gave it. An event is (number, token, finished).

The engine runs in a process of its own, for three reasons: a step takes all of a core,
and HTTP has to be answered meanwhile; what a learner's function does to this process,
it does to no other; and when the process ends, its memory is free.

A function of a learner's that raises ends the requests that were running, by name of
the function. The engine is then made anew, with ours in its place.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping
from multiprocessing.connection import Connection
from typing import Any

# the names of pieces to leave out → an engine
Make = Callable[[Collection[str]], Any]
# loads the model, once; called in the worker: (mark, which piece runs) → Make
Prepare = Callable[[Callable[[str], None]], Make]
LONGEST_NAME = 64  # bytes of a piece's name, in memory that both processes see


def marked(name: str, piece: Callable, mark: Callable[[str], None]) -> Callable:
    """The piece, with its name written down while it runs.

    If it never comes back, or takes the process with it, the front can say whose fault
    it was.
    """

    def call(*args: Any) -> Any:
        mark(name)
        try:
            return piece(*args)
        finally:
            mark("")

    return call


def run(
    connection: Connection,
    running_piece: Any,
    prepare: Prepare,
    without: Collection[str],
    is_fork: bool = False,
) -> None:
    """What the process does until it is told to stop, or nobody listens any more.

    Args:
        running_piece: memory that both processes see, for the name of a piece.
        without: names of pieces that failed before, and are not used.
        is_fork: whether it was forked from the front itself.
    """
    if is_fork:
        let_go(connection.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def mark(name: str) -> None:
        running_piece.value = name.encode()[:LONGEST_NAME]

    inbox: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    try:
        worker = Worker(connection, prepare(mark), set(without))
    except Exception as error:  # of any kind: the front has to be told
        connection.send(("broken", f"{type(error).__name__}: {error}"))
        return
    while worker.take(inbox):
        worker.step()


def let_go(kept: int) -> None:
    """Closes what a fork has inherited: the front's clients, its end of the pipe.

    As long as a fork holds it, too, nothing that the front closes is closed. The
    numbers stay taken, for objects that are not ours still believe in them.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/dev/fd"):
        number = int(name)
        if number > 2 and number not in (kept, null):
            with contextlib.suppress(OSError):  # that of the listing itself
                os.fstat(number)
                os.dup2(null, number)


def _listen(connection: Connection, inbox: queue.SimpleQueue) -> None:
    """Passes messages on, so that the front never waits for a step to end."""
    while True:
        try:
            inbox.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)  # the front is gone: whatever is computed, nobody reads


class Worker:
    """An engine, and the numbers that the front has given to its requests.

    Attributes:
        requests: number of the front → number of the engine.
        numbers: the other way round.
        waiting: engine's number → when it came, for those that have not begun.
    """

    def __init__(self, connection: Connection, make: Make, without: set[str]) -> None:
        self.connection = connection
        self.make = make
        self.without = without
        self.engine = make(without)
        self.requests: dict[int, int] = {}
        self.numbers: dict[int, int] = {}
        self.waiting: dict[int, float] = {}
        self.send("ready", self.facts())

    def send(self, *message: Any) -> None:
        """Tells the front; ends the process when it is gone."""
        try:
            self.connection.send(message)
        except OSError:
            os._exit(0)

    def facts(self) -> dict[str, Any]:
        """What the front may want to know."""
        return {
            "counts": counts(self.engine),
            "replaced": sorted(self.engine.pieces.pieces.replaced),
        }

    def take(self, inbox: queue.SimpleQueue) -> bool:
        """Does what the front asked for; waits for it while there is nothing to do.

        Returns whether to go on.
        """
        while True:
            try:
                message = inbox.get(block=self.engine.idle)
            except queue.Empty:
                return True
            if message[0] == "stop":
                return False
            if message[0] == "add":
                self.add(*message[1:])
            else:
                self.guarded(self.abort, *message[1:])

    def guarded(self, act: Callable, *args: Any) -> None:
        """Does it; a new engine begins where it fails."""
        from llmlab.inference.engine import PieceError

        try:
            act(*args)
        except PieceError as error:
            self.recover(str(error), error.piece)
        except Exception as error:  # of any kind: nobody may wait for ever
            self.recover(f"{type(error).__name__}: {error}", None)

    def add(
        self,
        number: int,
        tokens: list[int],
        sampling: Mapping[str, Any],
        adapter: str | None,
    ) -> None:
        """A new request."""
        from llmlab.inference.engine import SamplingParams

        try:
            id = self.engine.add(tokens, SamplingParams(**sampling), adapter)
        except ValueError as error:
            self.send("refused", number, str(error))
            return
        self.numbers[id] = number
        self.requests[number] = id
        self.waiting[id] = time.monotonic()

    def abort(self, number: int) -> None:
        """Nobody waits for this one any more; it may have ended meanwhile."""
        id = self.requests.pop(number, None)
        if id is not None:
            del self.numbers[id]
            self.waiting.pop(id, None)
            self.engine.abort(id)
            self.send("step", [], counts(self.engine))

    def step(self) -> None:
        """One step of the engine, and what it wrote."""
        if not self.engine.idle:
            self.guarded(self._step)

    def _step(self) -> None:
        began = time.monotonic()
        events = []
        for event in self.engine.step():
            number = self.numbers.get(event.id)
            if number is None:
                continue  # it was aborted
            events.append((number, event.token, event.finished))
            if event.finished:
                del self.numbers[event.id]
                del self.requests[number]
        more = {"queued": self._begun(began), "step": time.monotonic() - began}
        self.send("step", events, counts(self.engine) | more)

    def _begun(self, now: float) -> list[float]:
        """How long those waited that are not waiting any more."""
        still = {request.id for request in self.engine.waiting}
        begun = [id for id in self.waiting if id not in still]
        return [now - self.waiting.pop(id) for id in begun]

    def recover(self, why: str, piece: str | None) -> None:
        """All that was asked for is lost: it is said so, and a new engine begins."""
        lost = sorted(self.requests)
        self.requests = {}
        self.numbers = {}
        self.waiting = {}
        pieces = piece.split(", ") if piece else []
        self.without.update(pieces)
        self.send("failed", lost, why, pieces)
        self.engine.close()
        self.engine = None  # its memory, before there is another
        self.engine = self.make(self.without)
        self.send("ready", self.facts())


def counts(engine: Any) -> dict[str, Any]:
    """How full it is."""
    return {
        "running": len(engine.running),
        "waiting": len(engine.waiting),
        "blocks_used": engine.blocks_in_use,
        "blocks": engine.config.num_blocks,
        "found": engine.stats.found,
    }
