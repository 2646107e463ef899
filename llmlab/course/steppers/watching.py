"""A communicator that writes down what a rank sends and receives, in its own order.

The tensor that is reduced is made such that each message shows what is in it. With p
ranks it has p chunks of p numbers. Rank r brings 16^r as number j of its chunk j, and
zeros elsewhere. So whatever is added to what, number j of p numbers counts in its
hexadecimal digits how often the chunk j of each rank is in the sum.

    p     ranks, at most 6: sums stay below 2^24, which float32 holds exactly
    cell  p numbers, as they were sent: for each chunk j, how often each rank is in it
"""

from __future__ import annotations

import linecache
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmlab.parallelism.runtime import (
    CollectiveMismatch,
    Communicator,
    DeadlockError,
    Ledger,
    Link,
    World,
    communicator,
)

MOST_RANKS = 6
BASE = 16
SUMMANDS = tuple[int, ...]  # for each rank, how often it is in a sum
Cell = tuple[SUMMANDS, ...]  # for each chunk, its summands in this place


@dataclass(frozen=True)
class Message:
    """What one rank sends to another in one step, and the line that sends it."""

    step: int
    src: int
    dst: int
    cells: tuple[Cell, ...]
    line: str


@dataclass(frozen=True)
class Entry:
    """One line of a rank's log: it "sends" or "receives" a message, or "returns"."""

    what: str
    cells: tuple[Cell, ...]
    message: Message | None = None


@dataclass(frozen=True)
class Recording:
    """What the ranks did, each in its own order.

    `error`: what ended the run, "" if all ranks have returned.
    """

    p: int
    logs: tuple[tuple[Entry, ...], ...]
    messages: tuple[Message, ...]
    error: str = ""


def own(rank: int, p: int) -> SUMMANDS:
    """The summands of what a rank brings: itself."""
    return tuple(int(r == rank) for r in range(p))


def brought(rank: int, p: int) -> Tensor:
    """What a rank brings: p chunks of p numbers."""
    return torch.eye(p).flatten() * float(BASE**rank)


def cells_of(x: Tensor, p: int, who: str) -> tuple[Cell, ...]:
    """What is in a tensor, p numbers at a time.

    Raises:
        ValueError: it is not made of whole chunks, or its numbers are not sums.
    """
    if x.numel() % p:
        raise ValueError(
            f"{who} {x.numel()} numbers; the stepper follows whole chunks, and a chunk"
            f" of its tensor has {p}"
        )
    cells = []
    for values in x.detach().flatten().view(-1, p).tolist():
        cells.append(tuple(_digits(value, p, who) for value in values))
    return tuple(cells)


def _digits(value: float, p: int, who: str) -> SUMMANDS:
    """How often each rank is in a number."""
    if not math.isfinite(value) or value != int(value) or not 0 <= value < BASE**p:
        raise ValueError(
            f"{who} {value:g}, which is no sum of what the ranks have brought"
        )
    digits = []
    left = int(value)
    for _ in range(p):
        digits.append(left % BASE)
        left //= BASE
    return tuple(digits)


class _Sent:
    """What a rank has sent, with the line that did it. Its step is not known yet."""

    def __init__(self, dst: int, value: Tensor, line: str) -> None:
        self.dst = dst
        self.value = value
        self.line = line


class _Received:
    """What a rank has received."""

    def __init__(self, src: int, value: Tensor) -> None:
        self.src = src
        self.value = value


class WatchedComm(Communicator):
    """Passes everything on to `comm`, and logs messages."""

    def __init__(self, comm: Communicator, log: list) -> None:
        self.comm = comm
        self.log = log
        self.rank = comm.rank
        self.size = comm.size
        self.ranks = comm.ranks
        self.ledger = comm.ledger
        self.device = comm.device

    def _start(self, call):
        if call.op == "send":
            self.log.append(_Sent(call.root, call.value.clone(), calling_line()))
        handle = self.comm._start(call)
        if call.op == "recv":
            return _WatchedHandle(handle, call.root, self.log)
        return handle

    def split(self, color: int | None, key: int | None = None) -> Communicator | None:
        """A group of its own. What it sends is not logged."""
        return self.comm.split(color, key)


