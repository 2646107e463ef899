# %% [markdown]
# # Solutions: Sequence parallelism
#
# Four functions, from merging two softmaxes to attention round a ring. The last one is a rank function: it gets a
# communicator `comm` and runs once on every rank of a `World`. Stuck? `check.hint("merge")` shows a hint, and the next one
# when it is called again.

# %%
import torch
from torch import Tensor

from llmlab.checks.parallelism.sequence import check
from llmlab.parallelism import Communicator

# %% [markdown]
# ## Exercise 1: two softmaxes become one
# ●●○○○ difficulty · ●●●●● importance · 15 minutes · 2 points
#
# A query has looked at some keys, and found the output $o_a = \sum_j e^{S_j - \ell_a} v_j$ with $\ell_a = \log\sum_j e^{S_j}$. Elsewhere
# it has looked at other keys, and found $o_b$ and $\ell_b$. Merge the two, exactly. Two traps: $\ell$ can be in the hundreds,
# so never take $e^{\ell}$ itself; and a query that saw no key at all has $o = 0$ and $\ell = -\infty$, on one side or on both.


# %% tags=["exercise"]
def merge(o_a: Tensor, l_a: Tensor, o_b: Tensor, l_b: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the keys of a and b together.

    Shapes: o (B, H, T, D), l (B, H, T). Useful: torch.logaddexp(x, y) = log(eˣ + eʸ),
        also for −∞.
    Gradients must reach all four, where every query saw a key.
    """
    # BEGIN SOLUTION
    lse = torch.logaddexp(l_a, l_b)
    safe = torch.where(lse == -torch.inf, 0.0, lse)
    o = (l_a - safe).exp()[..., None] * o_a + (l_b - safe).exp()[..., None] * o_b
    return o, lse
    # END SOLUTION


# %% tags=["check"]
check.merge(merge)

# %% [markdown] tags=["solution"]
# $e^{\ell_a - \ell}$ is the share of the weight that fell on a's keys. The two shares add up to 1, so the merged output is an
# average again, and can be merged with a third piece: order does not matter. That is all that FlashAttention,
# blockwise attention and ring attention have in common.

# %% [markdown]
# ## Exercise 2: a fair cut
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# Cut $T$ positions into $2p$ pieces and give rank $r$ the $r$-th from the front and the $r$-th from the back. $T$ need not be a
# multiple of $2p$: let `torch.tensor_split` make the pieces.


# %% tags=["exercise"]
def zigzag(T: int, p: int, rank: int) -> Tensor:
    """The positions of this rank's tokens, in ascending order, as a tensor of integers.

    torch.arange(10).tensor_split(4) makes pieces of 3, 3, 2 and 2.
    """
    # BEGIN SOLUTION
    pieces = torch.arange(T).tensor_split(2 * p)
    return torch.cat([pieces[rank], pieces[2 * p - 1 - rank]])
    # END SOLUTION


# %% tags=["check"]
check.zigzag(zigzag)

# %% [markdown] tags=["solution"]
# Under a causal mask the token at place $i$ looks at $i + 1$ keys. Piece $r$ and its mirror together look at as many as any
# other such pair, and this holds in every single step of the ring, not only in the sum. Llama 3 was trained with this cut.

# %% [markdown]
# ## Exercise 3: what a layer keeps
# ●●●○○ difficulty · ●●●●○ importance · 15 minutes · 2 points
#
# A GPT layer keeps for its backward pass, in bytes: outside of the split regions $10\,sbh$, inside $24\,sbh$, and the
# scores of attention with their dropout, $5\,as^2b$. Tensor parallelism over $t$ ranks divides what is inside. Sequence
# parallelism divides the rest. Selective recomputation forgets the scores, not $Q$, $K$ and $V$ (6 of the 24).


# %% tags=["exercise"]
def layer_memory(
    s: int, b: int, h: int, a: int, t: int, sequence_parallel: bool, selective: bool
) -> float:
    """Bytes that each of t ranks keeps: s tokens, batch b, hidden size h, a heads."""
    # BEGIN SOLUTION
    outside = 10 / t if sequence_parallel else 10
    scores = 0 if selective else 5 * a * s / h / t
    return s * b * h * (outside + 24 / t + scores)
    # END SOLUTION


# %% tags=["check"]
check.layer_memory(layer_memory)

# %% [markdown] tags=["solution"]
# For GPT-3 ($5as/h = 80$) on 8 ranks that is $10 + 3 + 10 = 23$ units with tensor parallelism alone. Cutting the sequence takes
# almost 9 away, forgetting the scores 10; the two together leave 4.25. Neither alone does: each removes what the other leaves.

# %% [markdown]
# ## Exercise 4 (challenge): attention round a ring
# ●●●●○ difficulty · ●●●●● importance · 30 minutes · 4 points
#
# Rank $r$ has the queries, keys and values of the positions `cut[r]`, which may be of any length and in any order. Compute causal attention
# of its queries over *all* keys. The target: no rank sends more than $p - 1$ times a shard's keys and values, and none ever
# holds the keys of all ranks. Two functions are yours to use: `attend` computes one piece, and `merge` is exercise 1. You
# need not skip pieces in which nobody sees anything.

# %%
# (q, k, v, q_positions, k_positions) → (o, lse)
from llmlab.parallelism.sequence import attend

# (o_a, l_a, o_b, l_b) → (o, lse)
from llmlab.parallelism.sequence import merge as merge_pieces


# %% tags=["exercise"]
def ring_attention(
    comm: Communicator, q: Tensor, k: Tensor, v: Tensor, cut: list[Tensor]
) -> Tensor:
    """Attention of this rank's queries over all ranks' keys.

    Shapes: q (B, H, Tr, D), k and v (B, K, Tr, D). Returns (B, H, Tr, D).
    comm.sendrecv(x, dst, src): send x to rank dst while receiving from rank src; the
    sender decides the shape. torch.stack([k, v]) makes one message of two.
    Forward only: the gradient is not looked at.
    """
    # BEGIN SOLUTION
    p, r = comm.size, comm.rank
    kv = torch.stack([k, v])
    o, lse = attend(q, *kv, cut[r], cut[r])
    for step in range(1, p):
        kv = comm.sendrecv(kv, (r + 1) % p, (r - 1) % p)
        o, lse = merge_pieces(o, lse, *attend(q, *kv, cut[r], cut[(r - step) % p]))
    return o
    # END SOLUTION


# %% tags=["check"]
check.ring_attention(ring_attention)

# %% [markdown] tags=["solution"]
# Who sends to the right receives from the left, so after $s$ steps the keys of rank $r - s$ have come. The positions need not travel:
# every rank knows the cut. The package's version sends before it computes, so that the wire works meanwhile, and skips
# tiles that no query may see. Its backward pass goes round once more with $K$ and $V$, and takes the gradients of each
# rank's keys along; those need $p$ hops, because the last rank that adds to them is not the one that owns them.
