"""Virtual time: against queueing theory, recursions by hand, and brute force."""

from __future__ import annotations

import math
import random
import statistics
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.inference.continuous_batching import (
    Cost,
    Limits,
    Plan,
    Request,
    Served,
    in_batches,
    latencies,
    lognormal,
    percentile,
    poisson,
    schedule,
    simulate,
    trace,
)

ONE = Limits(max_tokens=10**6, max_sequences=1)


def waits(served: Served) -> list[float]:
    """From arrival to the first step."""
    first = {}
    for step in served.steps:
        for id in step.tokens:
            first.setdefault(id, step.start)
    return [first[id] - r.arrival for id, r in enumerate(served.requests)]


# Queueing theory ----------------------------------------------------------------------


@pytest.mark.parametrize("load", [0.3, 0.6, 0.85])
def test_fixed_service_waits_as_m_d_1(load):
    """W = ρ s / (2 (1 − ρ)); mean of ten runs, within four standard errors."""
    s = 0.5
    means = []
    for seed in range(10):
        requests = trace(poisson(load / s, 1200, seed), [1] * 1200, [1] * 1200)
        means.append(statistics.mean(waits(simulate(requests, Cost(s, 0.0), ONE))))
    error = statistics.stdev(means) / math.sqrt(10)
    assert abs(statistics.mean(means) - load * s / (2 * (1 - load))) < 4 * error
    assert error < 0.3 * statistics.mean(means)


def test_any_service_waits_as_pollaczek_and_khinchine_say():
    """W = λ E[S²] / (2 (1 − ρ)), for answers of geometric length: nearly M/M/1."""
    step, p, load = 0.1, 0.3, 0.7
    # a geometric number of steps: E[N] = 1/p, E[N²] = (2 − p)/p²
    mean, square = step / p, step**2 * (2 - p) / p**2
    rate = load / mean
    means = []
    for seed in range(10):
        draw = random.Random(seed)
        outputs = []
        for _ in range(800):
            outputs.append(1 + int(math.log(draw.random()) / math.log(1 - p)))
        requests = trace(poisson(rate, 800, seed), [1] * 800, outputs)
        means.append(statistics.mean(waits(simulate(requests, Cost(step, 0.0), ONE))))
    error = statistics.stdev(means) / math.sqrt(10)
    exact = rate * square / (2 * (1 - load))
    assert abs(statistics.mean(means) - exact) < 4 * error
    # and not as a fixed service of the same mean would
    assert abs(statistics.mean(means) - load * mean / (2 * (1 - load))) > 4 * error


def small_trace(seed: int, count: int = 40) -> list[Request]:
    return trace(
        poisson(4.0, count, seed),
        lognormal(30, count, longest=200, seed=seed),
        lognormal(12, count, longest=60, seed=seed + 50),
    )


WAYS = {
    "static": lambda r: in_batches(r, Cost(0.05, 0.001, 1e-5), 8),
    "dynamic": lambda r: in_batches(r, Cost(0.05, 0.001, 1e-5), 8, 0.3),
    "continuous": lambda r: simulate(
        r, Cost(0.05, 0.001, 1e-5), Limits(512, 8, chunked=False)
    ),
    "chunked": lambda r: simulate(r, Cost(0.05, 0.001, 1e-5), Limits(32, 8), 40),
}


