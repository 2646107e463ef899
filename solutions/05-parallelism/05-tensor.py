# %% [markdown]
# # Solutions: Tensor parallelism
#
# Four rank functions, from a collective to a product on a grid. Each gets a communicator `comm` and runs once on every rank
# of a `World`; the same code would run in real processes. If your ranks wait for each other for ever, the check says who
# waits for whom, at once. Stuck? `check.hint("all_reduce")` shows a hint, and the next one when it is called again.

# %%
import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.checks.parallelism.tensor import check
from llmlab.parallelism import Communicator
from llmlab.parallelism.tensor import copy_to_ranks as f
from llmlab.parallelism.tensor import sum_over_ranks as g

# %% [markdown]
# ## Exercise 1: an all-reduce from two halves
# ●●○○○ difficulty · ●●●●○ importance · 15 minutes · 2 points
#
# The ring all-reduce is two collectives in a row. A *reduce-scatter* leaves each rank with one finished piece of the sum;
# an *all-gather* hands the pieces around. Build it from `comm.reduce_scatter` and `comm.all_gather`. `x` can have any
# shape, and its size need not be a multiple of the number of ranks; `reduce_scatter` wants dimension 0 to be one.


# %% tags=["exercise"]
def all_reduce(comm: Communicator, x: Tensor) -> Tensor:
    """The sum of all ranks' x, on every rank, of the shape of x.

    comm.reduce_scatter(y): piece number comm.rank, along dimension 0, of the sum of all
    ranks' y. comm.all_gather(y): all ranks' y, joined along dimension 0. comm.size: the
    number of ranks.
    """
    # BEGIN SOLUTION
    flat = x.flatten()
    padded = F.pad(flat, (0, -len(flat) % comm.size))
    total = comm.all_gather(comm.reduce_scatter(padded))
    return total[: len(flat)].view_as(x)
    # END SOLUTION


# %% tags=["check"]
check.all_reduce(all_reduce)

# %% [markdown] tags=["solution"]
# Each half sends $\frac{p-1}{p}n$ bytes per rank, together $2\frac{p-1}{p}n$. Gathering all $p$ tensors and adding them up
# on each rank gives the same sum for $(p-1)n$ bytes, which is $p/2$ times as many. ZeRO and sequence parallelism live
# from the two halves: where only a piece of the sum is needed, they stop after the first.

# %% [markdown]
# ## Exercise 2: a split MLP
# ●●●○○ difficulty · ●●●●● importance · 20 minutes · 3 points
#
# Compute the MLP of a Llama on $p$ ranks:
#
# $$z = W_{\text{down}}\,\big(\mathrm{silu}(W_{\text{gate}}\,x) \odot W_{\text{up}}\,x\big) + b .$$
#
# Every rank is given the whole weights and must use its share of them only: $1/p$ of each of the three matrices. The output is
# whole on every rank. Gradients must be right, too: of $x$ and $b$ on every rank, and of the weights in the part that a
# rank uses. `f(x, comm)` is the identity forward and an all-reduce backward; `g(y, comm)` is an all-reduce forward and the
# identity backward. One of each is enough. The numbers of channels divide by $p$.


# %% tags=["exercise"]
def split_mlp(
    comm: Communicator, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, bias: Tensor
) -> Tensor:
    """silu(x gateᵀ) ⊙ (x upᵀ) times downᵀ, plus bias, from this rank's share of the
    weights.

    Shapes: x (N, d), gate and up (ff, d), down (d, ff), bias (d). Returns (N, d), whole
        on every rank.
    Useful: t.chunk(comm.size, dim)[comm.rank].
    """

    # BEGIN SOLUTION
    def mine(t, dim):
        return t.chunk(comm.size, dim)[comm.rank]

    x = f(x, comm)
    h = F.silu(x @ mine(gate, 0).T) * (x @ mine(up, 0).T)  # (N, ff/p): whole channels
    return g(h @ mine(down, 1).T, comm) + bias
    # END SOLUTION


# %% tags=["check"]
check.split_mlp(split_mlp)

