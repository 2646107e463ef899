# %% [markdown]
# # Solutions: Adapters
#
# Three functions: the adapter, the attention over several of them, and what it saves to drop the lowest. Symbols are those of
# the lesson: $d$ is the model's width, $m$ that of the bottleneck, $N$ the number of adapters.
# Stuck? `check.hint("adapter")` shows a hint, and the next one when it is called again.

# %%
import torch
from torch import Tensor

from llmlab.checks.peft.adapters import check

# %% [markdown]
# ## Exercise 1: the adapter
# ●○○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# Write a bottleneck adapter with its residual connection:
#
# $$h + W_{up}\, \mathrm{relu}(W_{down}\, h + b_{down}) + b_{up}$$
#
# Here $h$ has any number of dimensions, the last of size $d$; a weight is stored as (out, in).


# %% tags=["exercise"]
def adapter(
    h: Tensor, down: Tensor, b_down: Tensor, up: Tensor, b_up: Tensor
) -> Tensor:
    """h plus what the adapter makes of it.

    Shapes: h (..., d), down (m, d), b_down (m,), up (d, m), b_up (d,). Returns (...,
        d).
    Training goes through it: a gradient must reach all five.
    """
    # BEGIN SOLUTION
    middle = torch.relu(h @ down.T + b_down)  # (..., m)
    return h + middle @ up.T + b_up
    # END SOLUTION


# %% tags=["check"]
check.adapter(adapter)

# %% [markdown] tags=["solution"]
# Two linear maps and one activation: the activation is all that tells it from LoRA's $BA$, and it is what
# forbids merging. $W_0 h + \mathrm{relu}(\ldots)$ is no matrix, so the adapter stays in the way for as long as it is used. With
# $W_{up} = 0$ the block is the pretrained one; a random start of size 0.01 is near enough.

# %% [markdown]
# ## Exercise 2: fuse
# ●●●○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# $N$ adapters have read the same $x$ and would add $z_1, \ldots, z_N$. Give what AdapterFusion adds instead:
#
# $$\sum_i s_i\, V z_i, \qquad s = \mathrm{softmax}_i\big((Qx) \cdot (K z_i)\big)$$
#
# The scores are not divided by $\sqrt d$. Biases are left out.


# %% tags=["exercise"]
def fuse(x: Tensor, z: Tensor, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    """The weighted mean of V z_i, with weights by token.

    Shapes: x (..., d), z (..., N, d), Q, K and V (d, d). Returns (..., d).
    Training goes through it: a gradient must reach all five.
    """
    # BEGIN SOLUTION
    query, keys = x @ Q.T, z @ K.T  # (..., d) and (..., N, d)
    s = torch.softmax((query[..., None, :] * keys).sum(-1), dim=-1)  # (..., N)
    return (s[..., None] * (z @ V.T)).sum(-2)
    # END SOLUTION


# %% tags=["check"]
check.fuse(fuse)

# %% [markdown] tags=["solution"]
# It is attention with a "sequence" of adapters instead of tokens. Key and value come from what each adapter says, not from
# its name, so the weights change from token to token. $V$ starts as the identity: the first output is a mean of
# what trained adapters say, not noise.

# %% [markdown]
# ## Exercise 3: what dropping saves
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# A text goes through a model of `layers` layers for several tasks, each with its own adapters. A layer without an adapter costs
# 1, one with an adapter costs 1 + `adapter`. With the adapters of the lowest `n` layers dropped, these layers give every task
# the same result and run once. How many times less does that cost than to run every task alone with all adapters?


# %% tags=["exercise"]
def speedup(layers: int, tasks: int, n: int, adapter: float) -> float:
    """Cost of all tasks one by one, over their cost with the lowest n layers shared."""
    # BEGIN SOLUTION
    each = 1 + adapter
    alone = tasks * layers * each
    shared = n + tasks * (layers - n) * each
    return alone / shared
    # END SOLUTION


# %% tags=["check"]
check.speedup(speedup)

# %% [markdown] tags=["solution"]
# With one task nothing is shared and only the adapters' own few percent are saved. With many tasks the bound is
# `layers / (layers - n)`: the dropped layers are as good as free.
