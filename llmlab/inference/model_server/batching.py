"""Dynamic batching: when do requests that wait leave, and how many together?

The decision is a pure function of the queue and the time, `next_batch`. Requests stand
in a queue in the order in which they came. Those at its front that may share an
execution (the same shapes, no more than `max_batch` together) are the pending batch.
In this order:

    1. the oldest has waited for `delay`                   → the whole pending batch
    2. its front makes up a preferred size; of several the largest counts → that front
    3. none does, and the next request would pass the largest preferred size
                                                           → all before that request
    4. it cannot grow: full, or the next has another shape → the whole pending batch
    5. delay is 0                                          → the whole pending batch
    6. else                                                → all wait, see rule 1

This is the rule of Triton's dynamic_batch_scheduler.cc, `GetDynamicBatch`, for an
instance that is free. Simplified: when all instances are busy, Triton fixes a batch in
advance and lets it grow while it waits, also beyond a preferred size; here the decision
is made when an instance asks. No priorities, no timeouts of single requests.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmlab.inference.model_server.config import Batching


@dataclass(frozen=True)
class Waiting:
    """A request in the queue.

    Attributes:
        arrived: the time, in seconds.
        size: how many inferences it holds, its own first dimension.
        shape: what must be the same for all in a batch.
        work: what is to be done; the decision does not look at it.
    """

    arrived: float
    size: int = 1
    shape: tuple = ()
    work: Any = field(default=None, compare=False)


# (requests that leave now, or 0; then the time at which to ask again, else None)
Decision = tuple[int, float | None]
Decide = Callable[[Sequence[Waiting], float, Batching], Decision]


def next_batch(queue: Sequence[Waiting], now: float, batching: Batching) -> Decision:
    """How many requests at the front of the queue leave now, as one batch.

    Returns:
        (count, None), or (0, when to ask again); (0, None) for an empty queue.
    """
    if not queue:
        return 0, None
    late = batching.delay > 0 and now >= queue[0].arrived + batching.delay
    total = 0  # inferences of the pending batch
    best = 0  # requests at the front that leave at once
    stopped = False  # whether the batch cannot grow
    count = 0  # requests of the pending batch
    for request in queue:
        with_it = total + request.size
        if count and with_it > batching.preferred[-1] and best == 0:
            best = count  # rule 3
        fits = with_it <= batching.max_batch and request.shape == queue[0].shape
        if count and not fits:
            stopped = True
            break
        total = with_it
        count += 1
        if total in batching.preferred:
            best = count  # rule 2
    if best and not late:
        return best, None
    full = total >= batching.preferred[-1]
    if late or stopped or full or batching.delay == 0:
        return count, None
    return 0, queue[0].arrived + batching.delay


def one_by_one(queue: Sequence[Waiting], now: float, batching: Batching) -> Decision:
    """Without dynamic batching: each request leaves alone, as soon as it can."""
    return min(1, len(queue)), None


class QueueFull(Exception):
    """More requests wait than may."""


class Batcher:
    """A queue that several threads fill, and the instances of a model empty.

    Args:
        decide: `next_batch`, or another of its signature.
    """

    def __init__(
        self,
        batching: Batching,
        decide: Decide = next_batch,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.batching = batching
        self._decide = decide
        self._clock = clock
        self._queue: deque[Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, work: Any, size: int = 1, shape: tuple = ()) -> None:
        """A request comes.

        Raises:
            QueueFull: `max_queue` requests wait already.
            RuntimeError: the batcher is closed.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("the model is being unloaded")
            limit = self.batching.max_queue
            if limit and len(self._queue) >= limit:
                raise QueueFull("Exceeds maximum queue size")
            self._queue.append(Waiting(self._clock(), size, shape, work))
            self._changed.notify_all()

    def take(self) -> list[Waiting] | None:
        """The next batch, for which an instance waits here; None after `close`."""
        with self._changed:
            while True:
                if self._closed:
                    return None
                now = self._clock()
                count, again = self._decide(self._queue, now, self.batching)
                if not 0 <= count <= len(self._queue):
                    raise ValueError(f"{count} of {len(self._queue)} requests to leave")
                if count:
                    return [self._queue.popleft() for _ in range(count)]
                wait = None if again is None else max(0.0, again - now)
                self._changed.wait(wait)

    def close(self) -> list[Waiting]:
        """Nobody waits here any more. Returns the requests that nobody will serve."""
        with self._changed:
            self._closed = True
            left = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        return left
