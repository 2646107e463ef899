# %% [markdown]
# # Solutions: Hybrid parallelism
#
# Where a device sits, whom it talks to, a norm that counts every number once, and the pieces of a checkpoint.
# Stuck? `check.hint("coordinates")` shows a hint, and the next one when it is called again.

# %%
from torch import Tensor

from llmlab.checks.parallelism.hybrid import check
from llmlab.parallelism.runtime import Communicator

# %% [markdown]
# ## Exercise 1: coordinates
# ●○○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# `sizes` gives the axes of a mesh, **outermost first**: `{"pp": 2, "dp": 3, "tp": 4}` has 24 devices, and devices 0 to 3 differ in tp
# only. Return the coordinates of a device by axis.


# %% tags=["exercise"]
def coordinates(rank: int, sizes: dict[str, int]) -> dict[str, int]:
    """The place of device `rank` along each axis, in the order of `sizes`."""
    # BEGIN SOLUTION
    found = {}
    for axis, n in reversed(sizes.items()):  # innermost first: it is the last digit
        rank, found[axis] = divmod(rank, n)
    return {axis: found[axis] for axis in sizes}
    # END SOLUTION


# %% tags=["check"]
check.coordinates(coordinates)

# %% [markdown] tags=["solution"]
# A rank is a number whose digits are the coordinates, in a system whose bases are the axes' sizes: taking digits from the right
# gives the innermost axis first.

# %% [markdown]
# ## Exercise 2: the group
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# With whom does device `rank` talk along `axis`? Return all devices that share its coordinates along every *other* axis, itself
# included, in increasing order.


# %% tags=["exercise"]
def group(rank: int, axis: str, sizes: dict[str, int]) -> list[int]:
    """The devices of the group of `rank` along `axis`."""
    # BEGIN SOLUTION
    stride = 1
    for name, n in reversed(sizes.items()):
        if name == axis:
            break
        stride *= n
    first = rank - rank // stride % sizes[axis] * stride
    return [first + i * stride for i in range(sizes[axis])]
    # END SOLUTION


# %% tags=["check"]
check.group(group)

# %% [markdown] tags=["solution"]
# The stride of an axis is the product of the sizes further in. With tp innermost its stride is 1, so that a group of eight is eight devices
# in a row: a node. The stride of dp is tp, and its group is spread over as many nodes as it takes.

# %% [markdown]
# ## Exercise 3: one norm for all
# ●●●○○ difficulty · ●●●●○ importance · 20 minutes · 3 points
#
# Each rank of `comm` holds some gradients; all ranks together hold the whole model. `copies[name]` says how many ranks hold the *same*
# tensor under this name (1 for a shard of its own). Return the norm of the gradient of the whole model, on every rank, as one process
# would compute it. Ranks may hold different numbers of tensors, or none. Send one number per rank.


# %% tags=["exercise"]
def global_norm(
    comm: Communicator, gradients: dict[str, Tensor], copies: dict[str, int]
) -> Tensor:
    """The norm over the whole model, equal on all ranks; a scalar."""
    # BEGIN SOLUTION
    import torch

    mine = sum(
        (g.square().sum() / copies[name] for name, g in gradients.items()),
        torch.zeros(()),
    )
    return comm.all_reduce(mine).sqrt()
    # END SOLUTION


# %% tags=["check"]
check.global_norm(global_norm)

# %% [markdown] tags=["solution"]
# Squares add up over ranks, norms do not: that is why the root comes last. And whoever holds a copy contributes its share of it. Without
# the division, a run with tp = 8 would clip earlier than the same run with tp = 1, and nobody would find out why its loss is
# different.

# %% [markdown]
# ## Exercise 4: from one split to another
# ●●●○○ difficulty · ●●●●○ importance · 20 minutes · 3 points
#
# A dimension of `n` entries was written in `old` pieces and is to be read in `new` pieces, each $\lceil n/p\rceil$ long but for the
# last ones, which may be shorter or empty. What must rank `r` of the new split read? Return a list of `(old rank, first, one past the
# last)`, positions counted **inside the old piece**, in order, without empty ones.


# %% tags=["exercise"]
def sources(n: int, old: int, new: int, r: int) -> list[tuple[int, int, int]]:
    """What to read from which old piece, for piece r of the new split."""
    # BEGIN SOLUTION
    each_old, each_new = -(-n // old), -(-n // new)
    start, stop = min(n, r * each_new), min(n, (r + 1) * each_new)
    found = []
    for q in range(old):
        low, high = max(start, q * each_old), min(stop, (q + 1) * each_old, n)
        if low < high:
            found.append((q, low - q * each_old, high - q * each_old))
    return found
    # END SOLUTION


# %% tags=["check"]
check.sources(sources)

# %% [markdown] tags=["solution"]
# Two intervals overlap from the larger of their beginnings to the smaller of their ends. That is all of resharding: no rank needs
# to know who else reads, nothing is gathered, and it does not matter whether the new split is finer or coarser.
