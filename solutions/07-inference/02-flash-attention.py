# %% [markdown]
# # Solutions: FlashAttention
#
# Four functions, which together are FlashAttention: a softmax over keys that come in blocks, how two partial results become one, the plan of the tiles, and
# the gradient of a tile. `...` stands for any number of dimensions before: batch and heads. `S` holds the scores, already scaled by $1/\sqrt{d}$, with $-\infty$ where a
# query may not look. Stuck? `check.hint("merge", 1)` shows a hint.

# %%
import torch
from torch import Tensor

from llmlab.checks.inference.flash_attention import check

# %% [markdown]
# ## Exercise 1: the update
# ●●○○○ difficulty · ●●●●● importance · 15 minutes · 3 points
#
# Of the keys so far a query keeps their largest score $m$, the sum $l = \sum_j e^{S_j - m}$ and the vector $O = \sum_j e^{S_j - m} V_j$, which is *not* divided
# by $l$. Now a block of keys comes, with scores `S` and values `V`. Return the new $m$, $l$ and $O$, over the old keys and the new ones.
#
# Scores may be in the hundreds, so never take $e$ of a positive number. A query that has seen no key has $m = -\infty$, $l = 0$, $O = 0$; if it sees none in this block
# either, that is what it still has. No NaN then.


# %% tags=["exercise"]
def online_softmax(
    m: Tensor, l: Tensor, O: Tensor, S: Tensor, V: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The new m, l and O; those that are given stay as they are.

    Shapes: m and l (…, T), O (…, T, D), S (…, T, n), V (…, n, D), for n new keys;
    all float32, results too.
    """
    # BEGIN SOLUTION
    m_new = torch.maximum(m, S.amax(-1))
    base = torch.where(m_new == -torch.inf, 0.0, m_new)
    alpha = (m - base).exp()
    P = (S - base[..., None]).exp()
    return m_new, alpha * l + P.sum(-1), alpha[..., None] * O + P @ V
    # END SOLUTION


# %% tags=["check"]
check.online_softmax(online_softmax)

# %% [markdown] tags=["solution"]
# Both sums were made of $e^{S_j - m}$. With the new maximum each of those terms should have been $e^{S_j - m'} = e^{S_j - m} e^{m - m'}$, so one factor corrects
# them all. If the block brings no larger score, the factor is 1. For a query without keys $-\infty - 0 = -\infty$, and $e$ of it is the 0 that is wanted.
# FlashAttention (2022) keeps $O$ divided by $l$ and has to undo that in every step; FlashAttention-2 divides once, at the end, as here.

# %% [markdown]
# ## Exercise 2: two partial results
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# Two workers went over different keys of the same queries. Each has its own $m$, $l$ and $O$, as in exercise 1. Return $m$, $l$ and $O$ over all the keys. A
# side that has seen no key ($m = -\infty$) changes nothing; if both have seen none, the result is that of no keys, without NaN.


# %% tags=["exercise"]
def merge(
    m_a: Tensor, l_a: Tensor, O_a: Tensor, m_b: Tensor, l_b: Tensor, O_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """m, l and O over the keys of a and b together.

    Shapes: m and l (…, T), O (…, T, D); all float32, results too.
    """
    # BEGIN SOLUTION
    m = torch.maximum(m_a, m_b)
    base = torch.where(m == -torch.inf, 0.0, m)
    alpha = (m_a - base).exp()
    beta = (m_b - base).exp()
    O = alpha[..., None] * O_a + beta[..., None] * O_b
    return m, alpha * l_a + beta * l_b, O
    # END SOLUTION


# %% tags=["check"]
check.merge(merge)

# %% [markdown] tags=["solution"]
# The update of exercise 1 is a merge with a side whose $m$, $l$ and $O$ have just been computed. The operation does not care for order or grouping. So keys may be shared among
# many workers: when a model writes, there is one query per head, and only a split of the keys can keep a GPU busy. That is flash decoding.

# %% [markdown]
# ## Exercise 3: which tiles
# ●●●○○ difficulty · ●●●●○ importance · 20 minutes · 3 points
#
# $T$ queries stand at the end of $S$ keys: query $i$ has position $S - T + i$ and sees the keys up to there, its own included. Cut the queries into blocks of `rows` and the keys into blocks
# of `cols`; the last block of each may be smaller. List the tiles that must be computed as `(r0, r1, c0, c1, masked)`: queries $r_0 \dots r_1 - 1$, keys $c_0 \dots c_1 - 1$.
# Leave out the tiles in which no query may see any key. `masked` is True if some pair of the tile may *not* be seen. Order: by blocks of queries, and
# within a block from the first key to the last. ($T$ may be larger than $S$: then the first queries see nothing.)


# %% tags=["exercise"]
def causal_tiles(
    T: int, S: int, rows: int, cols: int
) -> list[tuple[int, int, int, int, bool]]:
    """(r0, r1, c0, c1, masked) of each tile that causal attention computes."""
    # BEGIN SOLUTION
    plan = []
    for r0 in range(0, T, rows):
        r1 = min(r0 + rows, T)
        first = S - T + r0
        last = S - T + r1 - 1
        for c0 in range(0, S, cols):
            c1 = min(c0 + cols, S)
            if c0 <= last:
                plan.append((r0, r1, c0, c1, c1 - 1 > first))
    return plan
    # END SOLUTION


# %% tags=["check"]
check.causal_tiles(causal_tiles)

# %% [markdown] tags=["solution"]
# The last query of a block sees most: if not even it sees the tile's first key, nobody sees anything. The first query sees least: if it sees the tile's last key, everybody sees everything.
# Of $n \times n$ tiles about half are computed, and only about $n$ of them pay for a mask. With $S - T$ left out the mask would start at the top left corner,
# which is what PyTorch's `is_causal=True` does.

# %% [markdown]
# ## Exercise 4: the gradient of a tile
# ●●●○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# The forward pass kept the output $O$ (now divided by $l$) and the log-sum-exp $L$ of each query, over the keys of *all* tiles. It kept no probabilities. For one tile, with the scaled scores
# $S$ and the values $V$ of its keys, return
#
# $$P = e^{S - L}, \qquad dS = P \circ (dO\,V^\top - D), \qquad D_i = \textstyle\sum_c dO_{ic}\,O_{ic}$$
#
# where $dO$ is the gradient of the output. A query that sees no key has $L = -\infty$ and all $S = -\infty$: its $P$ and $dS$ are 0.


# %% tags=["exercise"]
def score_gradient(
    S: Tensor, L: Tensor, O: Tensor, dO: Tensor, V: Tensor
) -> tuple[Tensor, Tensor]:
    """P and dS of one tile, both (…, T, n).

    Shapes: S (…, T, n), L (…, T), O and dO (…, T, D), V (…, n, D); all float32.
    """
    # BEGIN SOLUTION
    L = torch.where(L.isneginf(), 0.0, L)
    P = (S - L[..., None]).exp()
    D = (dO * O).sum(-1, keepdim=True)
    dP = dO @ V.transpose(-1, -2)
    return P, P * (dP - D)
    # END SOLUTION


# %% tags=["check"]
check.score_gradient(score_gradient)

# %% [markdown] tags=["solution"]
# The slope of a softmax couples all keys of a row: $dS_{ij} = P_{ij} (dP_{ij} - \sum_k P_{ik} dP_{ik})$, and a tile has only some of them. But the sum is
# $\sum_k P_{ik} \sum_c dO_{ic} V_{kc} = \sum_c dO_{ic} O_{ic}$, which needs two rows and no key. The rest is three products: $dV = P^\top dO$, $dQ = dS\,K / \sqrt d$,
# $dK = dS^\top Q / \sqrt d$.
