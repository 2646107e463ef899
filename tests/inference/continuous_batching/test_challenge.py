"""The challenge can be won, and not by what is there, nor by one of two thoughts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmlab.inference.continuous_batching import (
    Limits,
    Plan,
    blocks_needed,
    challenge,
    give_running,
    schedule,
)


def careful(cap: int, keep: int):
    """Short steps, and some blocks per running request stay free."""

    def rule(running, waiting, available, limits: Limits) -> Plan:
        limits = replace(limits, max_tokens=cap)
        plan, budget, available = give_running(running, available, limits)
        if plan.preempted:
            return plan
        runs = len(running)
        for job in waiting:
            count = min(job.left, budget)
            if count == 0 or runs == limits.max_sequences:
                break
            whole = blocks_needed(job, job.left, limits.block_size)
            if runs and whole + keep * runs > available:
                break
            available -= blocks_needed(job, count, limits.block_size)
            budget -= count
            runs += 1
            plan.tokens[job.id] = count
            plan.admitted.append(job.id)
        return plan

    return rule


def wins(score: challenge.Score) -> tuple[bool, bool]:
    return score.throughput >= challenge.LEAST, score.gap <= challenge.BOUND


@pytest.mark.parametrize(
    ("rule", "won"),
    [
        (schedule, (False, False)),
        (careful(64, 0), (False, True)),
        (careful(512, 4), (True, False)),
        (careful(64, 4), (True, True)),
    ],
    ids=["schedule", "short steps", "free blocks", "both"],
)
def test_both_thoughts_are_needed(rule, won):
    assert wins(challenge.judge(rule)) == won


def test_other_limits_alone_do_not_win():
    for sequences in (4, 7):
        limits = replace(challenge.LIMITS, max_tokens=64, max_sequences=sequences)
        assert wins(challenge.judge(schedule, limits)) == (False, True)
