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
    accepts,
    foreseen,
    rejects,
    told_apart,
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


test_right_answers_written_otherwise = accepts(check, RIGHT, seeds=(0, 1))


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


def given(change):
    """The right plan of those that run, and what `change` does to it."""

    def answer(running, available, limits):
        plan, budget, free = batching.give_running(running, available, limits)
        return plan, budget, change(plan, running, limits, free)

    return answer


@given
def with_zeros(plan, running, limits, free):
    for job in running:
        if job.id not in plan.preempted:
            plan.tokens.setdefault(job.id, 0)
    return free


@given
def first_admitted_first(plan, running, limits, free):
    plan.preempted.sort()
    return free


@given
def tokens_for_who_goes(plan, running, limits, free):
    plan.tokens |= dict.fromkeys(plan.preempted, 1)
    return free


def goes_itself(plan, running):
    """Whether the one that was sent away last has found no blocks for itself."""
    return plan.preempted and len(plan.tokens) == len(running) - len(plan.preempted)


@given
def itself_not_noted(plan, running, limits, free):
    if goes_itself(plan, running) and sum(plan.tokens.values()) < limits.max_tokens:
        plan.preempted.pop()
    return free


@given
def its_own_not_back(plan, running, limits, free):
    if goes_itself(plan, running) and sum(plan.tokens.values()) < limits.max_tokens:
        return free - running[-len(plan.preempted)].own
    return free


def full_budget(running, available, limits):
    plan, _, free = batching.give_running(running, available, limits)
    return plan, limits.max_tokens, free


def all_available(running, available, limits):
    return *batching.give_running(running, available, limits)[:2], available


def jobs_for_ids(running, available, limits):
    plan, budget, free = batching.give_running(running, available, limits)
    plan.preempted = [job for job in running if job.id in plan.preempted]
    return plan, budget, free


def sends_a_stranger_away(running, available, limits):
    plan, budget, free = batching.give_running(running, available, limits)
    plan.preempted.append(99)
    return plan, budget, free


def give_whole(running, available, limits):
    """Nobody is cut."""
    plan, budget, free = batching.give_running(running, available, limits)
    for job in running:
        if plan.tokens.get(job.id, job.left) < job.left:
            taken = batching.blocks_needed(job, plan.tokens[job.id], limits.block_size)
            return plan, budget + plan.tokens.pop(job.id), free + taken
    return plan, budget, free


def give_blocks_for_all(running, available, limits):
    """Blocks are asked for all that is left, not for what it gets."""
    plan, budget, alive = Plan(), limits.max_tokens, list(running)
    for job in running:
        if job not in alive or not budget:
            break
        n, b = min(job.left, budget), limits.block_size
        while job in alive and batching.blocks_needed(job, job.left, b) > available:
            plan.preempted.append(alive[-1].id)
            available += alive.pop().own
        if job not in alive:
            break
        plan.tokens[job.id], budget = n, budget - n
        available -= batching.blocks_needed(job, n, b)
    return plan, budget, available


def give_from_the_oldest(running, available, limits):
    """The oldest goes, and keeps the tokens that it got."""
    plan, budget, alive = Plan(), limits.max_tokens, list(running)
    for job in running:
        if job not in alive or not budget:
            break
        n, b = min(job.left, budget), limits.block_size
        while job in alive and batching.blocks_needed(job, n, b) > available:
            plan.tokens.pop(alive[0].id, None)
            plan.preempted.append(alive[0].id)
            available += alive.pop(0).own
        if job not in alive:
            break
        plan.tokens[job.id], budget = n, budget - n
        available -= batching.blocks_needed(job, n, b)
    return plan, budget, available


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


def schedule_without_tokens(running, waiting, available, limits):
    plan = batching.schedule(running, waiting, available, limits)
    return Plan(
        {id: n for id, n in plan.tokens.items() if id not in plan.admitted},
        plan.admitted,
        plan.preempted,
    )


def schedule_one_too_many(running, waiting, available, limits):
    more = replace(limits, max_sequences=limits.max_sequences + 1)
    return batching.schedule(running, waiting, available, more)


def schedule_over_budget(running, waiting, available, limits):
    plan = batching.schedule(running, waiting, available, limits)
    left = {job.id: job.left for job in waiting}
    plan.tokens |= {id: left[id] for id in plan.admitted}
    return plan


def schedule_as_if_new(running, waiting, available, limits):
    """Blocks that a waiting request has already are asked for again."""
    known = [replace(job, blocks=0) for job in waiting]
    return batching.schedule(running, known, available, limits)


def schedule_as_if_empty(running, waiting, available, limits):
    """Tokens that are stored already are not counted in the blocks."""
    known = [replace(job, computed=0, blocks=0) for job in waiting]
    return batching.schedule(running, known, available, limits)


def schedule_the_second(running, waiting, available, limits):
    """If nobody can come in, the second is tried."""
    plan = batching.schedule(running, waiting, available, limits)
    if plan.admitted or plan.preempted:
        return plan
    return batching.schedule(running, waiting[1:], available, limits)


def schedule_long_ones_cut(running, waiting, available, limits):
    """Only who is too long for any step is cut."""
    plan = batching.schedule(running, waiting, available, limits)
    long = waiting and waiting[0].left > limits.max_tokens
    if plan.admitted or plan.preempted or not long:
        return plan
    return batching.schedule(
        running, waiting[:1], available, replace(limits, chunked=True)
    )


def schedule_one_too_few(running, waiting, available, limits):
    less = replace(limits, max_sequences=max(1, limits.max_sequences - 1))
    return batching.schedule(running, waiting, available, less)


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
        Wrong("give_running", with_zeros, "with 0: leave it out"),
        Wrong("give_running", first_admitted_first, "in the order of going"),
        Wrong("give_running", tokens_for_who_goes, "has tokens in the plan all the"),
        Wrong("give_running", itself_not_noted, "sent away itself, so note it"),
        Wrong("give_running", its_own_not_back, "not available afterwards"),
        Wrong("give_running", full_budget, "the result is"),
        Wrong("give_running", all_available, "the result is"),
        Wrong("give_running", jobs_for_ids, "where a whole number is asked"),
        Wrong("give_running", sends_a_stranger_away, "request 99 is sent away"),
        Wrong("give_running", give_whole, "as the budget allows, whether"),
        Wrong("give_running", give_blocks_for_all, "though the blocks were enough"),
        Wrong("give_running", give_from_the_oldest, "is sent away first"),
        Wrong("schedule", schedule_nothing, "does not come in, and could"),
        Wrong("schedule", schedule_without_tokens, "no tokens are noted"),
        Wrong("schedule", schedule_one_too_many, "more requests run than"),
        Wrong("schedule", schedule_over_budget, "more tokens than `max_tokens`"),
        Wrong("schedule", schedule_the_second, "overtakes request"),
        Wrong("schedule", schedule_long_ones_cut, "is cut, and `chunked` is False"),
        Wrong("schedule", schedule_one_too_few, "and could: there is room"),
        Wrong("schedule", schedule_as_if_new, "does not come in, and could"),
        Wrong("schedule", schedule_as_if_empty, "comes in, and cannot"),
        Wrong("schedule", schedule_halves, "whole number"),
        Wrong("schedule", schedule_at_most_three, "does not come in, and could"),
        Wrong("latencies", latencies_of_one, "the result is"),
        Wrong("latencies", latencies_nested, "a list for each request"),
    ],
)
