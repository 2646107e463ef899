"""The batcher in virtual time: by hand, by closed forms, beside the real Triton."""

from __future__ import annotations

import csv
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.inference import model_server as ms
from llmlab.inference.model_server import (
    Batching,
    choose_delay,
    one_by_one,
    percentile,
    poisson,
    simulate,
)


def five(_):
    return 5.0


def test_a_lone_client_waits_the_whole_delay_each_time():
    run = simulate([0.0], five, Batching(delay=20.0, max_batch=16), each=3)
    assert run.latencies == [25.0] * 3
    assert run.batches == [1] * 3
    assert (run.seconds, run.busy) == (75.0, 15.0)


def test_sixteen_clients_fill_two_batches_a_round():
    run = simulate([0.0] * 16, five, Batching((8,), 20.0, 16), each=8)
    assert run.batches == [8] * 16
    assert len(run.latencies) == 128
    assert max(run.latencies) == 10.0


def test_by_hand():
    # comes at 0, 1, 6, 7; the first goes alone, two wait for it, then one is late
    starts = [0.0, 1.0, 6.0, 7.0]
    run = simulate(starts, five, Batching(max_batch=2))
    # 0 → 5; at 5 the second alone → 10; at 10 the other two → 15
    assert run.latencies == [5.0, 9.0, 9.0, 8.0]
    assert run.batches == [1, 1, 2]
    run = simulate(starts, five, Batching(delay=3.0, max_batch=2))
    # the second comes within the delay: 1 → 6; the others at 7 → 12
    assert run.latencies == [6.0, 5.0, 6.0, 5.0]
    assert run.batches == [2, 2]


@pytest.mark.parametrize("clients", range(2, 9))
def test_clients_that_come_back_one_by_one_fall_into_two_groups(clients):
    """One group is computed while the other waits: N answers in 2 s."""
    starts = [0.01 * n for n in range(clients)]
    batching = Batching(max_batch=4)
    run = simulate(starts, five, batching, each=100, apart=0.01)
    assert run.throughput == pytest.approx(clients / 10.0, rel=0.03)


def test_two_instances_work_at_the_same_time():
    run = simulate([0.0, 0.0], five, Batching(max_batch=1), instances=2)
    assert run.latencies == [5.0, 5.0] and run.seconds == 5.0
    run = simulate([0.0, 0.0], five, Batching(max_batch=1))
    assert run.latencies == [5.0, 10.0]


def test_without_batching_it_is_the_queue_of_the_textbook():
    """M/D/1: the mean wait is ρ s / (2 (1 − ρ)), Pollaczek and Khinchine."""
    s, rho = 1.0, 0.6
    run = simulate(
        poisson(rho / s, 60_000, seed=1), lambda n: s, Batching(), decide=one_by_one
    )
    waits = statistics.mean(run.latencies) - s
    assert waits == pytest.approx(rho * s / (2 * (1 - rho)), rel=0.05)


@given(
    st.lists(st.floats(0, 30), min_size=1, max_size=25),
    st.sampled_from([0.0, 1.0, 7.0]),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_what_always_holds(starts, delay, max_batch, instances, each):
    run = simulate(
        starts, five, Batching((), delay, max_batch), each=each, instances=instances
    )
    assert len(run.latencies) == sum(run.batches) == each * len(starts)
    assert max(run.batches) <= max_batch
    assert min(run.latencies) >= 5.0 - 1e-9
    assert run.busy == 5.0 * len(run.batches)
    assert run.busy <= instances * run.seconds + 1e-9


def test_a_delay_of_less_than_one_execution_is_free_at_p99():
    """Whoever just misses a batch waits for nearly two executions anyway."""
    times = poisson(400, 4000, seed=3)
    runs = {
        delay: simulate(times, lambda n: 0.005, Batching((), delay, 16))
        for delay in (0.0, 0.004, 0.02)
    }
    assert runs[0.004].p99 <= 1.02 * runs[0.0].p99
    assert len(runs[0.004].batches) < 0.9 * len(runs[0.0].batches)
    assert runs[0.02].p99 == pytest.approx(0.025, rel=0.02)


def rows():
    with ms.FILE.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["kind"] == "open"]


@pytest.mark.parametrize("row", rows(), ids=lambda r: f"{r['load']}-{r['delay']}")
def test_it_foretells_how_often_the_real_triton_ran(row):
    """The same requests at the same times; an execution took it about 5.8 ms."""
    if row["delay"] == "none":
        assert row["executions"] == row["requests"]
        return
    times = poisson(int(row["load"]), int(row["requests"]), seed=int(row["run"]))
    delay = int(row["delay"]) / 1000
    run = simulate(times, lambda n: 0.0058, Batching((), delay, 16))
    assert len(run.batches) == pytest.approx(int(row["executions"]), rel=0.25)


def test_the_rank_of_a_percentile():
    values = [float(v) for v in range(100, 0, -1)]
    assert [percentile(values, p) for p in (1, 50, 99, 99.5, 100)] == [
        *(1.0, 50.0, 99.0, 100.0, 100.0)
    ]
    assert percentile([3.0], 1) == 3.0


@given(st.lists(st.floats(0, 9), min_size=1, max_size=40), st.integers(1, 100))
def test_a_percentile_is_the_smallest_that_enough_do_not_exceed(values, percent):
    found = percentile(values, percent)
    share = sum(v <= found for v in values) / len(values)
    assert share >= percent / 100 - 1e-12
    smaller = [v for v in values if v < found]
    if smaller:
        below = sum(v <= max(smaller) for v in values) / len(values)
        assert below < percent / 100


def test_the_longest_delay_within_a_bound():
    measured = {0.0: [1.0] * 99 + [9.0], 1.0: [2.0] * 100, 2.0: [1.0] * 98 + [9.0] * 2}
    assert choose_delay(measured, 2.0) == 1.0
    assert choose_delay(measured, 1.0) == 0.0
    assert choose_delay(measured, 0.5) is None
    assert choose_delay(measured, 9.0) == 2.0
    assert choose_delay(measured, 1.0, percent=98) == 2.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: percentile([], 99),
        lambda: percentile([1.0], 0),
        lambda: percentile([1.0], 101),
        lambda: percentile([1.0], math.nan),
        lambda: simulate([], five, Batching()),
        lambda: simulate([0.0], five, Batching(), each=0),
        lambda: simulate([0.0], five, Batching(), instances=0),
    ],
)
def test_what_cannot_be_is_refused(call):
    with pytest.raises(ValueError):
        call()
