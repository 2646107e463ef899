"""Serving in virtual time: what a way to batch does to a trace of requests.

A step takes

    a + b · tokens + c · cached   seconds

    a       what every step costs, first of all to read the weights
    b       to compute one token more
    c       to read one key and value that is in the cache
    tokens  computed in the step, padding included
    cached  tokens in the cache of all requests of the step, before it

Four ways:

    static      a batch begins when so many requests are there, and ends with its
                longest; shorter ones are padded at both ends
    dynamic     as static, but the first of a batch waits for a delay at most
    continuous  every step is planned anew (`schedule`), prompts whole
    chunked     as continuous, prompts in parts

Simplified: steps do not overlap, and the time to plan them is not counted. Static and
dynamic batches have the memory that they need.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from llmlab.inference.continuous_batching.schedule import (
    Job,
    Limits,
    Plan,
    blocks_needed,
    check_plan,
    schedule,
)
from llmlab.inference.continuous_batching.traces import Request

Scheduler = Callable[[Sequence[Job], Sequence[Job], int, Limits], Plan]


@dataclass(frozen=True)
class Cost:
    """Seconds of a step."""

    a: float
    b: float
    c: float = 0.0

    def __post_init__(self) -> None:
        for name in ("a", "b", "c"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"{name}={value!r} must not be below 0")
        if self.a + self.b == 0:
            raise ValueError("a=0 and b=0: a step takes time")

    def seconds(self, tokens: int, cached: int) -> float:
        """Of a step with so many tokens."""
        return self.a + self.b * tokens + self.c * cached


@dataclass(frozen=True)
class Step:
    """One step that was made.

    Attributes:
        start, seconds: when, and for how long.
        tokens: request → its tokens that were computed.
        padding: tokens that were computed for nobody.
        waiting: requests that were there and did not run.
        blocks: in use.
        preempted: requests sent away.
    """

    start: float
    seconds: float
    tokens: dict[int, int]
    padding: int = 0
    waiting: int = 0
    blocks: int = 0
    preempted: tuple[int, ...] = ()


@dataclass
class Served:
    """What became of a trace.

    Attributes:
        requests: the trace.
        times: of each request, when its tokens were written.
        steps: in order.
    """

    requests: list[Request]
    times: list[list[float]]
    steps: list[Step] = field(default_factory=list)

    @property
    def end(self) -> float:
        """When the last token was written."""
        return max(times[-1] for times in self.times)

    @property
    def throughput(self) -> float:
        """Tokens written per second, from the first arrival to the last token."""
        written = sum(map(len, self.times))
        return written / (self.end - self.requests[0].arrival)

    @property
    def busy(self) -> float:
        """Share of the computed tokens that was for somebody."""
        useful = sum(sum(step.tokens.values()) for step in self.steps)
        return useful / (useful + sum(step.padding for step in self.steps))

    @property
    def running(self) -> float:
        """Requests in a step, the mean over time in which a step is made."""
        total = sum(step.seconds for step in self.steps)
        return sum(len(s.tokens) * s.seconds for s in self.steps) / total

    @property
    def preempted(self) -> int:
        """How often a request was sent away."""
        return sum(len(step.preempted) for step in self.steps)

    def latencies(self) -> tuple[list[float], list[float]]:
        """Times to first tokens, and times between tokens."""
        return latencies([r.arrival for r in self.requests], self.times)


def latencies(
    arrivals: Sequence[float], times: Sequence[Sequence[float]]
) -> tuple[list[float], list[float]]:
    """What users wait for.

    Args:
        arrivals: of each request.
        times: of each request, when its tokens were written.
    Returns:
        TTFT: for each request, from its arrival to its first token.
        ITL: all times between two tokens that follow each other in one request.
    """
    ttft = [
        written[0] - arrival for arrival, written in zip(arrivals, times, strict=True)
    ]
    itl = [later - earlier for written in times for earlier, later in pairwise(written)]
    return ttft, itl


def percentile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least q% of the values do not exceed.

    Raises:
        ValueError: no values, or q not above 0 and at most 100.
    """
    if not values or not 0 < q <= 100:
        raise ValueError(
            f"q={q!r} of {len(values)} values: q is above 0, at most 100, and there is"
            " a value"
        )
    return sorted(values)[math.ceil(q / 100 * len(values)) - 1]


def simulate(
    requests: Sequence[Request],
    cost: Cost,
    limits: Limits,
    blocks: int = 10**6,
    schedule: Scheduler = schedule,
) -> Served:
    """Serve a trace step by step, each step planned by `schedule`.

    Args:
        requests: in the order in which they arrive.
        blocks: of the cache.
    Raises:
        ValueError: a request that never fits, or a plan that cannot be carried out.
        RuntimeError: somebody waits, and the plan does nothing.
    """
    _check_fit(requests, limits, blocks)
    server = _Server(requests, limits, blocks)
    served = Served(list(requests), server.times)
    now = 0.0
    while server.busy:
        now = max(now, server.next_arrival)
        server.arrive(now)
        running, waiting = server.running, tuple(server.waiting)
        plan = schedule(running, waiting, server.available, limits)
        check_plan(plan, running, waiting, server.available, limits)
        if not plan.tokens and not plan.preempted:
            raise RuntimeError(
                f"at {now:.3f} s {len(waiting)} wait and {len(running)} run, and the"
                " plan has no token"
            )
        cached = server.carry_out(plan)
        seconds = cost.seconds(sum(plan.tokens.values()), cached) if plan.tokens else 0
        served.steps.append(
            Step(
                now,
                seconds,
                dict(plan.tokens),
                waiting=len(server.waiting),
                blocks=blocks - server.available,
                preempted=tuple(plan.preempted),
            )
        )
        now += seconds
        server.write(plan, now)
    return served


