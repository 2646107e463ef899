"""The traces that a stepper plays, and the HTML that plays them.

What the page does with them is in tests/browser/test_steps.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch

from llmlab.course import steps
from llmlab.course.steppers import (
    Lanes,
    Mark,
    Step,
    Trace,
    all_reduce_trace,
    player,
    schedule_trace,
)
from llmlab.parallelism import World
from llmlab.parallelism.collectives import bruck, halving, ring, tree
from llmlab.parallelism.collectives import schedule as moves_of
from llmlab.parallelism.pipeline import (
    Costs,
    gpipe,
    interleaved,
    naive,
    one_f_one_b,
    schedules,
    simulate,
    until_stuck,
    zb_h1,
    zb_h2,
    zb_v,
)

SCHEDULES = [
    (naive, "loop"),
    (gpipe, "loop"),
    (one_f_one_b, "loop"),
    (interleaved, "loop"),
    (zb_h1, "loop"),
    (zb_h2, "loop"),
    (zb_v, "v"),
]
CROSSED = [one_f_one_b(1, 2)[0], gpipe(1, 2)[0]]
TINY = Trace(Lanes(1, 1.0), (Step((), "nothing"),))


# Pipeline schedules -------------------------------------------------------------------


def name_of(value) -> str:
    """A schedule's name, or its layout."""
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("make", "layout"), SCHEDULES, ids=name_of)
def test_a_schedule_is_told_op_by_op_and_ends_as_it_is_simulated(make, layout):
    schedule = make(4, 8)
    costs = Costs(1.2, 0.9, 0.7, 0.1)
    found = simulate(schedule, costs, layout)
    trace = schedule_trace(schedule, costs=costs, layout=layout)
    bars = [mark.at for step in trace.steps for mark in step.marks]
    assert bars == sorted(
        ((bar.start, bar.end, bar.rank) for bar in found.bars),
        key=lambda at: (at[0], at[2]),
    )
    assert trace.scene.until == found.makespan and trace.stop is None
    last = trace.steps[-1]
    assert last.facts["waiting"] == f"{100 * found.bubble:.0f}%"
    peaks = schedules.peak_microbatches(schedule)
    assert [most for _, most in last.sides] == pytest.approx(peaks)
    assert {now for now, _ in last.sides} == {0}
    assert "All is done" in last.alt and "All is done" not in trace.steps[-2].alt


def test_a_step_says_what_runs_and_which_line_it_is():
    step = schedule_trace(one_f_one_b(2, 3)).steps[5]
    (mark,) = step.marks
    assert mark.value == "B0 on rank 0: from 4 to 6, after waiting 2"
    assert mark.line == "schedule[0][2] is ('B', 0, 0)"
    assert step.alt.startswith(mark.value + ". Rank 0 holds 1, at most 2 so far")


@pytest.mark.parametrize(("make", "layout"), SCHEDULES, ids=name_of)
def test_until_stuck_finds_what_simulate_finds(make, layout):
    bars, waits = until_stuck(make(3, 6), layout=layout)
    assert bars == simulate(make(3, 6), layout=layout).bars and waits == []


def test_until_stuck_names_who_waits_for_what():
    bars, waits = until_stuck(CROSSED)
    assert [(bar.rank, bar.kind, bar.microbatch) for bar in bars] == [
        (0, "F", 0),
        (1, "F", 0),
    ]
    assert waits == [
        (0, ("B", 0, 0), ("I", 0, 1)),
        (1, ("F", 1, 0), ("F", 1, 0)),
    ]


def test_of_two_results_that_are_missing_the_ranks_own_is_named():
    backwards_first = [[("B", 0, 0), ("F", 0, 0)]] * 2
    _, waits = until_stuck(backwards_first)
    assert waits == [
        (0, ("B", 0, 0), ("F", 0, 0)),
        (1, ("B", 0, 0), ("F", 0, 1)),
    ]


def test_a_deadlock_is_the_last_step_and_named():
    trace = schedule_trace(CROSSED)
    assert trace.stop == 3 == len(trace.steps) - 1
    assert trace.fault == trace.steps[3].alt
    assert trace.fault == (
        "Deadlock: rank 0 cannot begin B0: it waits for B0 of rank 1; rank 1 cannot"
        " begin F1: it waits for F1 of rank 0."
    )
    assert {mark.kind for mark in trace.steps[3].marks} == {"stuck"}


