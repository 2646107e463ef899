"""What other engines plan on small cases, and what our rule plans on the same.

    vllm_schedules.json  vLLM's scheduler, step by step: tokens, admitted, preempted
    openvino_steps.json  OpenVINO GenAI: how many requests a step computed, who wrote

A case has limits, blocks of the pool, and requests: tokens of the prompt, tokens to
write, the step before which it comes. Both files were written by the scripts
`continuous_batching_goldens.py` and `openvino_batching_goldens.py`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from llmlab.inference.continuous_batching.schedule import (
    Job,
    Limits,
    Plan,
    blocks_needed,
    give_running,
    schedule,
)
from llmlab.inference.continuous_batching.simulation import Cost, Scheduler, simulate
from llmlab.inference.continuous_batching.traces import Request

DATA = Path(__file__).parents[1] / "data"
# A step takes a second, so that arrivals are numbers of steps.
CLOCK = Cost(1.0, 0.0)


@cache
def vllm() -> dict:
    """vLLM's plans: version, block_size, cases."""
    return json.loads((DATA / "vllm_schedules.json").read_text(encoding="utf-8"))


@cache
def openvino() -> dict:
    """OpenVINO GenAI's steps: version, block_size, cases."""
    return json.loads((DATA / "openvino_steps.json").read_text(encoding="utf-8"))


def limits_of(case: dict, block_size: int) -> Limits:
    """The limits of a case."""
    chunked = case.get("chunked", True)
    return Limits(case["max_tokens"], case["max_sequences"], block_size, chunked)


def requests_of(case: dict) -> list[Request]:
    """The requests of a case, a step a second."""
    return [
        Request(float(step), prompt, output)
        for prompt, output, step in case["requests"]
    ]


def plans_of(
    case: dict, rule: Scheduler = schedule, block_size: int = 16
) -> list[dict]:
    """What a rule plans, in the form in which vLLM's plans are stored."""
    plans = []

    def recording(*state) -> Plan:
        plan = rule(*state)
        plans.append(
            {
                "tokens": {str(id): count for id, count in plan.tokens.items()},
                "admitted": list(plan.admitted),
                "preempted": sorted(plan.preempted),
            }
        )
        return plan

    limits = limits_of(case, block_size)
    simulate(requests_of(case), CLOCK, limits, case["blocks"], recording)
    return plans


def steps_of(
    case: dict, rule: Scheduler = schedule, block_size: int = 32
) -> list[dict]:
    """The same, in the form in which OpenVINO's steps are stored."""
    limits = limits_of(case, block_size)
    served = simulate(requests_of(case), CLOCK, limits, case["blocks"], rule)
    found = []
    for step in served.steps:
        end = step.start + step.seconds
        wrote = [id for id, times in enumerate(served.times) if end in times]
        found.append({"scheduled": len(step.tokens), "wrote": wrote})
    return found


def first_part_is_enough(
    running: list[Job], waiting: list[Job], available: int, limits: Limits
) -> Plan:
    """`schedule`, but blocks for the part of this step let a request in."""
    plan, budget, available = give_running(running, available, limits)
    for job in waiting if not plan.preempted else ():
        count = min(job.left, budget)
        needed = blocks_needed(job, count, limits.block_size)
        room = limits.max_sequences - len(running) - len(plan.admitted)
        if room == 0 or count == 0 or needed > available:
            break
        if count < job.left and not limits.chunked:
            break
        available -= needed
        budget -= count
        plan.tokens[job.id] = count
        plan.admitted.append(job.id)
    return plan
