# %% [markdown]
# # Solutions: ZeroQuant
#
# Four functions: a scale for each token, a product of integers in groups of columns, a gradient that goes straight through rounding, and the distillation of
# one layer. Symbols are those of the lesson: $X$ has shape (tokens, in), $W$ has shape (out, in), codes of $b$ bits go from $-\text{top}$ to $\text{top}$ with
# $\text{top} = 2^{b-1} - 1$. Stuck? `check.hint("quantize_tokens")` shows a hint, and the next one when it is called again.

# %%
import torch
from torch import Tensor

from llmlab.checks.compression.zeroquant import check

# %% [markdown]
# ## Exercise 1: a scale for each token
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# Quantize $X$ *dynamically*: each token, a row of $X$, gets its scale from its own largest $|x|$, divided by $\text{top} = 2^{b-1} - 1$ for $b$ `bits`. The codes
# are $x$ over the scale, rounded to nearest. A token of zeros has the scale 1 and codes 0.


# %% tags=["exercise"]
def quantize_tokens(X: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (tokens, in), int8, and scales (tokens, 1), float32, of X (tokens, in).

    X itself stays as it is.
    """
    # BEGIN SOLUTION
    top = 2 ** (bits - 1) - 1
    largest = X.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / top, 1.0)
    return torch.round(X / scale).to(torch.int8), scale
    # END SOLUTION


# %% tags=["check"]
check.quantize_tokens(quantize_tokens)

# %% [markdown] tags=["solution"]
# No text was needed to find the scale: it is made while the token passes. That costs a look at each token, but no token can spoil the scale of another.
# Nothing is clipped, since each row is divided by its own largest value. Padding is a token of zeros: 0 / 0 would be NaN, and a NaN spreads through
# the whole row of a matrix product.

# %% [markdown]
# ## Exercise 2: a product of integers in groups
# ●●●○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# $W$ has a scale for each row *and* each group of neighbouring columns: `s_w` has shape (out, groups). Compute $X W^\top$ from the codes: within a group sum
# products of integers in int32, then bring in that group's scales; when all groups are added, bring in the scales of the tokens.


# %% tags=["exercise"]
def group_product(Q_x: Tensor, s_x: Tensor, Q_w: Tensor, s_w: Tensor) -> Tensor:
    """X Wᵀ (tokens, out), float32.

    Shapes: Q_x (tokens, in) and Q_w (out, in), int8; s_x (tokens, 1) and
        s_w (out, groups), float32. `groups` divides `in`.
    """
    # BEGIN SOLUTION
    groups = s_w.shape[1]
    size = Q_w.shape[1] // groups
    y = torch.zeros(len(Q_x), len(Q_w))
    for g in range(groups):
        columns = slice(g * size, (g + 1) * size)
        sums = Q_x[:, columns].int() @ Q_w[:, columns].int().T
        y += sums * s_w[:, g]
    return y * s_x
    # END SOLUTION


# %% tags=["check"]
check.group_product(group_product)

# %% [markdown] tags=["solution"]
# A scale comes out of a sum only if all terms have it. The scale of a token is in all terms of its row of the result, so it comes last, once. The scale of a group is not, and
# that is the price of groups: for each of them the integers must become floats. With one group per row both scales come in once, after a
# single product of integers. In int8 the products themselves would overflow.

# %% [markdown]
# ## Exercise 3: straight through
# ●●●○○ difficulty · ●●●●● importance · 15 minutes · 3 points
#
# Put $W$ on its levels: codes $\lfloor w / s \rceil$, clamped to $-\text{top} \dots \text{top}$, times the scale. The gradient is to pass as if nothing had happened, but not
# to weights that were clipped: those whose *rounded* code was beyond $\pm\text{top}$ before the clamp. `scale` has no gradient.


# %% tags=["exercise"]
def straight_through(W: Tensor, scale: Tensor, top: int) -> Tensor:
    """W (out, in) on its levels; `scale` is (out, 1). Backward: the identity, and 0
    where a weight was clipped.
    """
    # BEGIN SOLUTION
    codes = torch.round(W / scale).detach()
    inside = codes.abs() <= top
    levels = codes.clamp(-top, top) * scale
    through = W * inside
    return through + (levels - through).detach()
    # END SOLUTION


# %% tags=["check"]
check.straight_through(straight_through)

# %% [markdown] tags=["solution"]
# Rounding is flat between its steps: its true gradient is 0, and nothing would ever be learnt. The estimator says what the layer would like the level to be, and the
# float weight follows until it is nearer to another level. What is detached gives the value, what is not gives the gradient. A weight of $7.3$ steps rounds to 7, which
# is in range: it was rounded, not clipped.

# %% [markdown]
# ## Exercise 4: distil one layer
# ●●●●○ difficulty · ●●●●● importance · 20 minutes · 4 points
#
# `teacher(h)` is a layer with floats. `student(W, h)` is the same layer, which rounds the float weights $W$ and goes straight through. For each $h$ in
# `inputs`, from first to last: give both the same $h$, take the mean squared error over all numbers of the outputs, and make one step of plain gradient descent on
# $W$. Return $W$ after the last step, without a gradient. The teacher must neither change nor get gradients, and the given $W$ stays as it is.


# %% tags=["exercise"]
def distill_layer(
    W: Tensor, student, teacher, inputs: list[Tensor], learning_rate: float
) -> Tensor:
    """The float weights (out, in) after one step for each of `inputs`."""
    # BEGIN SOLUTION
    for h in inputs:
        with torch.no_grad():
            target = teacher(h)
        W = W.detach().requires_grad_()
        loss = (student(W, h) - target).square().mean()
        (gradient,) = torch.autograd.grad(loss, W)
        W = W - learning_rate * gradient
    return W.detach()
    # END SOLUTION


# %% tags=["check"]
check.distill_layer(distill_layer)

# %% [markdown] tags=["solution"]
# The target is a number like any other: no label, no loss of the whole model, no layer after this one. That is why any text will do, and why memory for gradients and
# moments is needed for one layer only. After this layer comes the next, with the $h$ that the layers before put out: the float ones, as in the paper's equation, or
# the finished students.
