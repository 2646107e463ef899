# %% [markdown]
# # Solutions: Choosing a plan
#
# What a step is worth, what a device must hold, how many microbatches a pipeline needs, and the challenge of this part: a
# plan within a memory limit and under a step time.
# Stuck? `check.hint("mfu")` shows a hint, and the next one when it is called again.

# %%
from llmlab.checks.parallelism.choosing import check
from llmlab.parallelism.choosing import Job, Plan, planner

# %% [markdown]
# ## Exercise 1: model FLOPs utilisation
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# A training run is seen to process `rate` tokens per second on `devices` chips whose peak is `peak` FLOP/s each. The model has
# `parameters` parameters in `layers` layers of `heads` heads of size `head_dim`, and reads sequences of `seq` tokens. A
# token of a trained model needs $6N$ FLOPs in its matrices, and attention adds $12\,L H D\,T$ (forward and backward). What share
# of the peak is useful arithmetic? FLOPs that are spent on recomputation are not useful.


# %% tags=["exercise"]
def mfu(
    parameters: float,
    layers: int,
    heads: int,
    head_dim: int,
    seq: int,
    rate: float,
    devices: int,
    peak: float,
) -> float:
    """Model FLOPs utilisation, between 0 and 1."""
    # BEGIN SOLUTION
    token = 6 * parameters + 12 * layers * heads * head_dim * seq
    return rate * token / (devices * peak)
    # END SOLUTION


# %% tags=["check"]
check.mfu(mfu)

# %% [markdown] tags=["solution"]
# The number needs nothing but a throughput, so it compares runs whose plans, engines and chips differ. It leaves out on
# purpose what the chips did besides: a run that recomputes everything does a third more arithmetic and has the same MFU if it
# is as fast. (The share of the peak with recomputation counted is called HFU.)

# %% [markdown]
# ## Exercise 2: what a device holds
# ●●○○○ difficulty · ●●●●● importance · 15 minutes · 2 points
#
# A model of `parameters` parameters is cut evenly over `tp` · `pp` devices, and that is repeated `dp` times. Mixed precision
# takes 2 bytes per parameter for the weights, 2 for the gradients and 12 for the optimizer. ZeRO cuts over the `dp` copies: stage 1 the
# optimizer, stage 2 the gradients too, stage 3 the weights too; stage 0 cuts nothing. How many bytes does a device hold?


# %% tags=["exercise"]
def state_bytes(parameters: float, dp: int, tp: int, pp: int, zero: int) -> float:
    """Bytes of weights, gradients and optimizer on each device."""
    # BEGIN SOLUTION
    held = parameters / (tp * pp)
    # bytes of weights, gradients, optimizer, and the first stage that cuts them
    kinds = ((2, 3), (2, 2), (12, 1))
    return sum(each * held / (dp if zero >= stage else 1) for each, stage in kinds)
    # END SOLUTION


# %% tags=["check"]
check.state_bytes(state_bytes)

# %% [markdown] tags=["solution"]
# Tensor and pipeline parallelism cut all sixteen bytes; data parallelism cuts none by itself, and ZeRO lends it that ability, one
# kind after another. With ZeRO-3 the bytes depend on the number of devices only: dp, tp and pp are then chosen by what they
# send and how they wait.

# %% [markdown]
# ## Exercise 3: enough microbatches
# ●●●○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# With $p$ stages of $v$ chunks and $m$ microbatches, a step takes $m + (p-1)/v$ units of time, of which $m$ are work: the *bubble* is
# the waiting, as a share of the whole step. Return the smallest $m$ for which the bubble is at most `limit`. An interleaved
# schedule ($v > 1$) takes microbatches in multiples of $p$.


# %% tags=["exercise"]
def microbatches_needed(p: int, v: int, limit: float) -> int:
    """The smallest number of microbatches with a bubble of at most `limit` (between 0
    and 1) of the step.
    """
    # BEGIN SOLUTION
    step = p if v > 1 else 1
    m = step
    while (p - 1) / v > limit * (m + (p - 1) / v):
        m += step
    return m
    # END SOLUTION


# %% tags=["check"]
check.microbatches_needed(microbatches_needed)

# %% [markdown] tags=["solution"]
# Solved for $m$ the condition is $m \ge \frac{p-1}{v}\cdot\frac{1-\ell}{\ell}$: a bubble of 10% needs nine times as many
# microbatches as $(p-1)/v$. Interleaving divides the demand by $v$, which is the whole reason for it. And the batch sets the
# ceiling: $m = B/(dp \cdot b)$, so each doubling of dp halves the microbatches that the pipeline needs.

# %% [markdown]
# ## Exercise 4: the challenge of this part
# ●●●●○ difficulty · ●●●●● importance · 40 minutes · 5 points
#
# Choose a plan. You are given a job (`job.shape`, `job.batch`, `job.seq`, `job.machine`) and a number of devices; return a `Plan`
# that uses all of them, fits into `job.machine.memory`, and takes **at most 8% longer than the best plan there is**. The check simulates
# your plan with the course's cost model, on jobs that you have not seen: another machine, another network, grouped heads, long
# sequences.
#
# You may ask `planner.estimate(job, plan)` for at most **400** plans of a job (it tells `problems`, `step`, `bytes`), but not call
# `planner.search` or `planner.candidates`: decide yourself what is worth a try. `planner.divisors(n, most)` helps. A plan with
# `sequence=True` needs `tp > 1`; ZeRO-3 needs `pp = 1`.


# %% tags=["exercise"]
def choose(job: Job, devices: int) -> Plan:
    """A plan for all `devices` that fits and is nearly as fast as the fastest."""
    # BEGIN SOLUTION
    x, best = job.shape, None
    # in the order of their time
    recompute = (
        ("none", "full") if x.family == "llama" else ("none", "selective", "full")
    )
    # never over the network
    for tp in planner.divisors(devices, min(job.machine.node, x.kv_heads)):
        for pp in planner.divisors(devices // tp, min(16, x.layers)):
            for cp in (1, 2, 4, 8) if job.seq > 16_384 else (1,):
                dp = devices // (tp * pp * cp)
                if devices % (tp * pp * cp) or x.layers % pp or job.batch % max(1, dp):
                    continue
                chunks = (
                    [v for v in (4, 2, 1) if x.layers % (pp * v) == 0]
                    if pp > 1
                    else [1]
                )
                ways = [
                    (r, z, v)
                    for r in recompute
                    for z in ((1,) if pp > 1 else (1, 3))
                    for v in chunks
                ]
                for r, z, v in ways:
                    plan = Plan(
                        dp,
                        tp,
                        pp,
                        cp,
                        microbatch=1,
                        zero=z,
                        sequence=tp > 1,
                        recompute=r,
                        chunks=v,
                    )
                    e = planner.estimate(job, plan)
                    # the first that fits is the fastest of this split
                    if not e.problems:
                        best = e if best is None or e.step < best.step else best
                        break
    return best.plan
    # END SOLUTION


# %% tags=["check"]
check.choose(choose)

# %% [markdown] tags=["solution"]
# Three facts of this part do the pruning. Tensor parallelism does not leave the node, so tp has at most four values. A microbatch of 1
# is nearly always right: it takes the least memory and gives the pipeline the most microbatches. And the ways to save memory have an order
# in time, so for each split only the first that fits is worth keeping. What is left is a few dozen plans, where the exhaustive search
# looks at thousands.
