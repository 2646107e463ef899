# %% [markdown]
# # Solutions: Frameworks and launchers
#
# Who is who in a job, the batch that adds up, a loss that an engine cannot spoil, and a checkpoint that is never half there.
# Stuck? `check.hint("environment")` shows a hint, and the next one when it is called again.

# %%
from collections.abc import Callable
from pathlib import Path

from llmlab.checks.parallelism.frameworks import check

# %% [markdown]
# ## Exercise 1: who is who
# ●○○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# A launcher starts `per_node` processes on each of `nodes` machines. What must it put into the environment of process `local` on machine
# `node`? Return `RANK`, `LOCAL_RANK` and `WORLD_SIZE`. The environment of a process holds **strings**.


# %% tags=["exercise"]
def environment(node: int, local: int, nodes: int, per_node: int) -> dict[str, str]:
    """RANK, LOCAL_RANK and WORLD_SIZE of one process."""
    # BEGIN SOLUTION
    values = {
        "RANK": node * per_node + local,
        "LOCAL_RANK": local,
        "WORLD_SIZE": nodes * per_node,
    }
    return {name: str(value) for name, value in values.items()}
    # END SOLUTION


# %% tags=["check"]
check.environment(environment)

# %% [markdown] tags=["solution"]
# `LOCAL_RANK` chooses the device of the machine, `RANK` the part of the work. A script that says `cuda:{RANK}` works on one node and fails on
# the second, which is the most common first error on a cluster.

# %% [markdown]
# ## Exercise 2: the batch that adds up
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# DeepSpeed wants `train_batch_size = micro × accumulation × data-parallel ranks` to hold exactly. Tensor- and pipeline-parallel
# ranks see the same data, so of `devices` only `devices / (tp · pp)` count. Return the gradient accumulation steps. Raise a `ValueError` when there
# is no whole number of steps, or of ranks.


# %% tags=["exercise"]
def accumulation(batch: int, micro: int, devices: int, tp: int = 1, pp: int = 1) -> int:
    """Microbatches that each data-parallel rank adds up before it steps."""
    # BEGIN SOLUTION
    if devices % (tp * pp):
        raise ValueError(f"devices={devices} is not a multiple of tp · pp = {tp * pp}")
    each = micro * (devices // (tp * pp))
    if batch % each or batch < each:
        raise ValueError(
            f"batch={batch} is not a multiple of micro · data-parallel ranks = {each}"
        )
    return batch // each
    # END SOLUTION


# %% tags=["check"]
check.accumulation(accumulation)

# %% [markdown] tags=["solution"]
# When a job moves to twice as many devices the accumulation must be halved, or the batch doubles, and with it the run that you thought you were
# repeating. That is why engines want all three numbers and complain.

# %% [markdown]
# ## Exercise 3: a mean that an engine cannot spoil
# ●●●○○ difficulty · ●●●●● importance · 20 minutes · 3 points
#
# You want the mean loss over all $N$ tokens of a step. Your engine **averages** gradients over its `ranks`, and divides them by the number of
# `microbatches` that it accumulates. Sequences have different lengths, so ranks and microbatches have different numbers of tokens. You give
# it, for each microbatch, the **sum** of the losses of its tokens times a factor. Which factor makes the gradient right?
#
# `tokens[r][i]` is the number of tokens in microbatch $i$ of rank $r$. It may be 0, for one of padding alone.


# %% tags=["exercise"]
def loss_factor(tokens: list[list[int]]) -> float:
    """What to multiply each microbatch's sum of token losses with."""
    # BEGIN SOLUTION
    ranks, microbatches = len(tokens), len(tokens[0])
    return ranks * microbatches / sum(map(sum, tokens))
    # END SOLUTION


# %% tags=["check"]
check.loss_factor(loss_factor)

# %% [markdown] tags=["solution"]
# The engine divides by ranks · microbatches, so you multiply by it, and divide by $N$ yourself. The usual way, a mean for each microbatch, gives
# a token in a short microbatch more weight than one in a long one. It is the bug that several training libraries had for years with
# gradient accumulation.

# %% [markdown]
# ## Exercise 4: never half a checkpoint
# ●●●○○ difficulty · ●●●●● importance · 20 minutes · 3 points
#
# `write(path)` writes a checkpoint to a file; it takes a minute, and the process may die, or the disk may be full, at any moment of it.
# Write `save`, so that at every moment `folder` has a complete newest checkpoint under a name `step-….pt`: the one before until the new one is
# complete, the new one from then on. Names have eight digits, as `step-00000042.pt`, so that they sort. Keep the newest `keep` checkpoints, delete
# older ones, and not before the new one is there. `folder` may hold other files: leave them alone.
# A file that is moved in from another folder may be copied, if that lies on another disk.


# %% tags=["exercise"]
def save(folder: Path, step: int, write: Callable[[Path], None], keep: int = 2) -> Path:
    """Write the checkpoint of a step; returns its path."""
    # BEGIN SOLUTION
    target, unfinished = (
        folder / f"step-{step:08}.pt",
        folder / f".unfinished-{step:08}",
    )
    write(unfinished)
    # one step for the file system: the name is old or new, never half
    unfinished.replace(target)
    for old in sorted(folder.glob("step-*.pt"))[:-keep]:
        old.unlink()
    return target
    # END SOLUTION


# %% tags=["check"]
check.save(save)

# %% [markdown] tags=["solution"]
# Renaming within a file system is atomic, writing is not. The order matters as well: deleting the old one first to have room for the new one is how
# people lose three weeks. (To survive a power failure too, call `os.fsync` on the file before the rename.)
