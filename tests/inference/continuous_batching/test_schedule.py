"""The plan of a step: vLLM's own, and what holds of every plan."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.inference.continuous_batching import (
    Job,
    Limits,
    Plan,
    blocks_needed,
    check_plan,
    published,
    schedule,
)

VLLM = published.vllm()
OPENVINO = published.openvino()


# vLLM ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", VLLM["cases"], ids=lambda case: case["name"])
def test_plans_are_those_of_vllm(case):
    assert published.plans_of(case) == case["steps"]


def test_the_cases_of_vllm_send_away_cut_prompts_and_let_wait():
    """Else they would prove little."""
    steps = [step for case in VLLM["cases"] for step in case["steps"]]
    assert sum(len(step["preempted"]) for step in steps) > 20
    cut = 0
    for case in VLLM["cases"]:
        for step in case["steps"]:
            for id in step["admitted"]:
                cut += step["tokens"][str(id)] < case["requests"][id][0]
    assert cut > 20


def test_blocks_for_the_whole_prompt_is_what_vllm_asks():
    """Not for its first part: many cases come out otherwise with that rule."""
    other = [
        case["name"]
        for case in VLLM["cases"]
        if published.plans_of(case, published.first_part_is_enough) != case["steps"]
    ]
    assert "a prompt must fit as a whole" in other
    assert len(other) >= 8


# OpenVINO -----------------------------------------------------------------------------

ALIKE = {"decoding goes on beside a long prompt", "two long prompts"}


@pytest.mark.parametrize("case", OPENVINO["cases"], ids=lambda case: case["name"])
def test_steps_are_those_of_openvino_where_it_has_the_same_rule(case):
    assert (published.steps_of(case) == case["steps"]) == (case["name"] in ALIKE)
    # whatever the order: all get their tokens
    wrote = [id for step in case["steps"] for id in step["wrote"]]
    assert [wrote.count(id) for id in range(len(case["requests"]))] == [
        output for _, output, _ in case["requests"]
    ]


def test_openvino_admits_whoever_has_blocks_for_a_first_part():
    """Requests write in the order of that rule, not of ours."""
    name = "a prompt must fit as a whole"
    (case,) = [c for c in OPENVINO["cases"] if c["name"] == name]
    theirs = [step["wrote"] for step in case["steps"]]
    first = published.steps_of(case, published.first_part_is_enough)
    assert [step["wrote"] for step in first] == theirs
    assert [step["wrote"] for step in published.steps_of(case)] != theirs


def test_openvino_runs_more_requests_than_its_limit():
    """`max_num_seqs` is not looked at when prompts come in parts."""
    (case,) = [c for c in OPENVINO["cases"] if c["name"] == "more requests than places"]
    assert case["steps"][0]["scheduled"] == 5 > case["max_sequences"]


# One step -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("computed", "count", "blocks", "needed"),
    [
        (0, 1, 0, 1),
        (0, 16, 0, 1),
        (0, 17, 0, 2),
        (16, 1, 1, 1),  # the last block is full
        (15, 1, 1, 0),
        (15, 2, 1, 1),
        (32, 5, 0, 3),  # found, but nobody is using the blocks: all are taken
        (32, 5, 2, 1),
        (3, 1, 5, 0),  # more than it needs
    ],
)
def test_blocks_needed(computed, count, blocks, needed):
    assert blocks_needed(Job(0, computed, count, blocks), count, 16) == needed


def decoding(id: int, computed: int, b: int = 4) -> Job:
    blocks = -(-computed // b)
    return Job(id, computed, 1, blocks, blocks)


def test_decoding_comes_before_prompts():
    limits = Limits(max_tokens=10, block_size=4)
    running = [decoding(0, 5), Job(1, 8, 30, 2, 2), decoding(2, 6)]
    plan = schedule(running, [Job(3, 0, 5)], 50, limits)
    # the prompt of request 1 runs before 2 and takes what is left
    assert plan == Plan({0: 1, 1: 9})
    limits = Limits(max_tokens=34, block_size=4)
    plan = schedule(running, [Job(3, 0, 5)], 50, limits)
    assert plan == Plan({0: 1, 1: 30, 2: 1, 3: 2}, admitted=[3])


def test_without_chunks_a_prompt_waits_for_a_step_of_its_size():
    limits = Limits(max_tokens=8, block_size=4, chunked=False)
    waiting = [Job(1, 0, 8), Job(2, 0, 2)]
    assert schedule([decoding(0, 5)], waiting, 50, limits) == Plan({0: 1})
    assert schedule([], waiting, 50, limits) == Plan({1: 8}, admitted=[1])


def test_the_last_admitted_goes_first_and_nobody_comes():
    limits = Limits(max_tokens=64, block_size=4)
    running = [decoding(0, 8), decoding(1, 8), decoding(2, 8)]
    plan = schedule(running, [Job(3, 0, 1)], 0, limits)
    # 2 gives two blocks: one for 0 and one for 1
    assert plan == Plan({0: 1, 1: 1}, preempted=[2])


def test_a_request_can_send_itself_away():
    limits = Limits(max_tokens=64, block_size=4)
    running = [decoding(0, 7), decoding(1, 8)]
    assert schedule(running, [], 0, limits) == Plan({0: 1}, preempted=[1])


def test_shared_blocks_do_not_come_back():
    limits = Limits(max_tokens=64, block_size=4)
    running = [decoding(0, 8), Job(1, 8, 1, 2, own=0), Job(2, 8, 1, 2, own=1)]
    plan = schedule(running, [], 0, limits)
    assert plan == Plan({0: 1}, preempted=[2, 1])


def test_nobody_overtakes():
    limits = Limits(max_tokens=64, block_size=4)
    waiting = [Job(0, 0, 12), Job(1, 0, 1)]
    assert schedule([], waiting, 2, limits) == Plan()
    assert schedule([], waiting, 3, limits) == Plan({0: 12}, admitted=[0])


def test_what_was_found_is_not_computed():
    limits = Limits(max_tokens=64, block_size=4)
    plan = schedule([], [Job(0, 8, 3, blocks=2)], 1, limits)
    assert plan == Plan({0: 3}, admitted=[0])
    assert schedule([], [Job(0, 8, 3, blocks=0)], 2, limits) == Plan()


def test_the_arguments_stay_as_they_are():
    running = [decoding(0, 8), decoding(1, 8)]
    waiting = [Job(2, 0, 5)]
    schedule(running, waiting, 0, Limits(block_size=4))
    assert running == [decoding(0, 8), decoding(1, 8)]
    assert waiting == [Job(2, 0, 5)]


@pytest.mark.parametrize("name", ["max_tokens", "max_sequences", "block_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_limits_are_numbers_from_one(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Limits(**{name: value})


# Every state --------------------------------------------------------------------------


@st.composite
def states(draw) -> tuple[list[Job], list[Job], int, Limits]:
    """Any state that an engine can be in."""
    b = draw(st.integers(1, 5))
    chunked = draw(st.booleans())
    limits = Limits(draw(st.integers(1, 40)), draw(st.integers(1, 6)), b, chunked)
    running = []
    for id in range(draw(st.integers(0, limits.max_sequences))):
        computed = draw(st.integers(1, 30))
        blocks = -(-computed // b)
        left = draw(st.one_of(st.just(1), st.integers(1, 20)))
        running.append(Job(id, computed, left, blocks, draw(st.integers(0, blocks))))
    waiting = []
    for id in range(draw(st.integers(0, 5))):
        found = b * draw(st.integers(0, 3))
        used = draw(st.integers(0, found // b))
        waiting.append(Job(100 + id, found, draw(st.integers(1, 40)), used))
    return running, waiting, draw(st.integers(0, 25)), limits


@settings(max_examples=300, deadline=None)
@given(states())
def test_every_plan_can_be_carried_out(state):
    running, waiting, _, limits = state
    plan = schedule(*state)
    check_plan(plan, *state)
    # first come, first served; those who go are the last
    assert plan.admitted == [job.id for job in waiting[: len(plan.admitted)]]
    gone = len(plan.preempted)
    assert plan.preempted == [job.id for job in running[::-1][:gone]]
    assert not (plan.admitted and plan.preempted)
    # nobody is passed over: whoever runs and has no token is behind those who have one
    stay = [job.id for job in running[: len(running) - gone]]
    served = [id in plan.tokens for id in stay]
    assert served == sorted(served, reverse=True)
    assert all(served) or sum(plan.tokens.values()) == limits.max_tokens


@settings(max_examples=200, deadline=None)
@given(states())
def test_who_decodes_is_served_beside_any_prompt(state):
    """A prompt that comes in takes nothing from those who run."""
    running, _, available, limits = state
    alone = schedule(running, [], available, limits)
    beside = schedule(*state)
    assert {id: beside.tokens.get(id) for id in alone.tokens} == alone.tokens
    assert beside.preempted == alone.preempted


@settings(max_examples=200, deadline=None)
@given(states())
def test_nobody_is_sent_away_for_nothing(state):
    """With one more block for each that went, the last to go could have stayed."""
    running, _, available, limits = state
    plan = schedule(*state)
    if not plan.preempted:
        return
    stay = running[: len(running) - len(plan.preempted)]
    last = running[len(stay)]
    taken = sum(
        blocks_needed(job, plan.tokens[job.id], limits.block_size)
        for job in stay
        if job.id in plan.tokens
    )
    before = available + sum(job.own for job in running[len(stay) + 1 :])
    if stay and stay[-1].id in plan.tokens:  # it went for the sake of the last of them
        assert taken > before or last.id == plan.preempted[-1]
    blocks = sum(blocks_needed(job, job.left, limits.block_size) for job in running)
    assert not schedule(running, [], available + blocks, limits).preempted


# What cannot be carried out -----------------------------------------------------------

STATE = (
    [decoding(0, 8), Job(1, 4, 6, 1, 1)],
    [Job(2, 0, 5), Job(3, 0, 2)],
    2,
    Limits(max_tokens=8, max_sequences=3, block_size=4),
)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan({7: 1}), "request 7"),
        (Plan({2: 1}), "request 2, which does not run"),
        (Plan({0: 1}, preempted=[0]), "request 0, which does not run"),
        (Plan({0: 2}), "gets 2 tokens, and has 1 left"),
        (Plan({0: 0}), "gets 0 tokens"),
        (Plan({0: 1.0}), "gets 1.0 tokens"),
        (Plan({2: 1}, admitted=[2, 2]), "request 2 twice"),
        (Plan({}, admitted=[2]), "gets no token"),
        (Plan({0: 1}, admitted=[0]), "not waiting"),
        (Plan({}, preempted=[2]), "not running"),
        (Plan({0: 1, 1: 6, 2: 2}, admitted=[2]), "9 tokens are planned"),
        (Plan({2: 1, 3: 1}, admitted=[2, 3]), "4 requests run"),
        (Plan({0: 1, 1: 6}), "takes 3 blocks, and 2"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(plan, says):
    with pytest.raises(ValueError, match=says):
        check_plan(plan, *STATE)


def test_a_cut_prompt_is_refused_where_prompts_are_whole():
    limits = Limits(max_tokens=8, block_size=4, chunked=False)
    with pytest.raises(ValueError, match="request 2 is cut"):
        check_plan(Plan({2: 1}, admitted=[2]), *STATE[:3], limits)


def test_plans_that_can_be_carried_out_pass():
    plans: Sequence[Plan] = (
        Plan(),
        Plan({0: 1, 1: 3}),
        Plan({1: 4, 2: 4}, admitted=[2], preempted=[0]),
        Plan({3: 2}, admitted=[3], preempted=[1]),
    )
    for plan in plans:
        check_plan(plan, *STATE)