def test_an_op_before_what_it_needs_waits_for_its_own_list():
    trace = schedule_trace([[("B", 0, 0), ("F", 0, 0)]])
    assert trace.stop == 1
    assert "it waits for F0 of its own list, further down" in trace.fault


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([], "empty"),
        ([[("F", 0, 0)]], "never finishes the backward of microbatch 0"),
        ([[("F", 0, 0), ("F", 0, 0), ("B", 0, 0)]], "F of microbatch 0.*twice"),
        ([[("F", 0, 0), ("X", 0, 0)]], "is no op"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule, message):
    with pytest.raises(ValueError, match=message):
        schedule_trace(schedule)


def test_a_goal_is_a_sentence_and_an_unknown_one_is_refused():
    trace = schedule_trace(gpipe(2, 4), goal={"bubble": 0.255, "peak": 2})
    assert trace.plan["goal_text"] == (
        "the ranks wait at most 26% of the time, and no rank holds more than 2"
        " microbatches at once"
    )
    with pytest.raises(ValueError, match=r"'memory'.*time, bubble, peak"):
        schedule_trace(gpipe(2, 4), goal={"memory": 2})


# All-reduces --------------------------------------------------------------------------

ALGORITHMS = [
    (algorithm, p)
    for algorithm in (ring, tree, halving, bruck)
    for p in (2, 3, 4, 5, 6)
    if algorithm is not halving or p in (2, 4)
]


def last_marks(trace: Trace) -> dict[str, Mark]:
    """What is to be seen at the end."""
    found = {}
    for step in trace.steps:
        for gone in step.gone:
            del found[gone]
        found |= {mark.id: mark for mark in step.marks}
    return found


@pytest.mark.parametrize(("algorithm", "p"), ALGORITHMS)
def test_every_algorithm_is_played_to_its_end(algorithm, p):
    schedule = algorithm.all_reduce(p)
    trace = all_reduce_trace(schedule, p)
    assert trace.stop is None and not trace.fault
    marks = last_marks(trace)
    cells = [mark for mark in marks.values() if mark.shape == "cell"]
    assert len(cells) == p * p and {mark.kind for mark in cells} == {"done"}
    assert not [mark for mark in marks.values() if mark.shape == "arrow"]
    arrows = [m for step in trace.steps for m in step.marks if m.shape == "arrow"]
    assert len(arrows) == len(schedule)
    n = moves_of.pieces(schedule)
    sent = max(moves_of.bytes_sent(schedule, [1] * n, p)) / n
    assert float(trace.steps[-1].facts["sent"].split()[0]) == pytest.approx(
        sent, abs=0.005
    )


def test_the_ring_is_told_round_by_round():
    trace = all_reduce_trace(ring.all_reduce(3), 3)
    assert [step.alt for step in trace.steps[1:3]] == [
        "Round 1 of 4: rank 0 sends chunk 0 (0) to 1; 1 sends chunk 1 (1) to 2; 2 sends"
        " chunk 2 (2) to 0.",
        "Round 1 of 4 arrives: rank 0 adds chunk 2 (2): 0+2; rank 1 adds chunk 0 (0):"
        " 0+1; rank 2 adds chunk 1 (1): 1+2.",
    ]
    assert "rank 0 keeps chunk 0 (0+1+2): 0+1+2" in trace.steps[6].alt
    assert trace.steps[1].marks[0].line == (
        "Move(step=0, src=0, dst=1, chunks=(0,), add=True)"
    )


