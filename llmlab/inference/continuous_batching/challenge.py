"""The challenge: a scheduler that wins a trace.

It is judged in virtual time: tokens per second over several traces, under a bound for
the 99th percentile of the times between tokens, with a cache of so many blocks.

Two things are in the way of `schedule`. A step that reads long parts of prompts makes
all who decode wait; and whoever admits as many as fit now must soon send some away, and
what they have computed is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from llmlab.inference.continuous_batching.schedule import Limits, schedule
from llmlab.inference.continuous_batching.simulation import (
    Cost,
    Scheduler,
    Served,
    percentile,
    simulate,
)
from llmlab.inference.continuous_batching.traces import (
    Request,
    lognormal,
    poisson,
    trace,
)

COST = Cost(a=0.010, b=0.0008, c=0.0000002)
LIMITS = Limits(max_tokens=512, max_sequences=32, block_size=16)
BLOCKS = 120
SEEDS = (1, 2)
LEAST = 288.0  # tokens per second
BOUND = 0.070  # seconds, the 99th percentile of the times between tokens


@dataclass(frozen=True)
class Score:
    """Of a scheduler.

    Attributes:
        throughput: tokens per second, over all traces.
        gap: the 99th percentile of the times between tokens, the worst of the traces.
        preempted: requests that were sent away.
    """

    throughput: float
    gap: float
    preempted: int


@cache
def requests(seed: int, count: int = 60) -> tuple[Request, ...]:
    """Short prompts and long answers, more than the machine can bear for a while."""
    return tuple(
        trace(
            poisson(6.0, count, seed),
            lognormal(100, count, 1.1, longest=900, seed=seed),
            lognormal(250, count, 0.7, longest=800, seed=seed + 100),
        )
    )


def play(rule: Scheduler = schedule, seed: int = 1, limits: Limits = LIMITS) -> Served:
    """One trace under a rule."""
    return simulate(requests(seed), COST, limits, BLOCKS, rule)


def judge(rule: Scheduler = schedule, limits: Limits = LIMITS) -> Score:
    """A rule over all traces."""
    runs = [play(rule, seed, limits) for seed in SEEDS]
    written = sum(sum(map(len, run.times)) for run in runs)
    seconds = sum(run.end - run.requests[0].arrival for run in runs)
    gaps = [percentile(run.latencies()[1], 99) for run in runs]
    return Score(written / seconds, max(gaps), sum(run.preempted for run in runs))
