# %% [markdown]
# # Solutions: SmoothQuant
#
# Four functions: the scale of each channel, its way into the model, the product of 8-bit codes, and the choice of $\alpha$. Symbols are those
# of the lesson: $X$ is (tokens, in), each $W$ is (out, in), and channel $j$ is column $j$ of both. No gradients are asked.
# Stuck? `check.hint("smoothing_scale")` shows a hint, and the next one when it is called again.

# %%
import torch
from torch import Tensor

from llmlab.checks.compression.smoothquant import check

# %% [markdown]
# ## Exercise 1: a scale for each channel
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# Several linears read the same $X$. Their common scale is
#
# $$s_j = \frac{\max |X_j|^{\alpha}}{\max |W_j|^{1 - \alpha}}$$
#
# where the second maximum is over **all** the weights. A channel that was always 0 in $X$, or whose column is 0 in all weights, gets $s_j = 1$.
# `alpha` is from 0 to 1, both ends included.


# %% tags=["exercise"]
def smoothing_scale(X: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """s (in,), float32. X: (tokens, in); weights: one or more, (out, in) each, with
    different numbers of rows. Nothing that comes in is changed.
    """
    # BEGIN SOLUTION
    x_max = X.abs().amax(dim=0)  # (in,)
    w_max = torch.cat(weights).abs().amax(dim=0)  # (in,)
    s = x_max.pow(alpha) / w_max.pow(1 - alpha)
    return torch.where((x_max > 0) & (w_max > 0), s, 1.0)
    # END SOLUTION


# %% tags=["check"]
check.smoothing_scale(smoothing_scale)

# %% [markdown] tags=["solution"]
# After it, channel $j$ has the maximum $(x w)^{1 - \alpha}$ in $\hat X$ and $(x w)^{\alpha}$ in $\hat W$, where $x$ and $w$ are those before. At $\alpha = 0.5$ both
# are $\sqrt{x w}$: the difficulty is shared. A dead channel would get 0 or ∞. A small number instead of 0, as 1e-5, is a trap: the channel may be alive in the
# next text, and is then multiplied by 100,000.

# %% [markdown]
# ## Exercise 2: into the norm, and into all that read it
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# An RMSNorm with the weight $\gamma$ makes $X$, and $q$, $k$ and $v$ read it. Put $s$ into them so that no output changes, and the channels that
# they pass on are those of $X \operatorname{diag}(s)^{-1}$. Under grouped-query attention $k$ and $v$ have fewer rows than $q$.


# %% tags=["exercise"]
def fold(
    gamma: Tensor, weights: list[Tensor], s: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """New gamma (in,) and new weights, in their order. gamma and s: (in,); weights:
    (out, in) each. Nothing that comes in is changed.
    """
    # BEGIN SOLUTION
    return gamma / s, [W * s for W in weights]
    # END SOLUTION


# %% tags=["check"]
check.fold(fold)

# %% [markdown] tags=["solution"]
# `W * s` multiplies columns: `s` lines up with the last dimension, which is the one that a linear sums over. All readers must get the same $s$, since
# there is only one $\gamma$ to undo it. Forget one, and its outputs are wrong without any error message.

# %% [markdown]
# ## Exercise 3: multiply integers
# ●●●○○ difficulty · ●●●●● importance · 20 minutes · 4 points
#
# $$Y_{to} = \Delta^x_t \, \Delta^w_o \sum_j Q^x_{tj} Q^w_{oj} \qquad Q = \operatorname{clamp}(\lfloor x / \Delta \rceil, -127, 127)$$
#
# Each row of $W$ has its own step: its largest $|w|$ over 127. The step of $X$ depends on the arguments:
#
# - `per="token"`: each row of $X$ has its own, its largest $|x|$ over 127.
# - `per="tensor"`, `step=None`: one for all of $X$, its largest $|x|$ over 127.
# - `per="tensor"` and a number: that is the step. What lies beyond is clamped.
#
# Multiply the codes as integers, in int32 or wider. Where all that share a step are 0, the result is 0.


# %% tags=["exercise"]
def w8a8(X: Tensor, W: Tensor, per: str, step: float | None) -> Tensor:
    """X Wᵀ of shape (tokens, out), float32, by 8-bit codes. X: (tokens, in); W: (out,
    in). Nothing that comes in is changed.
    """
    # BEGIN SOLUTION
    size = X.abs().amax(dim=1, keepdim=True)  # (tokens, 1)
    if per == "tensor":
        size = size.amax().reshape(1, 1)
    x_step = size / 127 if step is None else torch.full((1, 1), step)
    w_step = W.abs().amax(dim=1, keepdim=True) / 127  # (out, 1)
    codes = []
    for values, steps in ((X, x_step), (W, w_step)):
        divisor = torch.where(steps > 0, steps, 1.0)
        codes.append(torch.round(values / divisor).clamp(-127, 127).int())
    return (codes[0] @ codes[1].T) * x_step * w_step.T
    # END SOLUTION


# %% tags=["check"]
check.w8a8(w8a8)

# %% [markdown] tags=["solution"]
# Steps may belong to tokens and to outputs, since both are outside the sum over $j$. A step for each *channel* of $X$ would be inside it: that is why outliers
# in channels need another cure. A static step saves a pass over $X$ before each product, and clips what calibration has not seen.

# %% [markdown]
# ## Exercise 4: choose α
# ●●●○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# For each of `alphas`: take $s$ from `X` and `W` (exercise 1), smooth the held-out inputs and $W$, and multiply them in 8 bits (exercise 3, steps
# found in the smoothed inputs, `per` handed on). The error is
#
# $$\frac{\lVert Y - X' W^\top \rVert^2}{\lVert X' W^\top \rVert^2}$$
#
# where $X'$ are the held-out inputs and $X' W^\top$ is the product of floats. Return the alpha with the least error, and all errors.


# %% tags=["exercise"]
def search_alpha(
    X: Tensor, held_out: Tensor, W: Tensor, alphas: list[float], per: str
) -> tuple[float, Tensor]:
    """(alpha, errors): one of `alphas`, and float32 (len(alphas),). X: (tokens, in);
    held_out: (other tokens, in); W: (out, in). Nothing that comes in is changed.
    """
    # BEGIN SOLUTION
    right = held_out @ W.T
    errors = []
    for alpha in alphas:
        s = smoothing_scale(X, [W], alpha)
        y = w8a8(held_out / s, W * s, per, None)
        errors.append((y - right).square().sum() / right.square().sum())
    errors = torch.stack(errors)
    return alphas[int(errors.argmin())], errors
    # END SOLUTION


# %% tags=["check"]
check.search_alpha(search_alpha)

# %% [markdown] tags=["solution"]
# Held-out inputs judge, since $s$ was made from the largest values of `X`: on `X` itself every channel would be exactly as large as
# planned. An output error of one layer is cheap to compute and says nothing about the layers after it. For a whole model the last word is its loss.
