"""Queues against a clock that ticks, closed forms, and races that are planted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.chips.ascend_and_other_accelerators import queues as q

FLAGS = ("MTE2_MTE1", "MTE1_M", "M_MTE1", "MTE1_MTE2", "M_V", "V_MTE3")
cycles = st.integers(1, 9)


def ticking(program):
    """The cycles of a program, by a clock that ticks: another way to count."""
    waiting = {name: [x for x in program if x.queue == name] for name in q.QUEUES}
    flags: set[str] = set()
    left = dict.fromkeys(q.QUEUES, 0)
    now = 0
    while any(waiting.values()) or any(left.values()):
        moved = True
        while moved:  # all that takes no time
            moved = False
            for name, queue in waiting.items():
                if left[name] or not queue:
                    continue
                first = queue[0]
                if isinstance(first, q.Do):
                    left[name] = first.cycles
                elif isinstance(first, q.Set) and str(first) not in flags:
                    flags.add(str(first))
                elif isinstance(first, q.Wait) and str(first) in flags:
                    flags.remove(str(first))
                else:
                    continue
                queue.pop(0)
                moved = True
        if not any(left.values()):
            return None if any(waiting.values()) else now
        now += 1
        left = {name: max(0, count - 1) for name, count in left.items()}
    return now


@given(
    count=st.integers(1, 7),
    times=st.tuples(cycles, cycles, cycles, cycles),
    buffers=st.integers(1, 4),
    without=st.sampled_from(["", *FLAGS]),
)
def test_the_times_are_those_of_a_ticking_clock(count, times, buffers, without):
    program = q.product_program(count, *times, buffers=buffers, without=without)
    assert q.simulate(program).cycles == ticking(program)


@given(count=st.integers(2, 9), load=cycles, split=cycles, multiply=cycles)
def test_closed_forms(count, load, split, multiply):
    program = q.product_program(count, load, split, multiply, 1)
    double = q.simulate(program).cycles
    slowest = max(load, split, multiply)
    assert double >= count * slowest + 2
    if split * 2 <= slowest:  # then L1 and L0 are free in time
        assert double == load + split + multiply + (count - 1) * slowest + 2
    single = q.simulate(q.product_program(count, load, split, multiply, 1, 1)).cycles
    one_after_the_other = max(load + split, split + multiply)
    assert single >= (count - 1) * one_after_the_other
    assert double <= single


@pytest.mark.parametrize("buffers", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_the_program_has_no_race(buffers, count):
    assert q.races(q.product_program(count, 3, 2, 4, buffers=buffers)) == []


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("buffers", [1, 2])
def test_every_missing_flag_is_found_and_named(flag, buffers):
    program = q.product_program(5, 3, 2, 4, buffers=buffers, without=flag)
    found = q.races(program)
    assert found
    assert str(found[0]).endswith(f"a flag {flag} is missing")


def test_a_race_may_cost_no_time():
    """The flags back can be missing, and the times are the same: nobody notices."""
    right = q.simulate(q.product_program(8, 100, 40, 128)).cycles
    program = q.product_program(8, 100, 40, 128, without="M_MTE1")
    assert q.simulate(program).cycles == right
    assert q.races(program)


def test_kinds_of_races():
    kinds = []
    for reads, writes in ((("x",), ()), ((), ("x",))):
        program = [
            q.Do("M", 1, "first", writes=("x",)),
            q.Do("V", 1, "second", reads, writes),
        ]
        kinds.append(q.races(program)[0].kind)
    program = [q.Do("M", 1, "first", ("x",)), q.Do("V", 1, "second", (), ("x",))]
    kinds.append(q.races(program)[0].kind)
    assert kinds == [
        "read before it is written,",
        "written twice in any order,",
        "written over before it is read,",
    ]


def test_two_who_read_are_no_race():
    program = [q.Do("M", 1, "a", reads=("x",)), q.Do("V", 1, "b", reads=("x",))]
    assert q.races(program) == []


def test_order_goes_through_other_queues():
    program = [
        q.Do("MTE2", 1, "a", writes=("x",)),
        q.Set("MTE2", "MTE1"),
        q.Wait("MTE2", "MTE1"),
        q.Set("MTE1", "M"),
        q.Wait("MTE1", "M"),
        q.Do("M", 1, "b", reads=("x",)),
    ]
    assert q.races(program) == []
    assert len(q.races([program[0], program[-1]])) == 1


def test_a_flag_set_before_the_work_does_not_help():
    program = [
        q.Set("MTE2", "M"),
        q.Do("MTE2", 1, "a", writes=("x",)),
        q.Wait("MTE2", "M"),
        q.Do("M", 1, "b", reads=("x",)),
    ]
    assert len(q.races(program)) == 1


def test_a_flag_that_is_still_set_is_no_wait():
    """A core would lose the second set; the write does not wait for the read."""
    program = [
        q.Set("MTE1", "M"),
        q.Do("M", 1, "a", reads=("x",)),
        q.Wait("MTE1", "M"),
        q.Set("MTE1", "M"),
        q.Do("MTE1", 1, "b", writes=("x",)),
        q.Wait("MTE1", "M"),
    ]
    assert len(q.races(program)) == 1


def test_busy_adds_up_to_the_work():
    run = q.simulate(q.product_program(4, 10, 5, 20, 1))
    assert run.busy("M") * run.cycles == pytest.approx(80)
    assert run.busy("MTE3") * run.cycles == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: q.Do("GPU", 1), "queue='GPU'"),
        (lambda: q.Do("M", 0), "cycles=0"),
        (lambda: q.Set("M", "M"), "works in order anyway"),
        (lambda: q.Set("M", "V", 4), "id=4"),
        (lambda: q.Wait("M", "W"), "dst='W'"),
        (lambda: q.simulate([q.Set("M", "V")]), "flag M_V 0 is set 1 times"),
        (lambda: q.races([q.Wait("M", "V")]), "waited for 1 times"),
        (
            lambda: q.simulate(
                [
                    q.Wait("V", "M"),
                    q.Set("M", "V"),
                    q.Wait("M", "V"),
                    q.Set("V", "M"),
                ]
            ),
            "wait for each other for ever",
        ),
        (lambda: q.product_program(0, 1, 1, 1), "count=0"),
        (lambda: q.product_program(1, 1, 1, 1, buffers=5), "buffers=5"),
    ],
)
def test_nonsense_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
