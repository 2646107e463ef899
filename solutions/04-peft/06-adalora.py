# %% [markdown]
# # Solutions: AdaLoRA
#
# Four functions: the layer with its triplets, the importance of a number, the budget, and the mask that spends it.
# Symbols are those of the lesson: $W$ is $(d, k)$, $P$ is $(d, r)$, $\lambda$ is $(r, 1)$, $Q$ is $(r, k)$.
# Stuck? `check.hint("svd_forward")` shows a hint, and the next one when it is called again.

# %%
import torch
from torch import Tensor

from llmlab.checks.peft.adalora import check

# %% [markdown]
# ## Exercise 1: the layer
# ●○○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# Write the forward pass of a linear layer with triplets beside it:
#
# $$h = W x + \frac{\alpha}{r_0}\, P \Lambda Q\, x, \qquad \Lambda = \mathrm{diag}(\lambda)$$
#
# $r_0$ is the rank that the layer *started* with. Triplets may have been dropped since, so take it from the argument, not
# from a shape. Do not build the $d \times k$ matrix.


# %% tags=["exercise"]
def svd_forward(
    x: Tensor, W: Tensor, P: Tensor, lam: Tensor, Q: Tensor, alpha: float, r0: int
) -> Tensor:
    """W x + (alpha / r0) P Λ Q x.

    Shapes: x (..., k), W (d, k), P (d, r), lam (r, 1), Q (r, k). Returns (..., d).
    Training goes through it: a gradient must reach x, P, lam and Q.
    """
    # BEGIN SOLUTION
    return x @ W.T + x @ (lam * Q * (alpha / r0)).T @ P.T
    # END SOLUTION


# %% tags=["check"]
check.svd_forward(svd_forward)

# %% [markdown] tags=["solution"]
# $\Lambda Q$ multiplies row $i$ of $Q$ by $\lambda_i$, which is what `lam * Q` does when `lam` is a column. The scale keeps
# $r_0$ for life: a layer that goes from 12 triplets to 3 must not see its remaining three grow fourfold at that moment.

# %% [markdown]
# ## Exercise 2: importance
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# How much would the loss change if a number $w$ were zero? To first order, by its *sensitivity* $I = |w \cdot \partial E / \partial w|$. One
# batch is noisy, so keep two running averages of it:
#
# $$\bar I \leftarrow \beta_1 \bar I + (1 - \beta_1)\, I \qquad\quad \bar U \leftarrow \beta_2 \bar U + (1 - \beta_2)\, |I - \bar I|$$
#
# The second line uses the *new* $\bar I$. Return both as new tensors; leave the old ones as they are.


# %% tags=["exercise"]
def importance(
    smooth: Tensor, unsure: Tensor, w: Tensor, grad: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """One step of Ī and Ū. All tensors have the shape of w. Returns Ī, then Ū."""
    # BEGIN SOLUTION
    now = (w * grad).abs()
    smooth = beta1 * smooth + (1 - beta1) * now
    unsure = beta2 * unsure + (1 - beta2) * (now - smooth).abs()
    return smooth, unsure
    # END SOLUTION


# %% tags=["check"]
check.importance(importance)

# %% [markdown] tags=["solution"]
# The score is the product $\bar I \cdot \bar U$: a number counts when it matters on average *and* when we are not yet sure how
# much, so that a triplet with a lively gradient gets time to show what it is worth. Both need the gradient, which is gone
# after `optimizer.zero_grad()`. That order is the commonest way to break AdaLoRA without an error message.

# %% [markdown]
# ## Exercise 3: the budget
# ●●○○○ difficulty · ●●●○○ importance · 10 minutes · 2 points
#
# How many triplets may the whole model have at step $t$ of $T$? All $b_0$ up to and including step $t_i$; $b_T$ after step $T - t_f$; between them
#
# $$b(t) = b_T + (b_0 - b_T)\left(1 - \frac{t - t_i}{T - t_i - t_f}\right)^3$$
#
# rounded down to an integer.


# %% tags=["exercise"]
def budget(t: int, b0: int, bT: int, T: int, ti: int, tf: int) -> int:
    """The number of triplets allowed at step t."""
    # BEGIN SOLUTION
    if t <= ti:
        return b0
    if t > T - tf:
        return bT
    return int(bT + (b0 - bT) * (1 - (t - ti) / (T - ti - tf)) ** 3)
    # END SOLUTION


# %% tags=["check"]
check.budget(budget)

# %% [markdown] tags=["solution"]
# A cube falls fast at first, while many triplets have never mattered, and slowly at the end, when each cut hurts. At half of
# the time seven eighths of the way is behind. The last $t_f$ steps train what is left with the ranks fixed.

# %% [markdown]
# ## Exercise 4: spend it
# ●●●○○ difficulty · ●●●●● importance · 15 minutes · 3 points
#
# You have the $\lambda$ of every layer and a score for each triplet. Keep the $b$ best triplets *of the whole model* and set the
# $\lambda$ of all others to zero. Layers may have different ranks, and a layer may lose all or none. If $b$ is no less than the number of
# triplets, nothing changes. Return new tensors. No two scores are equal.


# %% tags=["exercise"]
def allocate(lam: list[Tensor], scores: list[Tensor], b: int) -> list[Tensor]:
    """λ of each layer with all but the b best triplets of the model at zero.

    Shapes: lam[i] (r_i, 1), scores[i] (r_i,). Returns a list like lam.
    """
    # BEGIN SOLUTION
    every = torch.cat(scores)
    if b >= len(every):
        return [values.clone() for values in lam]
    threshold = every.sort(descending=True).values[b]  # the best of those that go
    return [
        values * (s > threshold)[:, None] for values, s in zip(lam, scores, strict=True)
    ]
    # END SOLUTION


# %% tags=["check"]
check.allocate(allocate)

# %% [markdown] tags=["solution"]
# One threshold for the whole model is all that "adaptive budget" means: a layer whose triplets score well keeps more of them. Only
# $\lambda$ goes to zero. $P$ and $Q$ stay, so $\partial E/\partial \lambda_i = p_i^\top (\partial E / \partial W)\, q_i$ is not zero, the next update
# moves $\lambda_i$ again, and at the next allocation the triplet may win its place back. With $P$ or $Q$ at zero it could not.
# Mind the case where nothing is to go: `kthvalue(0)` raises, which is how `peft` 0.21 fails when `target_r` equals `init_r`.
