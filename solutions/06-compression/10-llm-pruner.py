# %% [markdown]
# # Solutions: LLM-Pruner
#
# Four functions, which together are LLM-Pruner: what goes with a channel of an MLP, what goes with a head, what a unit is worth, and which units stay. A linear's weight has
# shape (out, in): it makes channels with its rows, and reads them with its columns. Stuck? `check.hint("cut_mlp")` shows a hint, and the next one when it is called again.

# %%
from torch import Tensor

from llmlab.checks.compression.llm_pruner import check

# %% [markdown]
# ## Exercise 1: the channels of an MLP
# ●○○○○ difficulty · ●●●●● importance · 8 minutes · 2 points
#
# An MLP computes $W_\text{down} (\text{silu}(W_\text{gate} x) \odot W_\text{up} x)$. Of its $f$ channels only those in `keep` shall stay, in the order
# of `keep`. Return the three weights without all that belongs to the others.


# %% tags=["exercise"]
def cut_mlp(
    gate: Tensor, up: Tensor, down: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(gate, up, down), of shapes (n, d), (n, d) and (d, n) for the n channels of keep.

    Shapes: gate and up (f, d), down (d, f), keep (n,) whole numbers.
    """
    # BEGIN SOLUTION
    return gate[keep], up[keep], down[:, keep]
    # END SOLUTION


# %% tags=["check"]
check.cut_mlp(cut_mlp)

# %% [markdown] tags=["solution"]
# Row $j$ of gate and row $j$ of up make channel $j$, and column $j$ of down reads it. What passes between, the activation and the product, is entry by entry, so that
# no other channel notices. With the three cut together the MLP computes exactly what it would with channel $j$ set to zero.

# %% [markdown]
# ## Exercise 2: the heads of an attention
# ●●●○○ difficulty · ●●●●● importance · 15 minutes · 4 points
#
# In grouped-query attention several query heads share one key/value head: those of key/value head 0 come first, beside each other, then those of head 1. Each head has
# `head_dim` rows, beside each other too. `keep` names the key/value heads that stay, in increasing order. Return the four weights without the others, and without
# their query heads. How many query heads share one follows from the shapes.


# %% tags=["exercise"]
def cut_heads(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, keep: Tensor, head_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, o) with the key/value heads of `keep` and their query heads.

    Shapes: q (H·head_dim, d), k and v (K·head_dim, d), o (d, H·head_dim), with K
        key/value heads and H query heads, a multiple of K.
    """
    # BEGIN SOLUTION
    K = len(k) // head_dim

    def heads(w: Tensor) -> Tensor:  # whole blocks of rows, K of them
        return w.view(K, -1, w.shape[1])[keep].flatten(0, 1)

    return heads(q), heads(k), heads(v), heads(o.T.contiguous()).T
    # END SOLUTION


# %% tags=["check"]
check.cut_heads(cut_heads)

# %% [markdown] tags=["solution"]
# Seen as K blocks of rows, q has blocks of several heads and k and v of one, and block $u$ of each belongs to key/value head $u$. The output projection reads the
# heads in q's order, so its *columns* go as q's rows do. To take other columns there would raise no error, because the shapes fit. The model would only be wrong.

# %% [markdown]
# ## Exercise 3: what a unit is worth
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 3 points
#
# A group has several members: weights $w$ with slopes $g = \partial L / \partial w$. Along `axis` 0 a unit is a row of the member, along `axis` 1 a column. The importance of
# unit $u$ is $\sum |g \, w|$ over all weights of all members that belong to it.


# %% tags=["exercise"]
def group_importance(
    weights: list[Tensor], grads: list[Tensor], axes: list[int]
) -> Tensor:
    """(units,), float32, as weights and slopes are. A weight and its slopes have one
    shape; all members have the same number of units along their axis.
    """
    # BEGIN SOLUTION
    total = 0
    for w, g, axis in zip(weights, grads, axes, strict=True):
        total = total + (g * w).abs().sum(dim=1 - axis)
    return total
    # END SOLUTION


# %% tags=["check"]
check.group_importance(group_importance)

# %% [markdown] tags=["solution"]
# $g \, w$ is what the loss would change by, in a straight line, if that weight alone became 0. The authors' "vector-wise" importance adds up a row first and
# takes the absolute value then, which is what the row costs as a whole, in a straight line. "Element-wise" takes it of each weight: an upper bound, which does not trust terms to cancel.

# %% [markdown]
# ## Exercise 4: which units stay
# ●●●○○ difficulty · ●●●○○ importance · 12 minutes · 3 points
#
# Each layer has a score for each of its units. The first `keep_first` and the last `keep_last` layers stay whole. Of every other layer with $n$ units, the
# `int(n * ratio)` units of least importance go. Return a list with an entry for each layer: the numbers of the units that stay, in increasing order.


# %% tags=["exercise"]
def kept_units(
    scores: list[Tensor], ratio: float, keep_first: int, keep_last: int
) -> list[Tensor]:
    """A tensor of whole numbers (int64) for each layer; scores[i] has shape (n_i,)."""
    # BEGIN SOLUTION
    kept = []
    for i, s in enumerate(scores):
        inner = keep_first <= i < len(scores) - keep_last
        count = int(len(s) * ratio) if inner else 0
        kept.append(s.argsort()[count:].sort().values)
    return kept
    # END SOLUTION


# %% tags=["check"]
check.kept_units(kept_units)

# %% [markdown] tags=["solution"]
# The first layers turn tokens into what all others work with, and the last ones turn that into words; the authors saw that these cannot be thinned out. A border for
# all layers together would leave some layers nearly empty: slopes of different layers are of different size.
