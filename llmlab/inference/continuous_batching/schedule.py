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
that was admitted last loses its blocks and waits again.
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


def schedule(
    running: Sequence[Job], waiting: Sequence[Job], available: int, limits: Limits
) -> Plan:
    """The plan of the next step.

    Args:
        running: in the order in which they were admitted.
        waiting: in the order in which they come next.
        available: blocks that nobody has.
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
    if plan.preempted:
        return plan
    room = limits.max_sequences - len(running)
    for job in waiting:
        count = min(job.left, budget)
        whole = count == job.left
        if room == 0 or count == 0 or not (whole or limits.chunked):
            break
        needed = blocks_needed(job, count, limits.block_size)
        if needed > available:
            break  # nobody overtakes
        available -= needed
        plan.tokens[job.id] = count
        plan.admitted.append(job.id)
        budget -= count
        room -= 1
    return plan
