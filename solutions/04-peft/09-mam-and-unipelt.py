# %% [markdown]
# # Solutions: MAM and UniPELT
#
# Three functions: an adapter beside the MLP, how much of a query's attention a prefix takes, and a prefix behind a gate.
# Symbols are those of the lesson. Stuck? `check.hint("parallel")` shows a hint, and the next one when it is called again.

# %%
from collections.abc import Callable

import torch
from torch import Tensor

from llmlab.checks.peft.mam_and_unipelt import check

# %% [markdown]
# ## Exercise 1: beside, not after
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# Give the output of an MLP that has a scaled parallel adapter beside it. Biases are left out:
#
# $$\mathrm{MLP}(x) + s \cdot W_{up}\, \mathrm{relu}(W_{down}\, x)$$


# %% tags=["exercise"]
def parallel(
    x: Tensor, mlp: Callable[[Tensor], Tensor], down: Tensor, up: Tensor, s: float
) -> Tensor:
    """The MLP's output plus the adapter's.

    Shapes: x (..., d), down (m, d), up (d, m). Returns (..., d).
    Training goes through it: a gradient must reach x, down and up.
    """
    # BEGIN SOLUTION
    return mlp(x) + s * (torch.relu(x @ down.T) @ up.T)
    # END SOLUTION


# %% tags=["check"]
check.parallel(parallel)

# %% [markdown] tags=["solution"]
# The MLP is itself $W_{2} f(W_{1} x)$, so a parallel adapter only makes it wider: $m$ more hidden channels, and those are
# trained. A sequential adapter must work with what the MLP left.

# %% [markdown]
# ## Exercise 2: what a prefix takes
# ●●●○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# Attention over $[P_K; K]$ is the same as two attentions, mixed:
#
# $$(1-\lambda)\,\mathrm{Attn}(q, K, V) + \lambda\,\mathrm{Attn}(q, P_K, P_V)$$
#
# Find $\lambda$ for each query: the sum of the softmax weights on the prefix, in one softmax over both. Scores are divided by
# $\sqrt D$. They may be several hundred for one query and small for another.


# %% tags=["exercise"]
def prefix_share(q: Tensor, P: Tensor, K: Tensor) -> Tensor:
    """λ of each query.

    Shapes: q (n, D), P (p, D), K (S, D). Returns (n,).
    """
    # BEGIN SOLUTION
    scores = q @ torch.cat([P, K]).T / q.shape[-1] ** 0.5  # (n, p + S)
    return torch.softmax(scores, dim=-1)[:, : len(P)].sum(-1)
    # END SOLUTION


# %% tags=["check"]
check.prefix_share(prefix_share)

# %% [markdown] tags=["solution"]
# This is how He et al. read prefix tuning as an adapter: $\mathrm{Attn}(q, P_K, P_V)$ is a small network of width $p$ whose
# activation is a softmax, beside attention, with a gate $\lambda$ that the query opens. But whatever $\lambda$ the prefix takes is
# taken from the text, even if $P_V = 0$.

# %% [markdown]
# ## Exercise 3: a gated prefix
# ●●●○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# UniPELT scales a prefix's keys and values by a gate, one number per row: the mean of $\sigma(w \cdot x_t + b)$ over the real
# tokens of the row. `mask` is 1 for a token and 0 for padding, on either side.


# %% tags=["exercise"]
def gated_prefix(
    x: Tensor, w: Tensor, b: Tensor, mask: Tensor, P_K: Tensor, P_V: Tensor
) -> tuple[Tensor, Tensor]:
    """The gated keys and values of each row.

    Shapes: x (n, seq, d), w (d,), b (), mask (n, seq) of float32, P_K and P_V (heads,
        p, D). Returns two of (n, heads, p, D).
    Training goes through it: a gradient must reach x, w, b, P_K and P_V.
    """
    # BEGIN SOLUTION
    g = torch.sigmoid(x @ w + b) * mask  # (n, seq)
    g = (g.sum(1) / mask.sum(1))[:, None, None, None]  # (n, 1, 1, 1)
    return g * P_K, g * P_V
    # END SOLUTION


# %% tags=["check"]
check.gated_prefix(gated_prefix)

# %% [markdown] tags=["solution"]
# A shut gate does not remove the prefix: keys of 0 score 0 and still take their share of the softmax, now with nothing to say.
# To be rid of it one would have to mask it.
