"""The batcher in virtual time: what a delay does to waiting and to the number of runs.

Clients send requests at given times, and each may send its next one when it has its
answer. Instances take batches as `next_batch` decides. No second passes: a run of
minutes is computed in milliseconds, and twice the same.

    latency      from sending a request to its answer
    p99          99 of 100 requests have theirs by then
    executions   how often the model ran

Simplified: a network takes no time, and a batch of n takes what `seconds(n)` says.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmlab.inference.model_server.batching import Decide, Waiting, next_batch
from llmlab.inference.model_server.config import Batching


@dataclass
class Run:
    """What came out.

    Attributes:
        latencies: of each request, in seconds, in the order of the answers.
        batches: the size of each execution.
        seconds: from the first request to the last answer.
        busy: seconds that instances computed, all together.
    """

    latencies: list[float] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    seconds: float = 0.0
    busy: float = 0.0

    @property
    def p99(self) -> float:
        """See `percentile`."""
        return percentile(self.latencies, 99)

    @property
    def throughput(self) -> float:
        """Requests in a second."""
        return len(self.latencies) / self.seconds


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of the values that at least `percent` of them do not exceed.

    Raises:
        ValueError: no values, or a percent that is not above 0 and at most 100.
    """
    if not values:
        raise ValueError("values is empty")
    if not 0 < percent <= 100:
        raise ValueError(f"percent={percent} must be above 0 and at most 100")
    rank = math.ceil(len(values) * percent / 100)
    return sorted(values)[rank - 1]


def choose_delay(
    latencies: dict[float, Sequence[float]], bound: float, percent: float = 99
) -> float | None:
    """The longest delay with which `percent` of the requests stay within `bound`.

    Args:
        latencies: delay → the latencies that were measured with it.
    Returns:
        None where no delay does it.
    """
    good = [
        delay
        for delay, measured in latencies.items()
        if percentile(measured, percent) <= bound
    ]
    return max(good, default=None)


def poisson(rate: float, count: int, seed: int = 0) -> list[float]:
    """Times of `count` requests that come independently, `rate` a second."""
    draw = random.Random(seed)
    times = []
    now = 0.0
    for _ in range(count):
        now += draw.expovariate(rate)
        times.append(now)
    return times


def simulate(
    starts: Sequence[float],
    seconds: Callable[[int], float],
    batching: Batching,
    *,
    each: int = 1,
    apart: float = 0.0,
    instances: int = 1,
    decide: Decide = next_batch,
) -> Run:
    """Serve all requests.

    Args:
        starts: when each client sends its first request.
        seconds: of an execution, by its size.
        each: requests of a client, each sent when the one before is answered.
        apart: seconds between the answers of a batch, which leave one after the other:
            so the next requests of these clients do not come at once.
    Raises:
        ValueError: no client, or fewer than one request or instance.
    """
    if not starts or each < 1 or instances < 1:
        raise ValueError("starts must hold a client, each and instances be 1 or more")
    first = min(starts)
    coming = [(start, each) for start in starts]  # (time, requests left of this client)
    heapq.heapify(coming)
    free = [0.0] * instances  # when each instance can begin
    queue: list[Waiting] = []
    run = Run()
    now = 0.0
    while coming or queue:
        now = max(now, min(free))
        while coming and coming[0][0] <= now:
            time, left = heapq.heappop(coming)
            queue.append(Waiting(time, work=left))
        count, again = decide(queue, now, batching)
        if count == 0:  # nothing happens before the next request, or the delay's end
            events = [coming[0][0]] if coming else []
            now = min(events if again is None else [*events, again])
            continue
        taken = seconds(count)
        heapq.heapreplace(free, now + taken)
        run.batches.append(count)
        run.busy += taken
        for place, request in enumerate(queue[:count]):
            answered = now + taken + (place + 1) * apart
            run.latencies.append(answered - request.arrived)
            if request.work > 1:
                heapq.heappush(coming, (answered, request.work - 1))
            run.seconds = max(run.seconds, answered - first)
        del queue[:count]
    return run
