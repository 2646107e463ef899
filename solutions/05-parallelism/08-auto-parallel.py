# %% [markdown]
# # Solutions: Automatic parallelism
#
# Which collectives a cut needs, what a change of cut costs, the best plan of a chain, and a pipeline's stages.
# Stuck? `check.hint("summed")` shows a hint, and the next one when it is called again.

# %%
from llmlab.checks.parallelism.auto_parallel import check

# %% [markdown]
# ## Exercise 1: what is summed
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# An operator is written by its loops, `"mk,kn->mn"`, and a mesh axis cuts the loop `cut`. Which tensors are partial sums along that
# axis, so that they need an all-reduce in a training step? Use the names `"out"` for the output and `"grad 0"`, `"grad 1"` … for the
# gradients of the inputs. Return them in this order: `out` first, then the gradients by number.


# %% tags=["exercise"]
def summed(dims: str, cut: str) -> list[str]:
    """The tensors that need an all-reduce when an axis cuts the loop `cut` of the
    operator `dims`.
    """
    # BEGIN SOLUTION
    reads, writes = dims.split("->")
    out = ["out"] if cut not in writes else []
    return out + [
        f"grad {i}" for i, loops in enumerate(reads.split(",")) if cut not in loops
    ]
    # END SOLUTION


# %% tags=["check"]
check.summed(summed)

# %% [markdown] tags=["solution"]
# A gradient has the loops of its own tensor, and is a sum over all the others. Whoever lacks the loop that is cut has only a part of
# its sum on each rank. That is all of data, column and row parallelism, and it holds for operators that have no name yet.

# %% [markdown]
# ## Exercise 2: changing the cut
# ●●○○○ difficulty · ●●●●○ importance · 15 minutes · 2 points
#
# A tensor of `n` bytes lies on `p` ranks of one axis. `src` and `dst` say how it is cut: `None` is whole on every rank, a number is the
# dimension that is cut into `p` pieces. How many bytes does a rank send to get from `src` to `dst`, with a ring all-gather or an
# all-to-all? (Forward only.)


# %% tags=["exercise"]
def bytes_to_move(n: float, p: int, src: int | None, dst: int | None) -> float:
    """Bytes that each rank sends to change the cut of a tensor of n bytes from `src` to
    `dst`.
    """
    # BEGIN SOLUTION
    if src == dst or src is None:
        return 0.0  # a rank that has everything keeps its piece
    if dst is None:
        return n / p * (p - 1)  # all-gather: pass on p − 1 pieces
    return n / p * (p - 1) / p  # all-to-all: of my piece, all but what stays
    # END SOLUTION


# %% tags=["check"]
check.bytes_to_move(bytes_to_move)

# %% [markdown] tags=["solution"]
# Moving a cut from one dimension to another is $p$ times cheaper than gathering the tensor and cutting it anew. It is also why Ulysses
# and expert parallelism are built on the all-to-all. Cutting what is whole is free, but its gradient has to come back: in
# training, that way is an all-gather.

# %% [markdown]
# ## Exercise 3: the best plan of a chain
# ●●●○○ difficulty · ●●●●● importance · 25 minutes · 3 points
#
# A chain of operators: `node[v][i]` are the seconds of operator $v$ under its strategy $i$, and `edge[v][i][j]` the seconds to reshard
# between operator $v$ under $i$ and operator $v+1$ under $j$. Return the strategies of least total time, one number for each operator.
# Chains have up to 12 operators with 16 strategies each: trying all $16^{12}$ is out of the question.


# %% tags=["exercise"]
def best_plan(node: list[list[float]], edge: list[list[list[float]]]) -> list[int]:
    """Strategies of least total time. node: operators × strategies; edge[v]: strategies
    of v × strategies of v + 1.
    """
    # BEGIN SOLUTION
    # for each last strategy: its least time, and the way there
    best = [(t, [i]) for i, t in enumerate(node[0])]
    for costs, R in zip(node[1:], edge, strict=True):
        best = [
            # over all strategies before
            min((t + R[way[-1]][j] + c, [*way, j]) for t, way in best)
            for j, c in enumerate(costs)
        ]
    return min(best)[1]
    # END SOLUTION


# %% tags=["check"]
check.best_plan(best_plan)

# %% [markdown] tags=["solution"]
# What comes after an operator depends on its strategy alone, not on the way there, so of all ways that end in the same strategy only
# the fastest matters. The cost falls from $16^{12}$ to $11 \cdot 16^2$ steps. With residual connections the graph is no chain any
# more, and this argument breaks: then the integer program takes over.

# %% [markdown]
# ## Exercise 4: pipeline stages
# ●●●●○ difficulty · ●●●●○ importance · 30 minutes · 3 points
#
# Cut layers that take `times` seconds each into exactly `p` consecutive stages, none of them empty, so that $m$ microbatches take the least
# time: $\sum_i t_i + (m-1)\max_i t_i$. Return the number of layers of each stage. There are up to 30 layers and 8 stages.


# %% tags=["exercise"]
def stages(times: list[float], p: int, m: int) -> list[int]:
    """How many layers each of p stages gets, for the least time of m microbatches."""
    # BEGIN SOLUTION
    # (layers, stages) → slowest, sizes
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0.0, [])}
    for end in range(1, len(times) + 1):
        for k in range(1, min(p, end) + 1):
            tries = [
                (
                    max(best[start, k - 1][0], sum(times[start:end])),
                    [*best[start, k - 1][1], end - start],
                )
                for start in range(end)
                if (start, k - 1) in best
            ]
            best[end, k] = min(tries)
    # the sum is the same for every cut: only the slowest stage matters
    return best[len(times), p][1]
    # END SOLUTION


# %% tags=["check"]
check.stages(stages)

# %% [markdown] tags=["solution"]
# With one device a stage the sum of the stages is always the sum of the layers, so the slowest stage decides, for every $m > 1$. Giving a stage
# more than one device changes that, and it is then that Alpa's loop over all values of the slowest stage is needed.
