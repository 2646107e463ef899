# %% [markdown]
# # Solutions: Continuous batching
#
# The scheduler of a serving engine, in three steps; and what users wait for. (A scheduler that wins a trace is the challenge of this part, in the lesson on engines.) A request is seen as a `Job`:
#
# | field | holds |
# |---|---|
# | `id` | its number |
# | `computed` | tokens whose keys and values are stored |
# | `left` | tokens to compute before the next one can be written: 1 when decoding, the rest of its text in prefill |
# | `blocks` | blocks that it has and need not be taken any more |
# | `own` | of these, those that come back if it is sent away (others may share the rest) |
#
# `Limits` has `max_tokens` and `max_sequences` of a step, `block_size`, and `chunked`. A `Plan` has `tokens` (a dict: id → how many), `admitted` and `preempted` (lists of ids).
# Stuck? `check.hint("schedule")` shows a hint, and the next one when it is called again.

# %%
from collections.abc import Sequence
from itertools import pairwise

from llmlab.checks.inference.continuous_batching import check
from llmlab.inference.continuous_batching import Job, Limits, Plan

# %% [markdown]
# ## Exercise 1: blocks
# ●○○○○ difficulty · ●●●●○ importance · 5 minutes · 1 point
#
# `count` more tokens of a request are to be stored, behind the `job.computed` that are. How many blocks must be taken for it? It has `job.blocks`, which may be more than it needs. Never less than 0.


# %% tags=["exercise"]
def blocks_needed(job: Job, count: int, block_size: int) -> int:
    """Blocks to take before `count` more tokens of it can be stored."""
    # BEGIN SOLUTION
    return max(0, -(-(job.computed + count) // block_size) - job.blocks)
    # END SOLUTION


# %% tags=["check"]
check.blocks_needed(blocks_needed)

# %% [markdown] tags=["solution"]
# Stored and new tokens are rounded up together: new ones first fill the last block, which has room in $b - 1$ of $b$ cases. So most decoding steps take no block at all.

# %% [markdown]
# ## Exercise 2: those that run
# ●●●●○ difficulty · ●●●●● importance · 25 minutes · 4 points
#
# `running` is in the order in which requests were admitted. Go through it from its front, as long as there is budget (at first `limits.max_tokens`):
#
# 1. A request gets as many of its tokens that are left as the budget allows.
# 2. While the blocks that it needs for them are more than `available`: the *last* of all that still run is sent away. It is noted in `preempted`, in the order of going, and its `own` blocks are available.
# 3. If that is the request itself, there is nobody behind it: stop. Otherwise its blocks and its tokens are taken off, and the next one's turn comes.
#
# Return the plan (its `admitted` is empty), the tokens left of the budget, and the blocks that are still available. The list that you are given stays as it is.


# %% tags=["exercise"]
def give_running(
    running: Sequence[Job], available: int, limits: Limits
) -> tuple[Plan, int, int]:
    """(plan, tokens left of the budget, blocks available)."""
    # BEGIN SOLUTION
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
                return plan, budget, available
        available -= blocks_needed(job, count, limits.block_size)
        plan.tokens[job.id] = count
        budget -= count
        place += 1
    return plan, budget, available
    # END SOLUTION


# %% tags=["check"]
check.give_running(give_running)

# %% [markdown] tags=["solution"]
# No line says "decoding" or "prefill": a request that decodes has one token left, and one in the middle of its prompt has many. Who came first is never sent away for somebody who came later, so it comes to its end, and then the next one is first:
# nobody starves. The last is sent away, for it has the least to lose.

# %% [markdown]
# ## Exercise 3: the whole plan
# ●●●●○ difficulty · ●●●●● importance · 25 minutes · 4 points
#
# First those that run. If somebody was sent away, that is the plan. Otherwise, `waiting` in its order. The next one comes in with as many of its tokens that are left as the budget allows, unless
#
# 1. with it more than `max_sequences` would run, or there is no budget left;
# 2. it would be cut, and `limits.chunked` is False;
# 3. there are not enough blocks for *all* that is left of its text.
#
# At the first that cannot come in, stop: nobody overtakes. Who comes in takes the blocks for the tokens of this step only, and is noted in `tokens` and in `admitted`.


# %% tags=["exercise"]
def schedule(
    running: Sequence[Job], waiting: Sequence[Job], available: int, limits: Limits
) -> Plan:
    """What the next step computes."""
    # BEGIN SOLUTION
    plan, budget, available = give_running(running, available, limits)
    if plan.preempted:
        return plan
    room = limits.max_sequences - len(running)
    for job in waiting:
        count = min(job.left, budget)
        if room == 0 or count == 0:
            break
        if count < job.left and not limits.chunked:
            break
        if blocks_needed(job, job.left, limits.block_size) > available:
            break
        available -= blocks_needed(job, count, limits.block_size)
        plan.tokens[job.id] = count
        plan.admitted.append(job.id)
        budget -= count
        room -= 1
    return plan
    # END SOLUTION


# %% tags=["check"]
check.schedule(schedule)

# %% [markdown] tags=["solution"]
# Whoever was sent away stands at the front of `waiting` in the next step. If others came in while somebody is sent away, both would change places in every step. Point 3 has the same reason: two long prompts that begin with a small part each soon stand in each other's
# way, and one of them has computed for nothing. It is a promise that is not kept for ever, as nothing is set aside; but it is right at the moment of coming in.

# %% [markdown]
# ## Exercise 4: what users wait for
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# `arrivals` has one time for each request, and `times` a list for each: when its tokens were written. Return two lists of numbers, in the order of the requests: the times to the first token (TTFT), counted from the request's arrival, and the times between one token
# and the next of the same request (ITL), of all requests one after the other. A request with one token has no ITL.


# %% tags=["exercise"]
def latencies(
    arrivals: Sequence[float], times: Sequence[Sequence[float]]
) -> tuple[list[float], list[float]]:
    """(TTFT, ITL) in seconds."""
    # BEGIN SOLUTION
    ttft, itl = [], []
    for arrival, written in zip(arrivals, times, strict=True):
        ttft.append(written[0] - arrival)
        for before, after in pairwise(written):
            itl.append(after - before)
    return ttft, itl
    # END SOLUTION


# %% tags=["check"]
check.latencies(latencies)

# %% [markdown] tags=["solution"]
# The arrival counts, not the moment at which somebody begins to work on it: a user waits in the queue, too. And all gaps, not one mean for each request: a text that stops once for two seconds has a good mean and a reader who looks away.