@pytest.mark.parametrize("way", WAYS)
def test_littles_law(way):
    """L = λ W, exactly: requests in the system, over time, by their stays."""
    served = WAYS[way](small_trace(3))
    events = [(r.arrival, 1) for r in served.requests]
    events += [(times[-1], -1) for times in served.times]
    area, inside, now = 0.0, 0, served.requests[0].arrival
    span = served.end - now
    for time, change in sorted(events):
        area += inside * (time - now)
        inside, now = inside + change, time
    stays = [
        t[-1] - r.arrival for r, t in zip(served.requests, served.times, strict=True)
    ]
    rate = len(stays) / span
    assert area / span == pytest.approx(rate * statistics.mean(stays), rel=1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_all_get_their_tokens_in_order(way):
    served = WAYS[way](small_trace(4))
    for request, times in zip(served.requests, served.times, strict=True):
        assert len(times) == request.output
        assert times == sorted(times)
        assert times[0] > request.arrival


@pytest.mark.parametrize("way", WAYS)
def test_steps_do_not_overlap(way):
    steps = WAYS[way](small_trace(5)).steps
    for one, next_one in pairwise(steps):
        assert next_one.start >= one.start + one.seconds - 1e-12


# By hand, and by brute force ----------------------------------------------------------


def test_one_at_a_time_is_lindleys_recursion():
    arrivals = poisson(1.5, 50, 1)
    served = simulate(trace(arrivals, [1] * 50, [1] * 50), Cost(0.5, 0.0), ONE)
    free, ends = 0.0, []
    for arrival in arrivals:
        free = max(free, arrival) + 0.5
        ends.append(free)
    assert [times[0] for times in served.times] == pytest.approx(ends)


def brute_force(requests: list[Request], cost: Cost, slots: int) -> list[list[float]]:
    """Whole prompts, enough memory: who is there and has a slot gets what it needs."""
    now = 0.0
    waiting, active = list(range(len(requests))), []
    times: list[list[float]] = [[] for _ in requests]
    while waiting or active:
        if not active and requests[waiting[0]].arrival > now:
            now = requests[waiting[0]].arrival
        while waiting and len(active) < slots and requests[waiting[0]].arrival <= now:
            active.append(waiting.pop(0))
        tokens = cached = 0
        for id in active:
            if times[id]:
                tokens += 1
                cached += requests[id].prompt + len(times[id]) - 1
            else:
                tokens += requests[id].prompt
        now += cost.a + cost.b * tokens + cost.c * cached
        for id in active:
            times[id].append(now)
        active = [id for id in active if len(times[id]) < requests[id].output]
    return times


lists_of_requests = st.lists(
    st.tuples(st.floats(0, 5), st.integers(1, 30), st.integers(1, 12)),
    min_size=1,
    max_size=7,
).map(lambda rows: [Request(*row) for row in sorted(rows)])


@settings(max_examples=60, deadline=None)
@given(lists_of_requests, st.integers(1, 4))
def test_continuous_batching_is_that_of_brute_force(requests, slots):
    cost = Cost(0.3, 0.01, 0.001)
    limits = Limits(max_tokens=10**6, max_sequences=slots, chunked=False)
    got = simulate(requests, cost, limits).times
    for ours, theirs in zip(got, brute_force(requests, cost, slots), strict=True):
        assert ours == pytest.approx(theirs)


def test_a_static_batch_by_hand():
    """Two requests, padded to 6 and to the longer answer; the third is a batch."""
    requests = [Request(0.0, 6, 3), Request(1.0, 2, 1), Request(1.5, 4, 2)]
    served = in_batches(requests, Cost(1.0, 0.1, 0.01), 2)
    # prompts 2·6 tokens; then 2 tokens beside 2·6, then 2·7 in the cache
    first = 1 + 1 + 1.2
    second = first + 1 + 0.2 + 0.12
    third = second + 1 + 0.2 + 0.14
    alone = third + 1 + 0.4
    assert served.times[0] == pytest.approx([first, second, third])
    assert served.times[1] == pytest.approx([first])
    assert served.times[2] == pytest.approx([alone, alone + 1 + 0.1 + 0.04])
    assert [step.padding for step in served.steps] == [4, 1, 1, 0, 0]
    assert [len(step.tokens) for step in served.steps] == [2, 1, 1, 1, 1]


def test_a_dynamic_batch_leaves_after_its_delay():
    requests = [Request(0.0, 1, 1), Request(0.5, 1, 1), Request(2.0, 1, 1)]
    cost = Cost(0.1, 0.0)
    begins = [step.start for step in in_batches(requests, cost, 3, 1.0).steps]
    assert begins == [1.0, 3.0]
    assert [s.start for s in in_batches(requests, cost, 3).steps] == [2.0]
    assert [s.start for s in in_batches(requests, cost, 2, 9.0).steps] == [0.5, 11.0]
    assert [s.start for s in in_batches(requests, cost, 3, 0.0).steps] == [0, 0.5, 2]


def test_parts_of_a_prompt_by_hand():
    """10 tokens in steps of 4, beside one that decodes."""
    requests = [Request(0.0, 2, 4), Request(0.5, 10, 2)]
    served = simulate(requests, Cost(1.0, 0.0), Limits(max_tokens=5, block_size=4))
    assert [step.tokens for step in served.steps] == [
        {0: 2},
        {0: 1, 1: 4},
        {0: 1, 1: 4},
        {0: 1, 1: 2},
        {1: 1},
    ]
    assert served.times == [[1.0, 2.0, 3.0, 4.0], [4.0, 5.0]]


def test_the_cost_of_a_step_counts_what_is_cached():
    served = simulate([Request(0.0, 5, 3)], Cost(1.0, 0.1, 0.01), Limits())
    seconds = [step.seconds for step in served.steps]
    assert seconds == pytest.approx([1.5, 1.15, 1.16])


def test_who_is_sent_away_computes_all_again():
    requests = [Request(0.0, 8, 6), Request(0.0, 8, 6)]
    served = simulate(requests, Cost(1.0, 0.0), Limits(block_size=4), blocks=5)
    gone = [step.preempted for step in served.steps if step.preempted]
    assert gone == [(1,)]
    computed = sum(step.tokens.get(1, 0) for step in served.steps)
    assert computed > 8 + 5
    assert [len(times) for times in served.times] == [6, 6]
    assert max(step.blocks for step in served.steps) <= 5


@settings(max_examples=60, deadline=None)
@given(lists_of_requests, st.integers(1, 9), st.integers(1, 4), st.integers(11, 16))
def test_whatever_fits_is_finished(requests, budget, slots, blocks):
    """No state in which nobody can go on, for any trace of which each request fits."""
    limits = Limits(budget, slots, block_size=4)
    served = simulate(requests, Cost(0.2, 0.01), limits, blocks)
    assert [len(times) for times in served.times] == [r.output for r in requests]
    for step in served.steps:
        assert sum(step.tokens.values()) <= budget
        assert len(step.tokens) <= slots
        assert step.blocks <= blocks
    if not served.preempted:  # first come, first served
        begins = [
            request.arrival + wait
            for request, wait in zip(requests, waits(served), strict=True)
        ]
        assert begins == sorted(begins)


@settings(max_examples=40, deadline=None)
@given(lists_of_requests)
def test_the_oldest_never_waits_for_the_others(requests):
    """Who came first gets a token in every step, and so nobody starves."""
    served = simulate(requests, Cost(1.0, 0.0), Limits(8, 4, block_size=4), 11)
    alive = dict.fromkeys(range(len(requests)))
    for step in served.steps:
        there = [id for id in alive if requests[id].arrival <= step.start]
        assert min(there) in step.tokens
        for id in list(alive):
            if served.times[id][-1] <= step.start + step.seconds:
                del alive[id]


def test_stored_tokens_are_not_computed():
    request = Request(0.0, 9, 2, stored=8)
    served = simulate([request], Cost(1.0, 0.1), Limits(block_size=4), blocks=3)
    assert [step.tokens for step in served.steps] == [{0: 1}, {0: 1}]
    assert served.steps[0].blocks == 3


# Measures -----------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.floats(0.5, 100))
def test_percentile_is_numpys(values, q):
    wanted = np.percentile(values, q, method="inverted_cdf")
    assert percentile(values, q) == pytest.approx(wanted)


@pytest.mark.parametrize(("values", "q"), [([], 50), ([1.0], 0), ([1.0], 101)])
def test_percentile_refuses(values, q):
    with pytest.raises(ValueError, match=f"q={q}"):
        percentile(values, q)


def test_latencies_by_hand():
    assert latencies([1.0, 2.0], [[3.0, 3.5, 4.5], [2.5]]) == (
        [2.0, 0.5],
        [0.5, 1.0],
    )


def test_throughput_busy_and_running_by_hand():
    requests = [Request(1.0, 4, 3), Request(1.0, 2, 1)]
    served = in_batches(requests, Cost(1.0, 0.0), 2)
    assert served.throughput == pytest.approx(4 / 3)
    # 8 + 2 + 2 tokens were computed, 6 + 1 + 1 for somebody
    assert served.busy == pytest.approx(8 / 12)
    assert served.running == pytest.approx((2 + 1 + 1) / 3)


# Refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requests", "limits", "blocks", "says"),
    [
        ([Request(0.0, 9, 8)], Limits(block_size=4), 3, "blocks=3 .* 16 tokens"),
        ([Request(0.0, 5, 1)], Limits(4, chunked=False), 9, "max_tokens=4"),
    ],
)
def test_what_never_fits_is_refused(requests, limits, blocks, says):
    with pytest.raises(ValueError, match=says):
        simulate(requests, Cost(1.0, 0.0), limits, blocks)


