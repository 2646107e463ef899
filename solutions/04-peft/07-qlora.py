# %% [markdown]
# # Solutions: QLoRA
#
# Four functions: the sixteen levels of NF4, the rounding of weights to levels, the rounding of the scales themselves, and the
# way back through a weight that exists only in 4 bits. No library call does the work.
# Stuck? `check.hint("normal_float")` shows a hint, and the next one when it is called again.

# %%
import torch
from torch import Tensor

from llmlab.checks.peft.qlora import check

# %% [markdown]
# ## Exercise 1: the levels
# ●●●○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# Derive NF$k$ from the quantile function $\Phi^{-1}$ of the normal distribution (`torch.special.ndtri`). For $k = 4$ there are
#
# - 8 positive levels: $\Phi^{-1}(p)$ for 9 evenly spaced $p$ from `offset` down to ½, the last one (½) left out;
# - 7 negative levels: $-\Phi^{-1}(p)$ for 8 evenly spaced $p$ from `offset` down to ½, the last one left out;
# - an exact zero.
#
# Divide all by the largest and return them in order. For other $k$ there are $2^{k-1}$ positive levels and $2^{k-1} - 1$ negative ones.


# %% tags=["exercise"]
def normal_float(bits: int, offset: float) -> Tensor:
    """The 2^bits levels of NF`bits`, sorted, the largest 1, in float32."""
    # BEGIN SOLUTION
    half = 2 ** (bits - 1)
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, half + 1)[:-1])
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, half)[:-1])
    levels = torch.cat([negative, torch.zeros(1), positive]).sort().values
    return levels / levels.max()
    # END SOLUTION


# %% tags=["check"]
check.normal_float(normal_float)

# %% [markdown] tags=["solution"]
# Each side steps evenly in *probability*, so levels lie close where weights are many. A symmetric set of 16 quantiles would
# have no zero, and a zero must stay a zero (padding, dead units); so one side gets 8 levels and the other 7. The offset 0.9677083 is midway between
# $1 - 1/32$ and $1 - 1/30$, the middle of the outermost bin on either side; $\Phi^{-1}(1)$ itself is infinite.

# %% [markdown]
# ## Exercise 2: round the weights
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# Cut the weights into blocks of `block`, row after row. The scale of a block is its largest $|w|$. Divide by it and find, for each
# weight, the number of the *nearest* level. The levels are not evenly spaced, so `round` will not do. A block of zeros
# must not give NaN: its scale is 0, and its weights get the level 0.


# %% tags=["exercise"]
def quantize(w: Tensor, levels: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of w, whose number of elements is a multiple of `block`.

    Shapes: w any, levels (L,). Returns codes (blocks, block) in int64, then scales
        (blocks,).
    """
    # BEGIN SOLUTION
    blocks = w.reshape(-1, block)
    scales = blocks.abs().amax(1)
    scaled = blocks / scales.clamp(min=1e-38)[:, None]
    codes = (scaled[:, :, None] - levels).abs().argmin(-1)
    return codes, scales
    # END SOLUTION


# %% tags=["check"]
check.quantize(quantize)

# %% [markdown] tags=["solution"]
# The largest weight of each block becomes exactly ±1 and is stored without an error (−1 and 1 are both levels). Comparing with all 16 levels takes 16
# times the memory; `torch.bucketize` on the midpoints between levels finds the same codes with a binary search, which is what `llmlab.peft.qlora.nf4` does.

# %% [markdown]
# ## Exercise 3: round the scales
# ●●●○○ difficulty · ●●●○○ importance · 10 minutes · 2 points
#
# One float32 scale for 64 weights is half a bit per weight. Store the scales in 8 bits: subtract their mean, cut what is left into blocks of `block`
# (the last may be shorter), divide each block by its largest absolute value $c_2$, and take the nearest of the 256 `levels`.
# Return what `levels[codes]`, $c_2$ and the mean give back: the scales as they will be used.


# %% tags=["exercise"]
def double_quantize(c: Tensor, levels: Tensor, block: int) -> Tensor:
    """The scales after a trip through 8 bits.

    Shapes: c (n,), levels (256,) in [−1, 1]. Returns (n,).
    """
    # BEGIN SOLUTION
    mean = c.mean()
    parts = []
    for part in (c - mean).split(block):
        c2 = part.abs().max().clamp(min=1e-38)
        codes = (part[:, None] / c2 - levels).abs().argmin(1)
        parts.append(levels[codes] * c2 + mean)
    return torch.cat(parts)
    # END SOLUTION


# %% tags=["check"]
check.double_quantize(double_quantize)

# %% [markdown] tags=["solution"]
# A scale is a maximum of absolute values: never negative, and much the same from block to block. Without the mean, half of the 256 levels, the
# negative ones, would never be used, and all scales would crowd into a few of the others. From 0.5 bits per weight the scales fall to $8/64 + 32/(64 \cdot 256) = 0.127$.

# %% [markdown]
# ## Exercise 4: the way back
# ●●●●○ difficulty · ●●●●● importance · 15 minutes · 3 points
#
# For $h = \hat W x + s\, B A x$ with $\hat W$ in 4 bits, write what autograd would compute, given $g = \partial E / \partial h$: the gradients of $x$, $A$ and $B$.
# $\hat W$ is `levels[codes]` times the scale of each block, in the shape $(d, k)$. It has no gradient, but the gradient of $x$ goes through it.


# %% tags=["exercise"]
def backward(
    g: Tensor,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    levels: Tensor,
    A: Tensor,
    B: Tensor,
    s: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """∂E/∂x, ∂E/∂A and ∂E/∂B.

    Shapes: g (n, d), x (n, k), codes (blocks, block), scales (blocks,), A (r, k), B (d,
        r).
    """
    # BEGIN SOLUTION
    W = (levels[codes] * scales[:, None]).reshape(len(B), A.shape[1])
    through_B = s * g @ B  # (n, r)
    return g @ W + through_B @ A, through_B.T @ x, s * g.T @ (x @ A.T)
    # END SOLUTION


# %% tags=["check"]
check.backward(backward)

# %% [markdown] tags=["solution"]
# Autograd would have kept $\hat W$ in float from the forward pass: two bytes per weight for the whole network, which is what 4 bits were to save. QLoRA
# keeps the codes and dequantizes a second time. $\partial E/\partial \hat W = g^\top x$ is never computed; rounding has no useful derivative, and nobody would use it.