class _WatchedHandle:
    """Logs a message when it has been waited for."""

    def __init__(self, handle, src: int, log: list) -> None:
        self.handle = handle
        self.src = src
        self.log = log
        self.is_logged = False

    def wait(self) -> Tensor:
        received = self.handle.wait()
        if not self.is_logged:
            self.is_logged = True
            self.log.append(_Received(self.src, received.clone()))
        return received


def calling_line() -> str:
    """The text of the nearest line outside the communicators."""
    frame = sys._getframe(1)
    inside = (__file__, communicator.__file__)
    while frame.f_code.co_filename in inside or frame.f_code.co_filename[:2] == "<@":
        frame = frame.f_back
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()


def record(
    fn, p: int, lines: Mapping[tuple[int, int], list[str]] | None = None
) -> Recording:
    """Run `fn(comm, x)` on p ranks of a `World`, and write down what they send.

    A deadlock is recorded; what a rank raises itself is raised.

    Args:
        lines: (from, to) → what to show as the line of each message, in their order,
            in place of the line of code that sends it.
    Raises:
        ValueError: p is not 2 … 6; what is sent or returned is not made of chunks.
    """
    if not isinstance(p, int) or not 2 <= p <= MOST_RANKS:
        raise ValueError(f"p={p!r} must be 2 … {MOST_RANKS} ranks")
    # every message takes one unit of virtual time, so its start is its step
    world = World(p, link=Link(latency=1.0, bandwidth=math.inf))
    logs: list[list] = [[] for _ in range(p)]

    def watched(comm):
        return fn(WatchedComm(comm, logs[comm.rank]), brought(comm.rank, p))

    error = ""
    results = []
    try:
        results = world.run(watched)
    except (DeadlockError, CollectiveMismatch) as stuck:
        error = str(stuck)
    messages = _messages(world.ledger, logs, p, lines or {})
    entries = [_entries(log, rank, messages, p) for rank, log in enumerate(logs)]
    for rank, result in enumerate(results):
        _check_result(result, rank, p)
        cells = cells_of(result, p, f"rank {rank} returns")
        entries[rank].append(Entry("returns", cells))
    flat = [message for found in messages.values() for message in found]
    flat.sort(key=lambda message: (message.step, message.src, message.dst))
    return Recording(p, tuple(map(tuple, entries)), tuple(flat), error)


def _messages(
    ledger: Ledger, logs: list[list], p: int, lines: Mapping
) -> dict[tuple, list[Message]]:
    """(from, to) → the messages that arrived, in order, with their steps."""
    found: dict[tuple[int, int], list[Message]] = {}
    for event in ledger.events("send"):
        pair = (event.rank, event.peer)
        sent = [
            entry
            for entry in logs[event.rank]
            if isinstance(entry, _Sent) and entry.dst == event.peer
        ]
        already = found.setdefault(pair, [])
        entry = sent[len(already)]
        cells = cells_of(entry.value, p, f"rank {event.rank} sends")
        line = lines[pair][len(already)] if pair in lines else entry.line
        message = Message(int(event.start), *pair, cells, line)
        already.append(message)
    return found


def _entries(log: list, rank: int, messages: dict, p: int) -> list[Entry]:
    """A rank's log, with the messages in it."""
    entries = []
    counts: dict[tuple[int, int], int] = {}
    for item in log:
        is_send = isinstance(item, _Sent)
        pair = (rank, item.dst) if is_send else (item.src, rank)
        k = counts.get(pair, 0)
        counts[pair] = k + 1
        what = "sends" if is_send else "receives"
        arrived = messages.get(pair, [])
        message = arrived[k] if k < len(arrived) else None
        cells = cells_of(item.value, p, f"rank {rank} {what}")
        entries.append(Entry(what, cells, message))
    return entries


def _check_result(result, rank: int, p: int) -> None:
    if not isinstance(result, Tensor) or result.numel() != p * p:
        said = type(result).__name__
        if isinstance(result, Tensor):
            said = f"a tensor of shape {tuple(result.shape)}"
        raise ValueError(
            f"rank {rank} returns {said}; an all-reduce of a tensor of {p * p} numbers"
            f" returns one of {p * p} numbers"
        )
