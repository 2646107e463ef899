# %% [markdown]
# # Solutions: AWQ
#
# Four functions, which together are AWQ on one linear: which channels are salient, how much they are scaled up, rounding with scales, and the search for the
# exponent. Symbols are those of the lesson: $W$ has shape (out, in), `X` holds the inputs, (tokens, in), and a channel $j$ is column $j$ of both.
# Stuck? `check.hint("keep_salient")` shows a hint, and the next one when it is called again.

# %%
import torch
from torch import Tensor

from llmlab.checks.compression.awq import check

# %% [markdown]
# ## Exercise 1: keep what is salient
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# `W_hat` is $W$ after rounding. Put back the columns of the `count` channels that have the largest *mean of $|x|$* over the tokens. All other columns stay rounded.


# %% tags=["exercise"]
def keep_salient(W: Tensor, W_hat: Tensor, X: Tensor, count: int) -> Tensor:
    """Ŵ (out, in), with `count` columns of W in it. W and W_hat stay as they are.

    Shapes: W and W_hat (out, in), X (tokens, in).
    """
    # BEGIN SOLUTION
    size = X.abs().mean(0)
    kept = size.topk(count).indices
    W_hat = W_hat.clone()
    W_hat[:, kept] = W[:, kept]
    return W_hat
    # END SOLUTION


# %% tags=["check"]
check.keep_salient(keep_salient)

# %% [markdown] tags=["solution"]
# An error of a weight reaches the output times its input. So the inputs say which weights matter, and the weights themselves say little about it. The
# largest $|x|$ would follow a single token; the mean is what a channel is like.

# %% [markdown]
# ## Exercise 2: the scale of each channel
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# $$s_j = \frac{\bar x_j^{\,\alpha}}{\sqrt{\max_i \bar x_i^{\,\alpha} \cdot \min_i \bar x_i^{\,\alpha}}} \qquad \bar x_j = \mathrm{mean}_t\, |x_{tj}|$$


# %% tags=["exercise"]
def channel_scale(X: Tensor, alpha: float) -> Tensor:
    """s (in,), float32, from the inputs X (tokens, in). No channel is always 0."""
    # BEGIN SOLUTION
    s = X.abs().mean(0) ** alpha
    return s / (s.max() * s.min()).sqrt()
    # END SOLUTION


# %% tags=["check"]
check.channel_scale(channel_scale)

# %% [markdown] tags=["solution"]
# With $\alpha = 0$ all scales are 1, and the rest is round to nearest. With $\alpha = 1$ the scaled weights are as large as their work in the output. The division puts
# the largest and the smallest scale at the same distance from 1. It changes no code, since every group's step grows with it; it keeps
# the scaled weights, and what is left of the norm, within the range of 16-bit floats.

# %% [markdown]
# ## Exercise 3: scale, round, scale back
# ●●●○○ difficulty · ●●●●● importance · 15 minutes · 3 points
#
# Multiply column $j$ of $W$ by $s_j$. Then each run of `group_size` neighbours in a row shares a step: its largest $|w s|$ divided by `top`. Round to
# whole steps, and divide column $j$ by $s_j$. So the result can be multiplied by inputs that nobody divided.


# %% tags=["exercise"]
def scale_and_round(W: Tensor, s: Tensor, group_size: int, top: int) -> Tensor:
    """Ŵ (out, in), float32. W itself stays as it is.

    Shapes: W (out, in), s (in,). No group is all zeros.
    """
    # BEGIN SOLUTION
    V = (W * s).unflatten(1, (-1, group_size))  # (out, groups, group_size)
    step = V.abs().amax(-1, keepdim=True) / top
    V = torch.round(V / step) * step
    return V.flatten(1) / s
    # END SOLUTION


# %% tags=["check"]
check.scale_and_round(scale_and_round)

# %% [markdown] tags=["solution"]
# The error of $w s$ is at most half a step, whatever $s$ is. Divided by $s$ it is at most half a step by $s$: that is all of the gain. The price is in the line
# of the step. When a scaled weight becomes the largest of its group, the step grows, and every neighbour pays.

# %% [markdown]
# ## Exercise 4: try the exponents
# ●●●●○ difficulty · ●●●●○ importance · 20 minutes · 4 points
#
# For each `alpha` in `alphas`: the scale of exercise 2, the $\hat W$ of exercise 3, and the *mean* squared error of the outputs, of $X \hat W^\top$ beside
# $X W^\top$. Return the errors in the order of `alphas`. The best exponent is then `alphas[errors.argmin()]`. Every trial begins with $W$ as it was given.


# %% tags=["exercise"]
def trial_errors(
    W: Tensor, X: Tensor, alphas: list[float], group_size: int, top: int
) -> Tensor:
    """Errors (len(alphas),), float32. W and X stay as they are.

    Shapes: W (out, in), X (tokens, in).
    """
    # BEGIN SOLUTION
    right = X @ W.T
    errors = []
    for alpha in alphas:
        W_hat = scale_and_round(W, channel_scale(X, alpha), group_size, top)
        errors.append((X @ W_hat.T - right).square().mean())
    return torch.stack(errors)
    # END SOLUTION


# %% tags=["check"]
check.trial_errors(trial_errors)

# %% [markdown] tags=["solution"]
# A search in a model writes each trial into its weights, and must put the old ones back before the next. If it forgets, the second trial rounds what is rounded
# already, and its error says nothing about its exponent. Here a trial has a name of its own, $\hat W$, and there is nothing to put back.
