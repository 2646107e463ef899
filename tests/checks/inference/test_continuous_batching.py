"""Wrong answers to 07-inference/04-continuous-batching, each with its diagnosis."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from llmlab.checks.inference import continuous_batching as checks
from llmlab.checks.inference.continuous_batching import check
from llmlab.course.grading.state import neutral
from llmlab.inference import continuous_batching as batching
from llmlab.inference.continuous_batching import Plan
from tests.checks.rejecting import (
    Wrong,
    foreseen,
    rejects,
    told_apart,
    verdict,
)

SLUG = "07-inference/04-continuous-batching"

# Right, written otherwise ------------------------------------------------------------


def blocks_by_ceil(job, count, block_size):
    asked = math.ceil((job.computed + count) / block_size)
    return asked - job.blocks if asked > job.blocks else 0


def blocks_one_by_one(job, count, block_size):
    taken = 0
    while (job.blocks + taken) * block_size < job.computed + count:
        taken += 1
    return taken


def give_with_a_border(running, available, limits):
    """The list stays; a border moves down."""
    plan = Plan()
    border, left = len(running), limits.max_tokens
    for place, job in enumerate(running):
        if place >= border or left == 0:
            break
        count = left if job.left > left else job.left
        needed = blocks_by_ceil(job, count, limits.block_size)
        while needed > available and border > place:
            border -= 1
            available += running[border].own
            plan.preempted += [running[border].id]
        if border == place:
            break
        plan.tokens |= {job.id: count}
        available, left = available - needed, left - count
    return plan, left, available


def give_recursively(running, available, limits):
    """The first, then the rest with what is left."""

    def rest(jobs, budget, available):
        if not jobs or not budget:
            return {}, [], budget, available
        first, *others = jobs
        count = min(first.left, budget)
        needed = blocks_one_by_one(first, count, limits.block_size)
        if needed > available:
            *stay, last = jobs
            tokens, gone, *left = (
                rest(stay, budget, available + last.own)
                if stay
                else ({}, [], budget, available + last.own)
            )
            return tokens, [last.id, *gone], *left
        tokens, gone, *left = rest(others, budget - count, available - needed)
        return {first.id: count, **tokens}, gone, *left

    tokens, gone, *left = rest(list(running), limits.max_tokens, available)
    return [Plan(tokens, [], gone), *left]


def schedule_with_all(running, waiting, available, limits):
    """All conditions for coming in, in one."""
    plan, left, available = batching.give_running(running, available, limits)
    for runs, job in enumerate(waiting, start=len(running)):
        count = min(job.left, left)
        if (
            plan.preempted
            or runs >= limits.max_sequences
            or count < (1 if limits.chunked else job.left)
            or blocks_by_ceil(job, job.left, limits.block_size) > available
        ):
            return plan
        plan.admitted.append(job.id)
        plan.tokens[job.id] = count
        left -= count
        available -= blocks_by_ceil(job, count, limits.block_size)
    return plan


def schedule_with_a_queue(running, waiting, available, limits):
    tokens, left, available = give_with_a_border(running, available, limits)
    queue = [] if tokens.preempted else list(waiting)[::-1]
    while queue and left and len(running) + len(tokens.admitted) < limits.max_sequences:
        job = queue.pop()
        if blocks_one_by_one(job, job.left, limits.block_size) > available:
            queue = []
        elif job.left <= left or limits.chunked:
            tokens.tokens[job.id] = min(left, job.left)
            tokens.admitted = [*tokens.admitted, job.id]
            available -= blocks_one_by_one(
                job, tokens.tokens[job.id], limits.block_size
            )
            left -= tokens.tokens[job.id]
        else:
            queue = []
    return tokens


def latencies_by_index(arrivals, times):
    ttft = [times[i][0] - arrivals[i] for i in range(len(times))]
    return ttft, [
        times[i][j] - times[i][j - 1]
        for i in range(len(times))
        for j in range(1, len(times[i]))
    ]


def latencies_as_tuples(arrivals, times):
    ttft, itl = (), ()
    for arrival, written in zip(arrivals, times, strict=True):
        before = arrival
        for place, now in enumerate(written):
            if place:
                itl += (now - before,)
            else:
                ttft += (now - before,)
            before = now
    return [ttft, itl]


RIGHT = {
    "blocks_needed": (blocks_by_ceil, blocks_one_by_one),
    "give_running": (give_with_a_border, give_recursively),
    "schedule": (schedule_with_all, schedule_with_a_queue),
    "latencies": (latencies_by_index, latencies_as_tuples),
}


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [(name, answer) for name, answers in RIGHT.items() for answer in answers],
)
def test_right_answers_written_otherwise(exercise, answer):
    for seed in (0, 1):
        result = verdict(check, exercise, answer, seed=seed)
        assert result.outcome == "right", str(result)


# Wrong --------------------------------------------------------------------------------

KINDS = {
    "blocks_needed": (
        batching.blocks_needed,
        checks.wrong_blocks,
        checks.block_cases,
        checks.plain_number,
    ),
    "give_running": (
        batching.give_running,
        checks.wrong_running,
        checks.running_cases,
        checks.plain_three,
    ),
    "schedule": (
        batching.schedule,
        checks.wrong_schedules,
        checks.states,
        checks.plain_plan,
    ),
    "latencies": (
        batching.latencies,
        checks.wrong_latencies,
        checks.latency_cases,
        checks.plain_latencies,
    ),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("exercise", KINDS)
def test_no_two_mistakes_come_to_the_same(exercise, seed):
    right, wrongs, make, plain = KINDS[exercise]
    with neutral(seed):
        cases = make()
    told_apart(lambda way: checks.results(way, cases, plain), right, wrongs())


def named(exercise):
    """Every mistake that a check foresees, as a wrong answer with its own words."""
    return foreseen(exercise, KINDS[exercise][1]())


def blocks_as_float(job, count, block_size):
    return float(batching.blocks_needed(job, count, block_size))


def give_plan_only(running, available, limits):
    return batching.give_running(running, available, limits)[0]


def give_a_dict(running, available, limits):
    plan, *rest = batching.give_running(running, available, limits)
    return plan.tokens, *rest


def give_in_place(running, available, limits):
    plan, *rest = batching.give_running(running, available, limits)
    for _ in plan.preempted:
        running.pop()
    return plan, *rest


def schedule_nothing(running, waiting, available, limits):
    return Plan()


def schedule_halves(running, waiting, available, limits):
    plan = batching.schedule(running, waiting, available, limits)
    return Plan({id: n / 2 for id, n in plan.tokens.items()}, plan.admitted)


def schedule_at_most_three(running, waiting, available, limits):
    return batching.schedule(
        running, waiting, available, replace(limits, max_sequences=3)
    )


def latencies_of_one(arrivals, times):
    return [times[0][0] - arrivals[0]], []


def latencies_nested(arrivals, times):
    ttft, _ = batching.latencies(arrivals, times)
    return ttft, [[b - a for a, b in itertools.pairwise(w)] for w in times]


test_wrong_answers = rejects(
    SLUG,
    [
        *named("blocks_needed"),
        *named("give_running"),
        *named("schedule"),
        *named("latencies"),
        Wrong("blocks_needed", blocks_as_float, "whole number"),
        Wrong("give_running", give_plan_only, "three things"),
        Wrong("give_running", give_a_dict, "return a Plan"),
        Wrong("give_running", give_in_place, "in place"),
        Wrong("schedule", schedule_nothing, "the result is"),
        Wrong("schedule", schedule_halves, "whole number"),
        Wrong("schedule", schedule_at_most_three, "the result is"),
        Wrong("latencies", latencies_of_one, "the result is"),
        Wrong("latencies", latencies_nested, "a list for each request"),
    ],
)
