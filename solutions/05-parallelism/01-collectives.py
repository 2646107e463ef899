# %% [markdown]
# # Solutions: Collectives
#
# From a list of messages to an all-reduce that has the fewest steps and the fewest bytes at once. The last two are rank functions:
# each gets a communicator `comm` and runs once on every rank of a `World`. If ranks wait for each other for ever, the check
# says who waits for whom. Stuck? `check.hint("ring_moves")` shows a hint, and the next one when it is called again.

# %%
import math

import torch
from torch import Tensor

from llmlab.checks.parallelism.collectives import check
from llmlab.parallelism import Communicator, Link

# %% [markdown]
# ## Exercise 1: the ring, as a list
# ●●○○○ difficulty · ●●●●● importance · 15 minutes · 2 points
#
# Write the ring all-reduce over $p$ ranks as a list of messages `(step, src, dst, chunk)`. In each of the $2(p-1)$ steps every
# rank sends one chunk to its right neighbour, `(src + 1) % p`. Chunks that arrive in the first $p-1$ steps are added to the
# receiver's own; in the last $p-1$ they replace it. In step 0 rank $r$ sends chunk $r$.


# %% tags=["exercise"]
def ring_moves(p: int) -> list[tuple[int, int, int, int]]:
    """All messages of a ring all-reduce: (step, src, dst, chunk), with p chunks. For p
    = 1 there are none.
    """
    # BEGIN SOLUTION
    moves = []
    for step in range(2 * (p - 1)):
        for r in range(p):
            moves.append((step, r, (r + 1) % p, (r - step) % p))
    return moves
    # END SOLUTION


# %% tags=["check"]
check.ring_moves(ring_moves)

# %% [markdown] tags=["solution"]
# A rank sends in each step what it got in the step before: chunk $r$, then $r-1$, then $r-2$, … After $p-1$ steps rank $r$ has
# just completed chunk $r+1 \equiv r-(p-1)$, and that is the next one in the same sequence. So one formula serves both halves; the only
# difference is whether the receiver adds.

# %% [markdown]
# ## Exercise 2: where they cross
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# On $p$ ranks a ring all-reduce of $n$ bytes takes $2(p-1)\,\alpha + 2\frac{p-1}{p}\,n/\beta$, a tree (reduce, then broadcast)
# $2\lceil\log_2 p\rceil(\alpha + n/\beta)$. For which $n$ do they take equally long?


# %% tags=["exercise"]
def crossover(p: int, link: Link) -> float:
    """The size in bytes at which ring and tree are equally fast on p ≥ 2 ranks.

    link.latency is α in seconds per message, link.bandwidth is β in bytes per second.
    """
    # BEGIN SOLUTION
    L = math.ceil(math.log2(p))
    return link.latency * link.bandwidth * (p - 1 - L) / (L - (p - 1) / p)
    # END SOLUTION


# %% tags=["check"]
check.crossover(crossover)

# %% [markdown] tags=["solution"]
# The factor 2 cancels. What is left is a trade: the tree saves $p-1-L$ latencies and pays $L-\frac{p-1}{p}$ times the tensor. The product
# $\alpha\beta$, the bytes that would flow during one latency, is the unit in which "small" is measured: 500 KB for 10 µs and 50 GB/s.

# %% [markdown]
# ## Exercise 3: a tree of messages
# ●●●○○ difficulty · ●●●●○ importance · 20 minutes · 3 points
#
# Write a broadcast from `comm.send` and `comm.recv`, for any number of ranks and any root, in $\lceil\log_2 p\rceil$ rounds: in
# round $k$ the $2^k$ ranks that have the tensor each pass it on to one that has not.


# %% tags=["exercise"]
def tree_broadcast(comm: Communicator, x: Tensor | None, root: int) -> Tensor:
    """The root's tensor, on every rank. x is the tensor on rank `root`, and None on the
    others.

    comm.rank, comm.size; comm.send(x, dst) waits until it is received; comm.recv(src)
    returns what `src` sends.
    """
    # BEGIN SOLUTION
    p = comm.size
    place = (comm.rank - root) % p  # the root has place 0
    hop = 1
    while hop < p:
        if place < hop and place + hop < p:
            comm.send(x, (place + hop + root) % p)
        elif hop <= place < 2 * hop:
            x = comm.recv((place - hop + root) % p)
        hop *= 2
    return x
    # END SOLUTION


# %% tags=["check"]
check.tree_broadcast(tree_broadcast)

# %% [markdown] tags=["solution"]
# Counting places from the root makes every root look like rank 0. A rank receives once, in the round of its place's highest bit, and from then on
# sends in every round. If $p$ is not a power of two the last round has senders without a partner; the test `place + hop < p` keeps them quiet.

# %% [markdown]
# ## Exercise 4 (challenge): few steps and few bytes, for any number of ranks
# ●●●●● difficulty · ●●●○○ importance · 40 minutes · 4 points
#
# An all-reduce in at most $2\lceil\log_2 p\rceil$ messages per rank, one after another, and at most $2\frac{p-1}{p}n$ bytes per rank, for *any* $p$.
# Bruck's all-gather is half of it: let a rank's list begin with its own chunk, $r, r+1, \dots$; a rank that has the first $2^k$ of its list
# sends them $2^k$ ranks *back*, and gets its next $2^k$ (or as many as are missing) from $2^k$ ranks further on. Played backwards, with sums, it is a
# reduce-scatter: the other half.


# %% tags=["exercise"]
def log_all_reduce(comm: Communicator, x: Tensor) -> Tensor:
    """The sum of all ranks' x, on every rank. x has one dimension, and its length is a
    multiple of comm.size.

    comm.sendrecv(t, dst, src): sends t to dst and returns what src sends, at the same
    time.
    """
    # BEGIN SOLUTION
    p, r = comm.size, comm.rank
    chunks = x.chunk(p)
    # the list that begins with this rank's own chunk
    parts = [chunks[(r + i) % p] for i in range(p)]
    hops = [2**k for k in range((p - 1).bit_length())]
    for hop in reversed(hops):
        n = min(hop, p - hop)
        got = comm.sendrecv(
            torch.cat(parts[hop : hop + n]), (r + hop) % p, (r - hop) % p
        )
        parts[:n] = [a + b for a, b in zip(parts, got.chunk(n), strict=False)]
    for hop in hops:
        n = min(hop, p - hop)
        parts[hop : hop + n] = comm.sendrecv(
            torch.cat(parts[:n]), (r - hop) % p, (r + hop) % p
        ).chunk(n)
    return torch.cat([parts[(c - r) % p] for c in range(p)])
    # END SOLUTION


# %% tags=["check"]
check.log_all_reduce(log_all_reduce)

# %% [markdown] tags=["solution"]
# What rank $r$ calls `parts[hop]`, …, rank $r + $ `hop` calls `parts[0]`, …: that is why the numbering from one's own chunk makes all ranks run the same lines.
# In the all-gather's last step a rank lacks only $p-2^k$ chunks, so no byte is sent twice: $1+2+4+\dots$ up to $p-1$ chunks in all, each way. On a flat network
# this beats both ring and tree at every size; on a ring of cables its longest messages go furthest, and the plain ring wins again.
