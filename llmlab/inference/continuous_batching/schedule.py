"""What the next step computes: so many tokens of each request.

Iteration-level scheduling: Yu et al. 2022 (Orca). Chunked prefill: Agrawal et al. 2023,
https://arxiv.org/abs/2308.16369. The rule is that of vLLM: a step has a budget of
tokens, and makes no difference between a prompt and a token that was just written. A
request that decodes has one token left to compute; one in prefill has the rest of its
text, and may get a part of it.

    computed  tokens whose keys and values are stored
    left      tokens to compute before the next one can be written
    blocks    blocks that need not be taken any more: those of its table
    own       blocks that come back when it is sent away

Running requests come first, in the order in which they were admitted; then waiting
ones, first come, first served. Where no block is left for a running request, the one
that was admitted last loses its blocks and waits again. A waiting request is admitted
only if there are blocks for its whole text, though it takes those of its first part:
else two long prompts begin, and neither can end.

Simplified: nobody has priority, and blocks that running prompts will yet take are not
set aside (vLLM does neither by default). Without chunks, a text that is longer than
`max_tokens` is never admitted: whoever accepts requests refuses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Job:
    """What the scheduler sees of a request.

    Attributes:
        computed: tokens whose keys and values are stored. Of a waiting request: those
            that were found in the cache.
        left: tokens to compute before the next one can be written.
        blocks: blocks that need not be taken. Of a waiting request: found ones that
            others are using.
        own: blocks that come back when it is sent away.
    """

    id: int
    computed: int
    left: int
    blocks: int = 0
    own: int = 0


@dataclass(frozen=True)
class Limits:
    """Of one step.

    Attributes:
        max_tokens: computed in one step, over all requests.
        max_sequences: that run at one time.
        block_size: tokens in a block.
        chunked: whether a prompt may be computed in parts.
    """

    max_tokens: int = 256
    max_sequences: int = 16
    block_size: int = 16
    chunked: bool = True

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_sequences", "block_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number from 1")


@dataclass
class Plan:
    """What one step does.

    Attributes:
        tokens: request → how many of its tokens are computed.
        admitted: requests that waited and now run, in this order.
        preempted: requests that ran and now wait, in the order of being sent away.
    """

    tokens: dict[int, int] = field(default_factory=dict)
    admitted: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)


def blocks_needed(job: Job, count: int, block_size: int) -> int:
    """Blocks to take before `count` more tokens of it can be stored."""
    return max(0, -(-(job.computed + count) // block_size) - job.blocks)


def give_running(
    running: Sequence[Job], available: int, limits: Limits
) -> tuple[Plan, int, int]:
    """Tokens for those that run, the oldest first.

    Returns:
        The plan so far, tokens left of the budget, and blocks that are still available.
    """
    plan = Plan()
    budget = limits.max_tokens
    running = list(running)
    place = 0
    while place < len(running) and budget > 0:
        job = running[place]
        count = min(job.left, budget)
        while blocks_needed(job, count, limits.block_size) > available:
            last = running.pop()
            plan.preempted.append(last.id)
            available += last.own
            if last is job:
                break
        if place == len(running):
            break  # it has sent itself away
        available -= blocks_needed(job, count, limits.block_size)
        plan.tokens[job.id] = count
        budget -= count
        place += 1
    return plan, budget, available


def schedule(
    running: Sequence[Job], waiting: Sequence[Job], available: int, limits: Limits
) -> Plan:
    """The plan of the next step.

    Args:
        running: in the order in which they were admitted.
        waiting: in the order in which they come next.
        available: blocks that nobody has.
    """
    plan, budget, available = give_running(running, available, limits)
    if plan.preempted:
        return plan  # who was sent away would come back at once
    room = limits.max_sequences - len(running)
    for job in waiting:
        count = min(job.left, budget)
        whole = count == job.left
        if room == 0 or count == 0 or not (whole or limits.chunked):
            break
        if blocks_needed(job, job.left, limits.block_size) > available:
            break  # nobody overtakes
        available -= blocks_needed(job, count, limits.block_size)
        plan.tokens[job.id] = count
        plan.admitted.append(job.id)
        budget -= count
        room -= 1
    return plan


def check_plan(
    plan: Plan,
    running: Sequence[Job],
    waiting: Sequence[Job],
    available: int,
    limits: Limits,
) -> None:
    """What holds of every plan that can be carried out, by whatever rule it was made.

    Raises:
        ValueError: it does not; the text says which request or limit.
    """
    runs, waits = ({job.id: job for job in jobs} for jobs in (running, waiting))
    admitted, preempted = list(plan.admitted), list(plan.preempted)
    for name, ids, known in (
        ("admitted", admitted, waits),
        ("preempted", preempted, runs),
    ):
        for id in ids:
            if id not in known:
                whose = "waiting" if name == "admitted" else "running"
                raise ValueError(f"{name} has request {id!r}, which is not {whose}")
            if ids.count(id) > 1:
                raise ValueError(f"{name} has request {id!r} twice")
    goes_on = {id: job for id, job in runs.items() if id not in preempted}
    goes_on |= {id: waits[id] for id in admitted}
    for id, count in plan.tokens.items():
        if id not in goes_on:
            raise ValueError(f"tokens has request {id!r}, which does not run then")
        if not isinstance(count, int) or not 1 <= count <= goes_on[id].left:
            raise ValueError(
                f"request {id} gets {count!r} tokens, and has {goes_on[id].left} left"
            )
        if id in waits and count < waits[id].left and not limits.chunked:
            raise ValueError(f"request {id} is cut, and chunked is False")
    for id in admitted:
        if id not in plan.tokens:
            raise ValueError(f"request {id} is admitted and gets no token")
    if sum(plan.tokens.values()) > limits.max_tokens:
        raise ValueError(
            f"{sum(plan.tokens.values())} tokens are planned, the limit is"
            f" {limits.max_tokens}"
        )
    if len(goes_on) > limits.max_sequences:
        raise ValueError(
            f"{len(goes_on)} requests run, the limit is {limits.max_sequences}"
        )
    there = available + sum(runs[id].own for id in preempted)
    needed = sum(
        blocks_needed(goes_on[id], count, limits.block_size)
        for id, count in plan.tokens.items()
    )
    if needed > there:
        raise ValueError(f"the plan takes {needed} blocks, and {there} are available")
