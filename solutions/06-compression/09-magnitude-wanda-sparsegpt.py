# %% [markdown]
# # Solutions: Magnitude, Wanda and SparseGPT
#
# Four functions: three masks, and one block of SparseGPT. Symbols are those of the lesson: $W$ has shape (out, in), and a mask $M$ is True where a
# weight is **kept**, so that the pruned weight is $W \cdot M$. Stuck? `check.hint("magnitude_mask")` shows a hint, and the next one when it is called again.

# %%
import torch
from torch import Tensor

from llmlab.checks.compression.magnitude_wanda_sparsegpt import check

# %% [markdown]
# ## Exercise 1: the smallest weights of a matrix go
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# Of the $n$ weights of the matrix, exactly $\lfloor n s \rfloor$ go, those with the least $|w|$, wherever in the matrix they stand. Of equal ones those go that come first
# in the order of rows. The sparsities of the check are chosen so that `int(W.numel() * sparsity)` is that number.


# %% tags=["exercise"]
def magnitude_mask(W: Tensor, sparsity: float) -> Tensor:
    """M (out, in), bool: True for the weights that are kept. W (out, in)."""
    # BEGIN SOLUTION
    order = W.abs().flatten().argsort(stable=True)
    keep = torch.ones(W.numel(), dtype=torch.bool)
    keep[order[: int(W.numel() * sparsity)]] = False
    return keep.reshape(W.shape)
    # END SOLUTION


# %% tags=["check"]
check.magnitude_mask(magnitude_mask)

# %% [markdown] tags=["solution"]
# A threshold seems shorter: sort, take the value at the border, compare. But equal weights are then all above or all below it. A weight that was quantized has
# many equal ones, and a comparison with $\le$ prunes them all. Sorting places, not values, gives the count that was asked. `stable=True` says which of the equal ones go,
# so that the mask is the same on every machine.

# %% [markdown]
# ## Exercise 2: Wanda
# ●●○○○ difficulty · ●●●●● importance · 15 minutes · 3 points
#
# The score of $w_{ij}$ is $|w_{ij}| \cdot \lVert X_j \rVert_2$, where $X_j$ holds what all tokens put into channel $j$. Of *each row*, the $\lfloor \text{in} \cdot s \rfloor$ weights
# with the lowest scores go; again `int(W.shape[1] * sparsity)` is that number.


# %% tags=["exercise"]
def wanda_mask(W: Tensor, X: Tensor, sparsity: float) -> Tensor:
    """M (out, in), bool: True for the weights that are kept.

    Shapes: W (out, in), X (tokens, in).
    """
    # BEGIN SOLUTION
    scores = W.abs() * X.norm(dim=0)
    order = scores.argsort(dim=1, stable=True)
    count = int(W.shape[1] * sparsity)
    keep = torch.ones_like(W, dtype=torch.bool)
    return keep.scatter_(1, order[:, :count], False)
    # END SOLUTION


# %% tags=["check"]
check.wanda_mask(wanda_mask)

# %% [markdown] tags=["solution"]
# The squared score is what the squared error of output $i$ becomes when $w_{ij}$ alone is set to 0. Rows are compared apart, because each row makes one output, and an
# output of which nothing is left is lost. A factor in $X$ does not matter, so a mean in place of the sum of squares would give the same mask.

# %% [markdown]
# ## Exercise 3: N of M
# ●●●○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# Hardware wants a pattern. Of each `m` neighbours in a row the `n` with the highest scores are **kept**, and `m - n` go; of equal ones the first go. `m` divides the columns.


# %% tags=["exercise"]
def n_of_m_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """M (out, in), bool: True for the weights that are kept. scores (out, in)."""
    # BEGIN SOLUTION
    groups = scores.reshape(len(scores), -1, m)  # (out, in / m, m)
    order = groups.argsort(dim=-1, stable=True)
    keep = torch.ones_like(groups, dtype=torch.bool)
    keep.scatter_(-1, order[..., : m - n], False)
    return keep.reshape(scores.shape)
    # END SOLUTION


# %% tags=["check"]
check.n_of_m_mask(n_of_m_mask)

# %% [markdown] tags=["solution"]
# Neighbours in a row are neighbours in memory, so a view with one more dimension does it. Libraries write "2:8" for 2 of 8 that are *pruned*; papers on hardware for 2 of 8 that are
# kept. For 2:4 and 4:8 both mean the same, which is why nobody notices.

# %% [markdown]
# ## Exercise 4: one block of SparseGPT
# ●●●●○ difficulty · ●●●●● importance · 20 minutes · 4 points
#
# Here the whole of $W$ is one block. First the mask: of all its $n$ weights together, `int(W.numel() * sparsity)` go, those with the lowest $w^2 / U_{qq}^2$, where $q$ is the weight's column and
# all weights are as they were at the start. Then take the columns from first to last. Keep of the column *as it is now* what the mask keeps. Divide the error (what the column was,
# minus what is kept of it) by $U_{qq}$, and subtract the error times $U_{qj}$ from each later column $j$.


# %% tags=["exercise"]
def prune_block(W: Tensor, U: Tensor, sparsity: float) -> Tensor:
    """Ŵ (out, in), float32: zeros where weights were pruned, the others updated.

    Shapes: W (out, in), U (in, in) upper triangular, H⁻¹ = Uᵀ U. No two scores are
        equal. W itself stays as it is.
    """
    # BEGIN SOLUTION
    keep = magnitude_mask(W / U.diagonal(), sparsity)  # the order of w² / U_qq²
    W = W.clone()
    for q in range(W.shape[1]):
        w = W[:, q].clone()
        W[:, q] = w * keep[:, q]
        error = (w - W[:, q]) / U[q, q]
        W[:, q + 1 :] -= torch.outer(error, U[q, q + 1 :])
    return W
    # END SOLUTION


# %% tags=["check"]
check.prune_block(prune_block)

# %% [markdown] tags=["solution"]
# $U_{qq}^2$ is the entry of the inverse at $q$ when the columns before $q$ are out of the game. So $w^2 / U_{qq}^2$ is what pruning costs when later columns make up for it, where Wanda asks what it costs
# when nothing does. Squares keep the order of $|w / U_{qq}|$, which is why exercise 1 can be used again. The rest is GPTQ, with a zero for a level: a weight
# that is kept makes no error here, and changes only through others.
