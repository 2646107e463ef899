# %% [markdown]
# # Solutions: Expert parallelism
#
# Four functions: a router, a place in the queue, the loss that keeps the queue short, and the journey to an expert and back. Stuck?
# `check.hint("route")` shows a hint, and the next one when it is called again.

# %%
import math
from collections.abc import Callable

import torch
from torch import Tensor

from llmlab.checks.parallelism.moe import check
from llmlab.parallelism import Communicator

# %% [markdown]
# ## Exercise 1: a router
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# From the router's logits, find each token's $k$ most probable experts and the weights of their outputs: probabilities over all
# experts, then divided so that the $k$ add up to 1. Whatever the dtype of the logits, do it in float32.


# %% tags=["exercise"]
def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(experts, weights), both of shape (T, k), the best expert first; logits (T,
    E).

    The router is trained: a gradient must reach the logits through the weights.
    """
    # BEGIN SOLUTION
    values, experts = logits.float().softmax(-1).topk(k, dim=-1)
    return experts, values / values.sum(-1, keepdim=True)
    # END SOLUTION


# %% tags=["check"]
check.route(route)

# %% [markdown] tags=["solution"]
# In bf16 two probabilities near 0.3 differ by at least 0.001 or not at all, so tokens would change experts by rounding, in one
# pass and not in its recomputation. Dividing by the sum is Mixtral's choice. With $k = 1$ (Switch) you must not: the weight would
# be the constant 1, and no gradient would reach the router.

# %% [markdown]
# ## Exercise 2: a place in the queue
# ●●●○○ difficulty · ●●●●○ importance · 20 minutes · 2 points
#
# Every expert has room for $C = \lceil T k / E \cdot \text{factor} \rceil$ assignments. Go through them token by token, and within a token
# from its first choice to its last. Who finds his expert full is dropped.


# %% tags=["exercise"]
def places(experts: Tensor, E: int, factor: float) -> Tensor:
    """True where an assignment is kept: a bool tensor of the shape of `experts`, (T,
    k), which holds numbers 0 … E − 1.
    """
    # BEGIN SOLUTION
    T, k = experts.shape
    C = math.ceil(T * k / E * factor)
    taken, kept = [0] * E, torch.zeros(T, k, dtype=torch.bool)
    for t in range(T):
        for i in range(k):
            e = int(experts[t, i])
            kept[t, i] = taken[e] < C
            taken[e] += 1
    return kept
    # END SOLUTION


# %% tags=["check"]
check.places(places)

# %% [markdown] tags=["solution"]
# The package does it without a loop: a one-hot table of the assignments, summed cumulatively, tells each how many came before
# it. Note who is dropped: tokens at the end of the batch, whatever they say. Megatron drops the smallest weights instead, and
# GShard serves all first choices first.

# %% [markdown]
# ## Exercise 3: the balance loss
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# $$L = E \sum_{e} f_e \bar P_e,$$
#
# where $f_e$ is the share of the $T k$ assignments that went to expert $e$, and $\bar P_e$ the mean probability of $e$ over the tokens.
# The gradient must flow through $\bar P$.


# %% tags=["exercise"]
def balance(probs: Tensor, experts: Tensor) -> Tensor:
    """A number. Shapes: probs (T, E), experts (T, k)."""
    # BEGIN SOLUTION
    (T, E), k = probs.shape, experts.shape[1]
    f = torch.bincount(experts.flatten(), minlength=E) / (T * k)
    return E * (f * probs.mean(0)).sum()
    # END SOLUTION


# %% tags=["check"]
check.balance(balance)

# %% [markdown] tags=["solution"]
# Counting has no gradient, so $f$ alone could teach nothing. Multiplied with it, each expert's probability is pushed down in proportion to how
# overloaded it is. The loss is 1 when all is even. It is not a bound on the imbalance: it knows the mean, not the worst batch.

# %% [markdown]
# ## Exercise 4 (challenge): to the expert and back
# ●●●●○ difficulty · ●●●●● importance · 35 minutes · 4 points
#
# Rank $r$ of $p$ has experts $rE/p \dots (r+1)E/p - 1$. It has some rows `x`, and for each of them the number of an expert. Send each row
# to its expert's rank, compute there, and bring the result back to its place. `experts_here(rows, numbers)` runs this rank's experts,
# on any number of rows in any order, zero included. The target: every row travels once each way, with one number. Forward only.


# %% tags=["exercise"]
def dispatch(
    comm: Communicator, x: Tensor, experts: Tensor, experts_here: Callable, E: int
) -> Tensor:
    """Each row of x through its expert: a tensor of the shape of x, (n, d).

    comm.all_to_all(xs): a list of p tensors, one for each rank → a list of p tensors,
    one from each rank. Their lengths may differ.
    """
    # BEGIN SOLUTION
    owner = experts // (E // comm.size)
    order = owner.argsort(stable=True)
    counts = torch.bincount(owner, minlength=comm.size).tolist()
    rows = comm.all_to_all(list(x[order].split(counts)))
    numbers = comm.all_to_all(list(experts[order].split(counts)))
    done = experts_here(torch.cat(rows), torch.cat(numbers))
    back = comm.all_to_all(list(done.split([len(r) for r in rows])))
    out = torch.empty_like(x)
    out[order] = torch.cat(back)
    return out
    # END SOLUTION


# %% tags=["check"]
check.dispatch(dispatch)

# %% [markdown] tags=["solution"]
# Three all-to-alls. The package sends counts per expert instead of a number per row, which is shorter, and sorts what came by
# expert, so that each expert is one matrix product. Nothing tells the sender which expert a row went to when it comes home: order
# does. And no rank knows beforehand how many rows will come. On a GPU that costs a wait for the host, which is
# why some systems prefer to send a fixed number, padded with zeros.