def own_ring(mistake: str):
    """A ring all-reduce as a learner writes it, with a mistake ('' for none)."""

    def all_reduce(comm, x):
        p, r = comm.size, comm.rank
        chunks = [chunk.clone() for chunk in x.chunk(p)]
        rounds = 2 * (p - 1)
        if mistake == "too few":
            rounds -= 1
        for s in range(rounds):
            mine, theirs = (r - s) % p, (r - s - 1) % p
            if mistake == "always its own":
                mine = r
            if mistake == "wrong place":
                theirs = mine
            got = comm.sendrecv(chunks[mine], (r + 1) % p, (r - 1) % p)
            adds = s < p - 1
            if mistake == "one round too long":
                adds = s < p
            if mistake == "one round too short":
                adds = s < p - 2
            if mistake == "never adds":
                adds = False
            if mistake == "drops":
                continue
            if mistake == "doubles" and r == 2 and s == 1:
                got = 2 * got
            chunks[theirs] = chunks[theirs] + got if adds else got
        if mistake == "turned":
            chunks = chunks[1:] + chunks[:1]
        return torch.cat(chunks)

    return all_reduce


@pytest.mark.parametrize(
    ("mistake", "stop", "fault"),
    [
        ("", None, ""),
        (
            "always its own",
            4,
            "rank 0 adds chunk 3 (3) and has 0+3+3: rank 3 is in it more than once",
        ),
        ("wrong place", 2, "rank 0 adds chunk 3 (3) to chunk 0"),
        (
            "one round too long",
            8,
            "rank 0 adds chunk 0 (0+1+2+3) and has 0+0+1+2+3: rank 0 is in it more"
            " than once",
        ),
        (
            "one round too short",
            6,
            "rank 0 keeps chunk 1 (1+2+3) in place of 0: the summand of rank 0 is lost",
        ),
        (
            "never adds",
            2,
            "rank 0 keeps chunk 3 (3) in place of 0: the summand of rank 0 is lost",
        ),
        ("drops", 2, "rank 0 makes no use of chunk 3 (3): it still has 0"),
        ("too few", 11, "rank 0 returns chunk 2 as 0+2+3, without 1"),
        ("turned", 13, "rank 0 returns chunk 0 as chunk 1"),
    ],
)
def test_a_learners_own_stops_at_its_first_wrong_chunk(mistake, stop, fault):
    trace = all_reduce_trace(own_ring(mistake), 4)
    assert (trace.stop, trace.fault) == (stop, fault)
    if fault:
        assert fault in trace.steps[stop].alt
        wrong = [mark for mark in trace.steps[stop].marks if mark.kind == "wrong"]
        assert wrong
        before = [m.kind for step in trace.steps[:stop] for m in step.marks]
        assert "wrong" not in before


def test_one_wrong_rank_is_named():
    trace = all_reduce_trace(own_ring("doubles"), 4)
    assert trace.fault.startswith("rank 2 ") and "more than once" in trace.fault
    assert "first of" not in trace.steps[trace.stop].alt


def test_the_line_that_sends_is_the_learners():
    trace = all_reduce_trace(own_ring(""), 3)
    lines = {m.line for step in trace.steps for m in step.marks if m.shape == "arrow"}
    assert lines == {"got = comm.sendrecv(chunks[mine], (r + 1) % p, (r - 1) % p)"}


