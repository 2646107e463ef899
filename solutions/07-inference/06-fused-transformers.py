# %% [markdown]
# # Solutions: Fused transformers
#
# Four functions that turn a layer of 36 launches into one of nine, and keep it small: one product where three were, a sum and a norm in one pass, a batch without padding, and
# a plan by which all results share one arena. The fused model of this lesson is built from functions with these very signatures. Stuck? `check.hint("pack_qkv", 1)` shows a hint.

# %%
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.checks.inference.fused_transformers import check
from llmlab.inference.fused_transformers import Lifetime

# %% [markdown]
# ## Exercise 1: three weights as one
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# `q` has $H D$ rows, `k` and `v` have $K D$ each, and $K$ may be smaller than $H$. They are weights (rows, $d$) or biases (rows,). Return them as one, so that one product gives q, then k, then v.
#
# Several devices may have to share it. With `parts`, the rows come as that many equal blocks, one for each device, and a block holds the q rows of its heads, then their k rows, then their v rows: the first
# block has the first $1/$`parts` of the rows of q, of k and of v. `parts` divides $H$ and $K$.


# %% tags=["exercise"]
def pack_qkv(q: Tensor, k: Tensor, v: Tensor, parts: int = 1) -> Tensor:
    """((H + 2K) D, …): q, k and v of the first part, then of the second, and so on."""
    # BEGIN SOLUTION
    blocks = zip(q.chunk(parts), k.chunk(parts), v.chunk(parts), strict=True)
    return torch.cat([x for block in blocks for x in block])
    # END SOLUTION


# %% tags=["check"]
check.pack_qkv(pack_qkv)

# %% [markdown] tags=["solution"]
# A linear's weight is (out, in), so outputs that are to lie side by side are rows that lie one below the other. With `parts = 1` a device that took the first half of the rows would have all the queries and no keys.
# With a block for each device it has whole heads, and the keys that belong to them. `parts` = $K$ is how Megatron-LM stores it: a key head stands behind the query heads that share it, and any number of devices that divides $K$ can cut there.

# %% [markdown]
# ## Exercise 2: add and norm in one pass
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 3 points
#
# `x` is what attention or the MLP gave, `residual` the stream that it is added to, both (N, d); `weight` is (d,). Return first the normed sum,
#
# $$y = \frac{s}{\sqrt{\frac{1}{d}\sum_i s_i^2 + \epsilon}} \odot w, \qquad s = \text{residual} + x,$$
#
# then $s$, the new residual stream. Inputs may be of 16 bits: take the squares and their mean in float32, and return both in the type of the inputs. Change no input.


# %% tags=["exercise"]
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The normed sum and the sum, both (N, d) and of the inputs' type."""
    # BEGIN SOLUTION
    total = residual + x
    wide = total.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(total.dtype), total
    # END SOLUTION


# %% tags=["check"]
check.add_rms_norm(add_rms_norm)

# %% [markdown] tags=["solution"]
# PyTorch runs this as seven launches, and every one reads and writes the whole of it. A kernel has the sum in its registers when it squares it, so it reads two tensors and writes two. The price is in how a layer is cut: the sum that ends one half is taken
# by the norm that begins the next, so the layer hands on two tensors, a result that is not added yet and the stream. In float16 a number of 256 has a square that is infinite; the mean is taken in float32 everywhere.

# %% [markdown]
# ## Exercise 3: a batch without padding
# ●●●○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# A batch is a table `x` (B, T, d), and `mask` (B, T) is 1 (or True) for a token and 0 (or False) for padding, on the right or on the left. Return
#
# - `tokens` (N, d): the tokens, text after text, each from left to right;
# - `places` (N,): where each stands in the flattened table, $b\,T + t$;
# - `starts` (B + 1,): where each text begins among the tokens, and at the end $N$. A text may have no token.
#
# `places` and `starts` are int64.


# %% tags=["exercise"]
def remove_padding(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tokens (N, d), places (N,), starts (B + 1,)."""
    # BEGIN SOLUTION
    is_token = mask.bool()
    places = is_token.flatten().nonzero().flatten()
    starts = F.pad(is_token.sum(1).cumsum(0), (1, 0))
    return x.flatten(0, 1)[places], places, starts
    # END SOLUTION


# %% tags=["check"]
check.remove_padding(remove_padding)

# %% [markdown] tags=["solution"]
# Products, norms and SwiGLU treat every token by itself, so they need neither `places` nor `starts`: they just have fewer rows. Only attention must know where a text ends, and takes `starts`, which flash-attn calls `cu_seqlens`. `places` is the way back: `table[places] = tokens`.

# %% [markdown]
# ## Exercise 4: one arena
# ●●●●○ difficulty · ●●●●○ importance · 25 minutes · 4 points
#
# A `Lifetime` has a `name`, a `size`, and the numbers of the launch that makes it, `first`, and of the last one that needs it, `last`. Two results meet when some launch needs both, the launches `first` and `last` included: `a.meets(b)`.
# Give each an offset in one arena so that results that meet do not overlap. Like this:
#
# 1. Take the largest first; equal sizes in the order given.
# 2. Look at those that are placed already *and meet it*, and at the gaps between them: from 0 to the first, and from the highest end so far to the next one.
# 3. Put it at the lower end of the smallest gap that is large enough (exactly as large is enough; of equal gaps the lowest).
# 4. If there is none, put it behind the highest end.


# %% tags=["exercise"]
def plan_buffers(results: Sequence[Lifetime]) -> dict[str, int]:
    """The offset of each result, by its name."""
    # BEGIN SOLUTION
    placed: list[tuple[int, Lifetime]] = []
    for result in sorted(results, key=lambda r: -r.size):
        end = 0
        best = smallest = None
        for offset, other in sorted(placed, key=lambda pair: pair[0]):
            if not result.meets(other):
                continue
            gap = offset - end
            if gap >= result.size and (smallest is None or gap < smallest):
                best, smallest = end, gap
            end = max(end, offset + other.size)
        placed.append((end if best is None else best, result))
    return {result.name: offset for offset, result in placed}
    # END SOLUTION


# %% tags=["check"]
check.plan_buffers(plan_buffers)

# %% [markdown] tags=["solution"]
# Large results leave the fewest choices, so they choose first, and small ones fill the gaps. `end` must be the highest end so far: a large result may reach beyond the one that begins after it. And a result that is read by a launch must not lie where that launch writes, so `last` and `first` are included.
# Whether the plan is the best one, nobody knows cheaply: that question is NP-hard. But no plan is below what is needed at the worst moment, and on a Llama's layer this one reaches that.