class _Server:
    """Requests by number: who waits, who runs, and who holds how many blocks."""

    def __init__(
        self, requests: Sequence[Request], limits: Limits, blocks: int
    ) -> None:
        self.requests = requests
        self.block_size = limits.block_size
        self.available = blocks
        self.times: list[list[float]] = [[] for _ in requests]
        self.waiting: deque[Job] = deque()
        self._jobs: dict[int, Job] = {}  # those that run, in order of admission
        self._coming = 0

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._coming < len(self.requests) or self.waiting or self._jobs)

    @property
    def running(self) -> tuple[Job, ...]:
        return tuple(self._jobs.values())

    @property
    def next_arrival(self) -> float:
        """Until when there is nothing to do; 0 where there is something."""
        if self.waiting or self._jobs:
            return 0.0
        return self.requests[self._coming].arrival

    def arrive(self, now: float) -> None:
        """Those who have come by now wait."""
        while (
            self._coming < len(self.requests)
            and self.requests[self._coming].arrival <= now
        ):
            request = self.requests[self._coming]
            left = request.prompt - request.stored
            self.waiting.append(Job(self._coming, request.stored, left))
            self._coming += 1

    def carry_out(self, plan: Plan) -> int:
        """Blocks change hands. Returns the tokens that are read from the cache."""
        for id in plan.preempted:
            job = self._jobs.pop(id)
            self.available += job.own
            text = self.requests[id].prompt + len(self.times[id])
            self.waiting.appendleft(Job(id, 0, text))
        admitted = {job.id: job for job in self.waiting if job.id in plan.admitted}
        for id in plan.admitted:
            self.waiting.remove(admitted[id])
            self._jobs[id] = admitted[id]
        cached = 0
        for id, count in plan.tokens.items():
            job = self._jobs[id]
            cached += job.computed
            needed = blocks_needed(job, count, self.block_size)
            self.available -= needed
            self._jobs[id] = Job(
                id,
                job.computed + count,
                job.left - count,
                job.blocks + needed,
                job.own + needed,
            )
        return cached

    def write(self, plan: Plan, now: float) -> None:
        """Those who have nothing left to compute write a token, or have ended."""
        for id in plan.tokens:
            job = self._jobs[id]
            if job.left > 0:
                continue
            self.times[id].append(now)
            if len(self.times[id]) == self.requests[id].output:
                self.available += self._jobs.pop(id).own
            else:
                self._jobs[id] = Job(id, job.computed, 1, job.blocks, job.own)


def _check_fit(requests: Sequence[Request], limits: Limits, blocks: int) -> None:
    """Each request alone can be served."""
    for place, request in enumerate(requests):
        stored = request.prompt + request.output - 1  # the last token is not stored
        if -(-stored // limits.block_size) > blocks:
            raise ValueError(
                f"blocks={blocks} are too few for request {place}, which stores"
                f" {stored} tokens"
            )
        if not limits.chunked and stored > limits.max_tokens:
            raise ValueError(
                f"max_tokens={limits.max_tokens} without chunks is too few for request"
                f" {place}, whose text may have {stored} tokens"
            )


def in_batches(
    requests: Sequence[Request], cost: Cost, size: int, delay: float = math.inf
) -> Served:
    """Serve a trace in batches that begin and end together.

    Args:
        size: requests in a batch.
        delay: seconds for which the first of a batch waits for others. Without one it
            waits until the batch is full (or nobody comes any more): static batching.
    Raises:
        ValueError: a size below 1 or a delay below 0.
    """
    if size < 1 or not delay >= 0:
        raise ValueError(f"size={size!r} must be at least 1, delay={delay!r} from 0")
    served = Served(list(requests), [[] for _ in requests])
    now, place = 0.0, 0
    while place < len(requests):
        queue = requests[place : place + size]
        # with a delay nobody knows that no more will come
        full = len(queue) == size or delay == math.inf
        ready = queue[-1].arrival if full else math.inf
        begin = max(now, min(ready, queue[0].arrival + delay))
        batch = list(range(place, place + len(queue)))
        batch = [id for id in batch if requests[id].arrival <= begin]
        now = _run_batch(served, batch, cost, begin)
        place += len(batch)
    return served


def _run_batch(served: Served, batch: list[int], cost: Cost, now: float) -> float:
    """All steps of a batch; returns when it has ended."""
    prompts = {id: served.requests[id].prompt for id in batch}
    outputs = {id: served.requests[id].output for id in batch}
    widest, size = max(prompts.values()), len(batch)
    for written in range(max(outputs.values())):
        alive = [id for id in batch if outputs[id] > written]
        if written == 0:
            tokens, total, cached = dict(prompts), size * widest, 0
        else:
            tokens, total = dict.fromkeys(alive, 1), size
            cached = size * (widest + written - 1)
        seconds = cost.seconds(total, cached)
        padding = total - sum(tokens.values())
        behind = served.requests[batch[-1] + 1 :]
        waiting = sum(request.arrival <= now for request in behind)
        served.steps.append(Step(now, seconds, tokens, padding, waiting))
        now += seconds
        for id in alive:
            served.times[id].append(now)
    return now