def test_a_deadlock_is_told_and_an_error_is_raised():
    def waits(comm, x):
        comm.send(x, (comm.rank + 1) % comm.size)
        return comm.recv((comm.rank - 1) % comm.size)

    trace = all_reduce_trace(waits, 3)
    assert trace.stop == len(trace.steps) - 1
    assert "rank 1 waits in send to rank 2" in trace.steps[-1].alt

    def breaks(comm, x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        all_reduce_trace(breaks, 3)


def first_half(comm, x):
    return comm.sendrecv(x[:4], (comm.rank + 1) % 3, (comm.rank - 1) % 3)


@pytest.mark.parametrize(
    ("fn", "p", "message"),
    [
        (own_ring(""), 7, "p=7 must be 2 … 6"),
        (own_ring(""), 1, "p=1 must be 2 … 6"),
        (lambda comm, x: comm.all_reduce(x), 3, "nothing was sent"),
        (first_half, 3, "rank 0 sends 4 numbers; .*whole chunks"),
        (
            lambda comm, x: comm.sendrecv(x / 3, 1 - comm.rank, 1 - comm.rank),
            2,
            "rank 0 sends 0.333333, which is no sum",
        ),
        (
            lambda comm, x: comm.sendrecv(x, 1 - comm.rank, 1 - comm.rank)[:2],
            2,
            r"rank 0 returns a tensor of shape \(2,\).* 4 numbers",
        ),
        (
            lambda comm, x: comm.sendrecv(x, 1 - comm.rank, 1 - comm.rank) and None,
            2,
            "Boolean value of Tensor",
        ),
    ],
)
def test_what_cannot_be_followed_is_named(fn, p, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        all_reduce_trace(fn, p)


def test_watching_changes_nothing():
    plain = World(4)
    x = torch.arange(16.0)
    expected = plain.run(own_ring(""), x)
    assert all(torch.equal(result, 4 * x) for result in expected)


# The output ---------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch):
    found = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: found.append(data))
    return found


def embedded(text: str) -> dict:
    """The JSON in the HTML."""
    (found,) = re.findall(
        r'<script type="application/json">(.*?)</script>', text, re.DOTALL
    )
    return json.loads(found)


def test_the_output_is_html_and_a_sentence(shown):
    steps(schedule_trace(gpipe(2, 2)), title="A & B")
    (data,) = shown
    assert set(data) == {"text/html", "text/plain"}
    assert data["text/plain"].startswith("Stepper: A & B\nB1 on rank 0: from 7 to 9")
    assert "A &amp; B" in data["text/html"]
    plan = embedded(data["text/html"])["traces"][0]["plan"]
    assert plan["lists"][0][0] == ["F", 0, 0]


def test_two_runs_give_the_same_output(shown):
    for _ in range(2):
        steps(all_reduce_trace(own_ring(""), 4))
    steps(all_reduce_trace(own_ring("drops"), 4))
    first, second, other = (data["text/html"] for data in shown)
    assert first == second
    ids = [re.search(r'<figure [^>]*id="(\w+)"', text)[1] for text in (first, other)]
    assert ids[0] != ids[1]


def test_the_largest_that_a_lesson_needs_is_small(shown):
    steps({make.__name__: schedule_trace(make(4, 12)) for make, _ in SCHEDULES[:6]})
    steps(all_reduce_trace(ring.all_reduce(6), 6))
    for data in shown:
        assert len(data["text/html"].encode()) < 80_000


def test_nothing_is_fetched():
    text = player.as_html({"": all_reduce_trace(ring.all_reduce(3), 3)}, "t", "last")
    text = text.replace("http://www.w3.org/2000/svg", "")
    assert not re.findall(r"(?:https?:)?//[a-z]|@import|url\(", text)


def test_text_that_ends_a_script_cannot_break_out():
    mark = Mark("a", "bar", (0, 1, 0), value="</script><b><!-- <script>")
    trace = Trace(Lanes(1, 1.0), (Step((mark,), "</script><b>"),))
    text = player.as_html({"": trace}, "</script><b>", "last")
    assert "</script><b>" not in text and "<!--" not in text
    found = embedded(text)["traces"][0]["steps"][0]
    assert found["marks"][0]["value"] == mark.value


def test_what_is_too_large_is_refused():
    mark = Mark("a", "bar", (0, 1, 0), value="x" * 150_000)
    with pytest.raises(ValueError, match="a page can carry 150,000"):
        steps(Trace(Lanes(1, 1.0), (Step((mark,), "a"),)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: steps({}), "trace is empty"),
        (lambda: steps({"a": [1]}), "trace 'a' is a list"),
        (lambda: steps(TINY, start="middle"), "start='middle' must be one of first"),
        (lambda: Step((), " "), "alt is empty"),
        (lambda: Trace(Lanes(1, 1.0), ()), "one step or more"),
        (lambda: Mark("a", "star", (1, 2)), "shape='star' of mark 'a'"),
        (lambda: Mark("a", "bar", (1, 2)), "a bar needs 3 numbers"),
        (lambda: Mark("a", "bar", (1, 2, 0), kind="red"), "kind='red' of mark 'a'"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_course_loads_it_when_it_is_asked_for():
    code = (
        "import sys, llmlab.course; before = 'llmlab.course.steppers' in sys.modules;"
        " from llmlab.course import steps; print(before, callable(steps))"
    )
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
