# %% [markdown]
# # Solutions: Quantization basics
#
# Four functions: an affine quantizer for a tensor, a symmetric one for groups, a matrix product in integers, and a search for the
# range that loses least. Symbols are those of the lesson: $s$ is the scale, $z$ the zero point, $b$ the number of bits.
# `torch.round` rounds ties to even, as PyTorch's own quantizers do. Stuck? `check.hint("affine_quantize")` shows a hint, and
# the next one when it is called again.

# %%
import torch
from torch import Tensor

from llmlab.checks.compression.quantization_basics import check

# %% [markdown]
# ## Exercise 1: affine, one scale
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# Quantize a tensor to codes $0 \dots 2^b - 1$:
#
# $$s = \frac{x_\max - x_\min}{2^b - 1} \qquad z = \lfloor -x_\min / s \rceil \qquad q = \mathrm{clamp}\left(\lfloor x / s \rceil + z,\; 0,\; 2^b - 1\right)$$
#
# The range always holds 0: take $x_\min = \min(0, \min x)$ and $x_\max = \max(0, \max x)$. A tensor of zeros gets $s = 1$.


# %% tags=["exercise"]
def affine_quantize(x: Tensor, bits: int) -> tuple[Tensor, float, int]:
    """Codes (int64, in x's shape), the scale and the zero point of x, a float32 tensor
    of any shape.
    """
    # BEGIN SOLUTION
    top = 2**bits - 1
    low, high = min(0.0, x.min().item()), max(0.0, x.max().item())
    scale = (high - low) / top or 1.0
    zero = round(-low / scale)
    codes = (torch.round(x / scale) + zero).clamp(0, top)
    return codes.long(), scale, zero
    # END SOLUTION


# %% tags=["check"]
check.affine_quantize(affine_quantize)

# %% [markdown] tags=["solution"]
# There are $2^b$ levels but $2^b - 1$ steps between them: dividing by $2^b$ leaves the last level unused. The zero point is an
# integer, so that 0 is one of the levels and comes back exactly. Rounding it shifts the grid by up to half a step. When both ends
# then fall on a half, as in the check, the largest value gets the code $2^b$: hence the clamp. It also serves whoever passes a
# smaller range. Without 0 in the range, $z$ would lie outside the codes.

# %% [markdown]
# ## Exercise 2: symmetric, a scale for each group
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# Quantize a weight of shape (out, in). Every `group_size` neighbours in a row share a scale:
#
# $$s = \frac{\max |w|}{2^{b-1} - 1} \qquad q = \lfloor w / s \rceil$$
#
# `group_size` divides in. A group of zeros gets $s = 1$. The codes lie between $-(2^{b-1}-1)$ and $2^{b-1}-1$.


# %% tags=["exercise"]
def quantize_groups(W: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes (int64, shape (out, in)) and scales (float32, shape (out, in / group_size))
    of W, a float32 tensor.
    """
    # BEGIN SOLUTION
    groups = W.unflatten(1, (-1, group_size))  # (out, in / g, g)
    scale = groups.abs().amax(dim=-1) / (2 ** (bits - 1) - 1)  # (out, in / g)
    scale = torch.where(scale > 0, scale, 1.0)
    codes = torch.round(groups / scale[..., None]).flatten(1)
    return codes.long(), scale
    # END SOLUTION


# %% tags=["check"]
check.quantize_groups(quantize_groups)

# %% [markdown] tags=["solution"]
# Groups run along the inputs, the dimension that a matrix product sums over: a partial sum of `group_size` products then has one scale.
# Groups across outputs would have the same number of scales, and no kernel could take them out of the sum. In 4 bits the largest
# code is 7, not 8: 8 does not exist, since a signed 4-bit integer ends at 7, and −8 is given up so that both sides match. The largest
# weight of each group is a level by construction, so nothing needs clipping.

# %% [markdown]
# ## Exercise 3: multiply integers
# ●●●○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# Compute the output $Y = X W^\top$ of a linear layer as an int8 kernel does. Quantize $X$ (tokens, in) symmetrically to 8 bits with one
# scale for each token, $W$ (out, in) with one for each output channel, multiply the **codes**, and scale the result:
#
# $$Y_{ti} = s_t\, s_i \sum_j Q^X_{tj}\, Q^W_{ij} \qquad s_t = \max_j |X_{tj}| / 127 \qquad s_i = \max_j |W_{ij}| / 127$$
#
# No row is all zeros here.


# %% tags=["exercise"]
def int8_linear(X: Tensor, W: Tensor) -> Tensor:
    """X Wᵀ through 8-bit codes: X (tokens, in), W (out, in) → (tokens, out), all
    float32.
    """
    # BEGIN SOLUTION
    s_x = X.abs().amax(dim=1, keepdim=True) / 127  # (tokens, 1)
    s_w = W.abs().amax(dim=1, keepdim=True) / 127  # (out, 1)
    codes_x, codes_w = torch.round(X / s_x).long(), torch.round(W / s_w).long()
    return (codes_x @ codes_w.T) * s_x * s_w.T
    # END SOLUTION


# %% tags=["check"]
check.int8_linear(int8_linear)

# %% [markdown] tags=["solution"]
# The sum runs over $j$, so a scale that depends on the token $t$ or on the output $i$ comes out of it. One per *input* channel $j$, which
# is where the outliers are, would not: it would have to be folded into the weight beforehand, which is what SmoothQuant does. A
# product of two codes needs 15 bits and a sum of thousands of them more: kernels accumulate in int32.

# %% [markdown]
# ## Exercise 4: how much to clip
# ●●●○○ difficulty · ●●●○○ importance · 15 minutes · 3 points
#
# The largest value need not be a level. For each candidate $c$ (positive, each at most $\max|x|$), take $s = c / (2^{b-1} - 1)$, round
# and clamp symmetrically, and read back $\hat x$. Return the candidate with the least $\sum (\hat x - x)^2$.


# %% tags=["exercise"]
def best_clip(x: Tensor, bits: int, candidates: list[float]) -> float:
    """The clipping value among `candidates` that leaves x, a float32 tensor, the least
    squared error.
    """

    # BEGIN SOLUTION
    def error(c: float) -> float:
        top = 2 ** (bits - 1) - 1
        scale = c / top
        back = torch.round(x / scale).clamp(-top, top) * scale
        return (back - x).square().sum().item()

    return min(candidates, key=error)
    # END SOLUTION


# %% tags=["check"]
check.best_clip(best_clip)

# %% [markdown] tags=["solution"]
# Two errors trade off. Rounding costs $s^2 / 12$ for every value that is not clipped, and shrinks with the square of $c$; clipping costs
# $(|x| - c)^2$ for the few values beyond $c$. With many levels rounding is cheap already and clipping never pays; with few levels the
# best range is much smaller than the largest value. Compare errors of *values*: the error of codes is in units of $s$,
# which is another unit for every candidate.