def test_exactly_what_fits_is_served():
    served = simulate([Request(0.0, 9, 8)], Cost(1.0, 0.0), Limits(block_size=4), 4)
    assert len(served.times[0]) == 8
    whole = Limits(4, block_size=4, chunked=False)
    assert simulate([Request(0.0, 4, 1)], Cost(1.0, 0.0), whole).end == 1.0


def test_a_rule_that_does_nothing_is_named():
    with pytest.raises(RuntimeError, match="1 wait and 0 run"):
        simulate([Request(0.0, 5, 1)], Cost(1.0, 0.0), Limits(), 9, lambda *_: Plan())


def test_a_rule_that_breaks_a_limit_is_named():
    def greedy(running, waiting, available, limits):
        return Plan({job.id: job.left for job in waiting}, [job.id for job in waiting])

    requests = [Request(0.0, 5, 1), Request(0.0, 5, 1)]
    with pytest.raises(ValueError, match="10 tokens are planned"):
        simulate(requests, Cost(1.0, 0.0), Limits(8), 9, greedy)


@pytest.mark.parametrize(("a", "b", "c"), [(-1, 1, 0), (1, -1, 0), (1, 1, -1)])
def test_a_cost_is_not_negative(a, b, c):
    with pytest.raises(ValueError, match="=-1 must not be below 0"):
        Cost(a, b, c)


def test_a_step_takes_time():
    with pytest.raises(ValueError, match="a step takes time"):
        Cost(0.0, 0.0, 1.0)


@pytest.mark.parametrize(("size", "delay"), [(0, 1.0), (2, -1.0), (2, math.nan)])
def test_batches_refuse(size, delay):
    with pytest.raises(ValueError, match=f"size={size}"):
        in_batches([Request(0.0, 1, 1)], Cost(1.0, 0.0), size, delay)


def test_the_default_rule_is_schedule():
    requests = small_trace(1)
    limits = Limits(64, 8)
    one = simulate(requests, Cost(0.1, 0.001), limits, 60)
    other = simulate(requests, Cost(0.1, 0.001), limits, 60, schedule)
    assert one.times == other.times