# %% [markdown] tags=["solution"]
# silu and the product act on each channel alone, so a rank that has whole channels needs nobody. The products with $W_{\text{down}}$
# are sums over channels, and a sum can be cut anywhere: $g$ adds the parts. The bias is no part of that sum. Add it before
# $g$ and it is there $p$ times. Without $f$ the forward pass is right and training is wrong: each rank's gradient of
# $x$ has come through its own channels only, the layers below drift apart, and no error tells you.

# %% [markdown]
# ## Exercise 3: a loss that never meets its logits
# ●●●●○ difficulty · ●●●●○ importance · 25 minutes · 3 points
#
# Rank $r$ has the logits of tokens $rV/p \dots (r+1)V/p - 1$ of the vocabulary, for all $N$ positions. Compute
#
# $$\ell = \log \sum_j e^{z_j - m} + m - z_{\text{target}}, \qquad m = \max_j z_j$$
#
# with no rank sending more than three numbers per position (all-reduced). Logits can be in the hundreds. Forward only:
# `comm.all_reduce(x, "max")` and `comm.all_reduce(x)` are what you need.


# %% tags=["exercise"]
def vocab_parallel_loss(comm: Communicator, logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each position, the same on every rank.

    Shapes: logits (N, V/p) of this rank, targets (N) with numbers 0 … V − 1. Returns
        (N), float32.
    """
    # BEGIN SOLUTION
    rows = logits.shape[1]
    m = comm.all_reduce(logits.amax(1), "max")
    s = comm.all_reduce((logits - m[:, None]).exp().sum(1))
    local = targets - comm.rank * rows
    here = (local >= 0) & (local < rows)
    mine = logits.gather(1, local.clamp(0, rows - 1)[:, None]).squeeze(1) * here
    return s.log() + m - comm.all_reduce(mine)
    # END SOLUTION


# %% tags=["check"]
check.vocab_parallel_loss(vocab_parallel_loss)

# %% [markdown] tags=["solution"]
# For a batch of 4,096 tokens and a vocabulary of 128,256 the logits in fp32 are 2.1 GB; what is reduced here is 49 KB. The
# maximum must be that of all ranks: exponentials of differently shifted logits cannot be added. The target's column is on
# one rank; the others add 0. The package's version also has the gradient, which costs nothing: softmax minus one-hot, each
# rank for its own columns.

# %% [markdown]
# ## Exercise 4 (challenge): a product on a grid
# ●●●●○ difficulty · ●●●○○ importance · 25 minutes · 4 points
#
# $q^2$ ranks stand on a grid; rank $(i, j)$ has the blocks $X_{ij}$ and $W_{ij}$, and wants $Y_{ij} = \sum_t X_{it} W_{tj}$. `along`
# is the group of the ranks of its row, in order of $j$; `down` the group of its column, in order of $i$. The target: no
# rank sends more than $q-1$ of its blocks of each matrix, and no product travels.


# %% tags=["exercise"]
def matmul_2d(along: Communicator, down: Communicator, X: Tensor, W: Tensor) -> Tensor:
    """This rank's block of X W.

    Shapes: X (m, k), W (k, n). Returns (m, n). along.size == down.size == q.
    comm.broadcast(x, src): the tensor of rank src of the group, on every rank of the
    group; the others' x is not looked at.
    Forward only: the gradient is not looked at.
    """
    # BEGIN SOLUTION
    Y = torch.zeros(X.shape[0], W.shape[1], dtype=X.dtype)
    for t in range(along.size):
        Y += along.broadcast(X, t) @ down.broadcast(W, t)
    return Y
    # END SOLUTION


# %% tags=["check"]
check.matmul_2d(matmul_2d)

# %% [markdown] tags=["solution"]
# This is SUMMA. In step $t$ column $t$ of the grid sends along the rows and row $t$ sends down the columns, so each rank holds one
# block of each matrix besides its own. Gathering the whole row of $X$ and the whole column of $W$ first would send as
# many bytes, and hold $q$ times as much.
