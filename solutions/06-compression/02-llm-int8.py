# %% [markdown]
# # Solutions: LLM.int8()
#
# Three functions: codes for the rows of a matrix, the product that keeps a few columns out of it, and the paper's way to count
# outlier features. Symbols are those of the lesson: $\alpha$ is the threshold, $a$ the largest absolute value of a row. No gradients
# are asked. Stuck? `check.hint("quantize_rows")` shows a hint, and the next one when it is called again.

# %%
import torch
from torch import Tensor

from llmlab.checks.compression.llm_int8 import check

# %% [markdown]
# ## Exercise 1: a scale for each row
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# Quantize each row of a matrix to codes $-127 \dots 127$:
#
# $$a_t = \max_h |X_{th}| \qquad Q_{th} = \left\lfloor 127\, X_{th} / a_t \right\rceil$$
#
# Ties go to the even integer, as `torch.round` does. A row of zeros gets $a = 0$ and codes 0; 0 / 0 is NaN, and NaN is no integer. Return $a$ itself, not the step $a / 127$.


# %% tags=["exercise"]
def quantize_rows(X: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (int8, in the shape of X) and the largest |x| of each row (float32, shape
    (rows,)) of X, a float32 matrix. X itself is not changed.
    """
    # BEGIN SOLUTION
    a = X.abs().amax(dim=1)  # (rows,)
    divisor = torch.where(a > 0, a, 1.0)
    codes = torch.round(127 * X / divisor[:, None])
    return codes.to(torch.int8), a
    # END SOLUTION


# %% tags=["check"]
check.quantize_rows(quantize_rows)

# %% [markdown] tags=["solution"]
# 127 and not 128: an int8 ends at 127, and 128 would wrap around to −128. A row of zeros is common in this method. When all columns of a
# batch are outliers, nothing is left of any row, and 0 / 0 would put NaN into every output. The cast to int8 cuts off, so rounding
# comes first.

# %% [markdown]
# ## Exercise 2: the mixed product
# ●●●○○ difficulty · ●●●●● importance · 20 minutes · 4 points
#
# The weight was coded before any input was seen: `codes` (out, features) and `a_w` (out,), as exercise 1 makes them. Now `X` (tokens,
# features) comes. A column is an outlier when **any** token has $|x| \ge \alpha$ in it; $O$ is the set of these columns.
#
# $$Y_{to} = \sum_{h \in O} X_{th} \frac{a_{w,o}}{127} C_{oh} \;+\; \frac{a_{x,t}\, a_{w,o}}{127^2} \sum_{h \notin O} Q_{th} C_{oh}$$
#
# $a_x$ and $Q$ are those of the columns that are **not** in $O$. The second sum is one of integers: multiply in int32 or wider. $O$ may be
# empty, and it may hold all the columns.


# %% tags=["exercise"]
def mixed_product(X: Tensor, codes: Tensor, a_w: Tensor, alpha: float) -> Tensor:
    """X Wᵀ of shape (tokens, out), float32. X: float32 (tokens, features); codes: int8
    (out, features); a_w: float32 (out,). Nothing that comes in is changed.
    """
    # BEGIN SOLUTION
    out = (X.abs() >= alpha).any(dim=0)  # (features,)
    q, a_x = quantize_rows(X * ~out)  # outlier columns count as zeros
    regular = (q.int() @ codes.int().T) * (a_x / 127)[:, None] * (a_w / 127)
    few = codes[:, out] * (a_w / 127)[:, None]  # (out, |O|), decoded
    return regular + X[:, out] @ few.T
    # END SOLUTION


# %% tags=["check"]
check.mixed_product(mixed_product)

# %% [markdown] tags=["solution"]
# A whole column leaves, with the small values that other tokens have in it: a kernel can gather columns, not single numbers. The scale of a
# row is taken after that. A token that has 5.9 in an outlier column would otherwise waste its range on a number that is not
# there any more. `q.int() @ codes.int().T` is slow on a CPU; `torch._int_mm` does it on int8 and adds up in int32.

# %% [markdown]
# ## Exercise 3: outlier features
# ●●○○○ difficulty · ●●●○○ importance · 15 minutes · 3 points
#
# The paper calls a dimension of the hidden state an *outlier feature* when values of at least $\alpha$ in size
#
# - occur in at least 25% of the layers (in a layer: for any token), and
# - are at least 6% of all the values of that dimension, all layers and tokens taken together.


# %% tags=["exercise"]
def outlier_features(hidden: Tensor, alpha: float) -> list[int]:
    """The dimensions that are outlier features, ascending. hidden: float32 of shape
    (layers, tokens, dimensions).
    """
    # BEGIN SOLUTION
    large = hidden.abs() >= alpha  # (layers, tokens, dimensions)
    layers = large.any(dim=1).float().mean(dim=0)  # (dimensions,)
    values = large.float().mean(dim=(0, 1))  # (dimensions,)
    found = (layers >= 0.25) & (values >= 0.06)
    return torch.nonzero(found).flatten().tolist()
    # END SOLUTION


# %% tags=["check"]
check.outlier_features(outlier_features)

# %% [markdown] tags=["solution"]
# Both shares are needed. One token with a huge value in every layer (the first token of a text often is one) passes the first test and
# fails the second. A dimension that is large for all tokens of a single layer fails the first. What is left is systematic:
# the same column, layer after layer. That is why so few columns are enough.
