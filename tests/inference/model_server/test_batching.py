"""When a batch leaves: by hand, by another way to say it, and with threads."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.inference.model_server.batching import (
    Batcher,
    QueueFull,
    Waiting,
    next_batch,
    one_by_one,
)
from llmlab.inference.model_server.config import Batching


def queue(*sizes, shape=(), arrived=0.0):
    return [Waiting(arrived, size, shape) for size in sizes]


WAIT = Batching((4, 8), 1.0, 16)
LATE = 1.0  # as long as the delay, exactly


@pytest.mark.parametrize(
    ("waiting", "now", "batching", "decision"),
    [
        ([], 0.0, WAIT, (0, None)),
        (queue(1), 0.0, WAIT, (0, 1.0)),
        (queue(1), 0.75, WAIT, (0, 1.0)),
        (queue(1), LATE, WAIT, (1, None)),
        (queue(1, 1, 1), 0.5, WAIT, (0, 1.0)),
        (queue(1, 1, 1), LATE, WAIT, (3, None)),
        (queue(*[1] * 4), 0.0, WAIT, (4, None)),
        (queue(*[1] * 6), 0.0, WAIT, (4, None)),
        (queue(*[1] * 6), LATE, WAIT, (6, None)),
        (queue(*[1] * 9), 0.0, WAIT, (8, None)),
        (queue(*[1] * 20), 0.0, WAIT, (8, None)),
        (queue(*[1] * 20), LATE, WAIT, (16, None)),
        (queue(3, 3, 3), 0.0, WAIT, (2, None)),  # 9 would pass 8
        (queue(3, 3), 0.0, WAIT, (0, 1.0)),
        (queue(3, 1, 5), 0.0, WAIT, (2, None)),
        (queue(9), 0.0, WAIT, (1, None)),
        (queue(16, 1), 0.0, WAIT, (1, None)),
        (queue(10, 7), 0.0, WAIT, (1, None)),
        (queue(2) + queue(1, shape=(9,)), 0.0, WAIT, (1, None)),
        (queue(2) + queue(1, shape=(9,)) + queue(2), LATE, WAIT, (1, None)),
        (queue(1, 1), 0.0, Batching(max_batch=2, delay=9.0), (2, None)),
        (queue(1), 0.0, Batching(max_batch=2), (1, None)),
        (queue(*[1] * 7), 0.0, Batching((4,), 0.0, 16), (4, None)),
        (queue(*[1] * 3), 0.0, Batching((4,), 0.0, 16), (3, None)),
        (queue(*[1] * 17), 0.0, Batching(max_batch=16), (16, None)),
    ],
)
def test_decisions_by_hand(waiting, now, batching, decision):
    assert next_batch(waiting, now, batching) == decision


def told_otherwise(waiting, now, batching):
    """The rules as questions about prefixes, in the order of the docstring."""
    if not waiting:
        return 0, None
    total = [sum(w.size for w in waiting[:k]) for k in range(len(waiting) + 1)]
    fronts = [
        k
        for k in range(1, len(waiting) + 1)
        if all(w.shape == waiting[0].shape for w in waiting[:k])
        and (k == 1 or total[k] <= batching.max_batch)
    ]
    whole = max(fronts)
    age_reached = now >= waiting[0].arrived + batching.delay
    if batching.delay and age_reached:
        return whole, None
    preferred = [k for k in fronts if total[k] in batching.preferred]
    if preferred:
        return max(preferred), None
    top = max(batching.preferred)
    passing = [k for k in range(1, len(waiting)) if k in fronts and total[k + 1] > top]
    if passing:
        return min(passing), None
    if whole < len(waiting) or total[whole] >= top or batching.delay == 0:
        return whole, None
    return 0, waiting[0].arrived + batching.delay


@st.composite
def states(draw):
    max_batch = draw(st.integers(1, 9))
    preferred = draw(st.lists(st.integers(1, max_batch), max_size=3))
    delay = draw(st.sampled_from([0.0, 1.0, 2.5]))
    times = sorted(draw(st.lists(st.integers(0, 6), max_size=9)))
    waiting = [
        Waiting(
            float(time), draw(st.integers(1, max_batch)), draw(st.sampled_from("aaab"))
        )
        for time in times
    ]
    now = (times[-1] if times else 0) + draw(st.sampled_from([0.0, 0.5, 1.0, 3.0]))
    return waiting, float(now), Batching(tuple(preferred), delay, max_batch)


@given(states())
def test_both_ways_to_say_it_agree(state):
    assert next_batch(*state) == told_otherwise(*state)


@given(states())
def test_what_always_holds(state):
    waiting, now, batching = state
    count, again = next_batch(*state)
    assert 0 <= count <= len(waiting)
    front = waiting[:count]
    assert sum(w.size for w in front) <= batching.max_batch
    assert len({w.shape for w in front}) <= 1
    if waiting and count == 0:
        assert again == waiting[0].arrived + batching.delay > now
        assert next_batch(waiting, again, batching)[0] > 0  # nobody starves
    if count:
        assert again is None


def test_without_dynamic_batching_each_goes_alone():
    assert one_by_one(queue(1, 1), 0.0, WAIT) == (1, None)
    assert one_by_one([], 0.0, WAIT) == (0, None)


def test_a_lone_request_waits_for_the_whole_delay():
    batcher = Batcher(Batching(delay=0.05, max_batch=4))
    began = time.monotonic()
    batcher.put("a")
    assert [w.work for w in batcher.take()] == ["a"]
    assert time.monotonic() - began >= 0.05


def test_the_last_that_fits_ends_the_waiting():
    batcher = Batcher(Batching(delay=30.0, max_batch=3))
    got = []
    taking = threading.Thread(target=lambda: got.extend(batcher.take()))
    taking.start()
    for name in "abc":
        batcher.put(name)
    taking.join(10)
    assert [w.work for w in got] == ["a", "b", "c"]
    assert len(batcher) == 0


def test_several_instances_share_a_queue_and_lose_nothing():
    batcher = Batcher(Batching(delay=0.001, max_batch=4))
    got = []

    def serve():
        while (batch := batcher.take()) is not None:
            got.extend(w.work for w in batch)

    instances = [threading.Thread(target=serve) for _ in range(3)]
    for each in instances:
        each.start()
    for number in range(200):
        batcher.put(number)
    while len(got) < 200:
        time.sleep(0.002)
    batcher.close()
    for each in instances:
        each.join(10)
    assert sorted(got) == list(range(200))


def test_a_full_queue_and_a_closed_one_refuse():
    batcher = Batcher(Batching(delay=9.0, max_batch=9, max_queue=2))
    batcher.put("a")
    batcher.put("b")
    with pytest.raises(QueueFull):
        batcher.put("c")
    assert [w.work for w in batcher.close()] == ["a", "b"]
    assert batcher.take() is None
    with pytest.raises(RuntimeError):
        batcher.put("d")


@pytest.mark.parametrize("count", [-1, 2])
def test_a_decision_that_cannot_be_is_refused(count):
    batcher = Batcher(Batching(), decide=lambda *_: (count, None))
    batcher.put("a")
    with pytest.raises(ValueError, match=f"{count} of 1 requests"):
        batcher.take()
