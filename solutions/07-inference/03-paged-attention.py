# %% [markdown]
# # Solutions: PagedAttention
#
# Four functions of a serving engine: give blocks back, make room for a token, find a prompt that others have computed, and read keys and values that lie
# scattered. A `Pool` holds the state of all blocks:
#
# | field | holds |
# |---|---|
# | `block_size` | $b$, tokens in a block |
# | `counts` | a list: for each block, in how many tables it stands |
# | `available` | a list of the blocks that stand in none: a queue, taken from its front |
# | `cached` | a dict, key → block, for full blocks that can be found again |
# | `keys` | a dict, block → key, the same the other way round |
#
# Stuck? `check.hint("free")` shows a hint, and the next one when it is called again.

# %%
import torch
from torch import Tensor

from llmlab.checks.inference.paged_attention import check
from llmlab.inference.paged_attention import Pool, block_keys, take

# %% [markdown]
# ## Exercise 1: free
# ●○○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# A sequence has ended. Every block of its table loses one reference. A block that has none left goes to the end of `available`, and the *last* block of the table
# goes first, so that the beginning of a text, which others are likelier to ask for, is given away last. Its key stays, for its contents can still be found. Return the
# blocks that have become available, in that order. The table itself stays as it is.


# %% tags=["exercise"]
def free(pool: Pool, table: list[int]) -> list[int]:
    """Give a table back; returns the blocks that nobody has any more."""
    # BEGIN SOLUTION
    again = []
    for block in reversed(table):
        pool.counts[block] -= 1
        if pool.counts[block] == 0:
            pool.available.append(block)
            again.append(block)
    return again
    # END SOLUTION


# %% tags=["check"]
check.free(free)

# %% [markdown] tags=["solution"]
# The count is all that says whether somebody else reads a block. A block that is given away while its count is 1 will be written over, and the other text changes
# without any error. Without the `reversed` the queue would give away the beginning of a text first, and what remains could not be found: a search stops at the first gap.

# %% [markdown]
# ## Exercise 2: append_slot
# ●●●○○ difficulty · ●●●●● importance · 15 minutes · 3 points
#
# A sequence has `length` tokens in the blocks of `table`. Make room for one more, and change the table accordingly:
#
# 1. The last block is full, or there is none: append a block from `take(pool)`, and return `None`.
# 2. It has room, and this table alone holds it: nothing to do; return `None`.
# 3. It has room, and others hold it, too: a block from `take(pool)` takes its place in the table, the old one loses a reference, and `(old, new)` is returned, so that its contents are copied.
#
# `take(pool)` gives the next block, with a count of 1. It raises `OutOfBlocks` when there is none; let it pass, and leave pool and table as they were.


# %% tags=["exercise"]
def append_slot(pool: Pool, table: list[int], length: int) -> tuple[int, int] | None:
    """Room for a token after `length` tokens; (from, to) where a block is copied."""
    # BEGIN SOLUTION
    if length % pool.block_size == 0:
        table.append(take(pool))
        return None
    last = table[-1]
    if pool.counts[last] == 1:
        return None
    own = take(pool)
    pool.counts[last] -= 1
    table[-1] = own
    return last, own
    # END SOLUTION


# %% tags=["check"]
check.append_slot(append_slot)

# %% [markdown] tags=["solution"]
# Only the last block is ever written, and only if it has room. So full blocks can be shared by any number of texts, for ever, and a partial one until somebody writes. Of $n$ that
# share it, $n - 1$ make a copy; the last finds a count of 1 and keeps the old block. `take` stands before all changes: if it raises, nothing has happened.

# %% [markdown]
# ## Exercise 3: allocate
# ●●●●○ difficulty · ●●●●● importance · 25 minutes · 4 points
#
# A prompt comes. Return its block table, and how many of its tokens need not be computed. `block_keys(tokens, b)` gives a key for each full block, of its tokens and all that stands before it.
#
# 1. Collect the blocks of `pool.cached` that hold the beginning of the prompt, up to the first key that is missing. One token at least must be left to compute, so at most `(len(tokens) - 1) // b` blocks.
# 2. Each of them stands in one table more. One whose count was 0 leaves `pool.available`.
# 3. Take new blocks with `take(pool)`, in order, until there is room for the whole prompt, and no more. There are enough.
#
# The keys of the new blocks are not your task: their contents are not computed yet. The number returned is in tokens.


# %% tags=["exercise"]
def allocate(pool: Pool, tokens: list[int]) -> tuple[list[int], int]:
    """(table, tokens found) of a prompt that has one token at least."""
    # BEGIN SOLUTION
    b = pool.block_size
    table = []
    for key in block_keys(tokens, b)[: (len(tokens) - 1) // b]:
        if key not in pool.cached:
            break
        table.append(pool.cached[key])
    for block in table:
        if pool.counts[block] == 0:
            pool.available.remove(block)
        pool.counts[block] += 1
    found = len(table) * b
    while len(table) * b < len(tokens):
        table.append(take(pool))
    return table, found
    # END SOLUTION


# %% tags=["check"]
check.allocate(allocate)

# %% [markdown] tags=["solution"]
# The order matters. A found block whose count is 0 stands in the queue, and `take` could give it away, even to this very prompt, which would then read and write the same block. The key of a block names all that stands before it,
# because its keys and values were computed after that text; the same words after another beginning have others. And the last token is always computed: the cache holds keys and values, and what the model says next is in neither.

# %% [markdown]
# ## Exercise 4: paged attention
# ●●●○○ difficulty · ●●●●○ importance · 20 minutes · 3 points
#
# One new token per sequence. Token $j$ of sequence $i$ lies in block `tables[i, j // b]`, at place `j % b`. A sequence sees its first `lengths[i]` tokens; what stands beyond them, in the last block and in the rest of the table, is any finite numbers.
# Query heads share key heads: with $G = H / K$, the heads $0 \dots G - 1$ read key head 0, and so on. Scores are divided by $\sqrt{D}$.


# %% tags=["exercise"]
def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor
) -> Tensor:
    """(B, H, D) from q (B, H, D), keys and values (N, b, K, D), tables (B, M)."""
    # BEGIN SOLUTION
    G = q.shape[1] // keys.shape[2]
    k = keys[tables].flatten(1, 2).repeat_interleave(G, dim=2)  # (B, M·b, H, D)
    v = values[tables].flatten(1, 2).repeat_interleave(G, dim=2)
    scores = torch.einsum("bhd,bshd->bhs", q, k) * q.shape[-1] ** -0.5
    beyond = torch.arange(k.shape[1]) >= lengths[:, None]  # (B, M·b)
    scores = scores.masked_fill(beyond[:, None], -torch.inf)
    return torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v)
    # END SOLUTION


# %% tags=["check"]
check.paged_attention(paged_attention)

# %% [markdown] tags=["solution"]
# Indexing with a table puts the blocks in the order of the text; after that it is attention as always. A kernel does not gather: it reads one block after the other where it lies, and keeps a running softmax, as in
# [FlashAttention](../../notebooks/07-inference/02-flash-attention.ipynb). The package has both ways, and a test that they agree.
