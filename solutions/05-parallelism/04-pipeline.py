# %% [markdown]
# # Solutions: Pipeline parallelism
#
# From a formula to a rank that runs any schedule, and then a schedule of your own. The fourth gets a communicator
# and runs once on every rank of a `World`: if your ranks wait for each other for ever, the check says who waits for
# whom, at once. Stuck? `check.hint("bubble")` shows a hint, and the next one when it is called again.

# %%
from collections.abc import Callable

from torch import Tensor, nn

from llmlab.checks.parallelism.pipeline import check
from llmlab.parallelism import Communicator

# %% [markdown]
# ## Exercise 1: the bubble
# ●○○○○ difficulty · ●●●●● importance · 10 minutes · 1 point
#
# $p$ ranks, $m$ microbatches, and each rank's layers in $v$ chunks (1 under GPipe and 1F1B, more under the interleaved schedule).
# For what share of a step, from its first forward to its last backward, does a rank wait?


# %% tags=["exercise"]
def bubble(p: int, m: int, v: int = 1) -> float:
    """The share of a step in which a rank waits: 0 for p = 1."""
    # BEGIN SOLUTION
    # in slots: a forward and a backward of all of a rank's layers
    waiting, working = (p - 1) / v, m
    return waiting / (waiting + working)
    # END SOLUTION


# %% tags=["check"]
check.bubble(bubble)

# %% [markdown] tags=["solution"]
# Megatron's paper divides waiting by *working*, $(p-1)/(vm)$, others by the whole step: look before you compare. For 5%
# of the step you need $m = 19(p-1)$ microbatches: 57 for 4 ranks, 285 for 16. Interleaving with $v = 4$ brings 285 down to 72.

# %% [markdown]
# ## Exercise 2: one forward, one backward
# ●●●○○ difficulty · ●●●●● importance · 20 minutes · 3 points
#
# Write the list of rank $r$ under 1F1B: a few forwards to warm up, then a forward and a backward in turn, then the
# backwards that are left; first in, first out. It must work for fewer microbatches than ranks, too, and hold as few
# microbatches as can be without losing time. For `p=2, m=2` rank 1 has `[("F", 0), ("B", 0), ("F", 1), ("B", 1)]`.


# %% tags=["exercise"]
def one_f_one_b(p: int, m: int, r: int) -> list[tuple[str, int]]:
    """What rank r of p does with m microbatches: pairs ("F" or "B", microbatch), ranks
    and microbatches from 0.
    """
    # BEGIN SOLUTION
    w = min(p - r - 1, m)
    ops = [("F", i) for i in range(w)]
    for k in range(m - w):
        ops += [("F", w + k), ("B", k)]
    return ops + [("B", i) for i in range(m - w, m)]
    # END SOLUTION


# %% tags=["check"]
check.one_f_one_b(one_f_one_b)

# %% [markdown] tags=["solution"]
# Between F of a microbatch on rank $r$ and its B lie $p-r-1$ ranks down and $p-r-1$ up; in that time the rank can do $p-r-1$ more
# forwards and no more. One forward more would gain nothing, since the ranks after it are busy, and hold one microbatch more.

# %% [markdown]
# ## Exercise 3: a backward in two
# ●●●○○ difficulty · ●●●●○ importance · 20 minutes · 3 points
#
# A stage is a chain of $n$ linears with a ReLU between: $y_k = x_k W_k^\top$, $x_{k+1} = \mathrm{relu}(y_k)$. The forward pass
# has kept every linear's input $x_k$. Given the gradient of the last output, compute the gradient of $x_0$ *now*, and the
# gradients of the weights when `later()` is called. No product may be computed before it is needed, and none twice.


# %% tags=["exercise"]
def backward_in_two(
    inputs: list[Tensor], weights: list[Tensor], dy: Tensor
) -> tuple[Tensor, Callable[[], list[Tensor]]]:
    """(the gradient of inputs[0], a function that returns the gradients of all weights,
    in their order).

    Shapes: inputs[k] (N, a), weights[k] (b, a), dy (N, b of the last). relu(y) > 0
        exactly where its gradient passes.
    """
    # BEGIN SOLUTION
    kept = []
    for k in range(len(weights) - 1, -1, -1):
        kept.append((inputs[k], dy))
        dy = dy @ weights[k]
        if k > 0:
            dy = dy * (inputs[k] > 0)
    return dy, lambda: [dy.T @ x for x, dy in reversed(kept)]
    # END SOLUTION


# %% tags=["check"]
check.backward_in_two(backward_in_two)

# %% [markdown] tags=["solution"]
# Half of the multiplications of a backward are on the path to the next rank; the other half fills bubbles. What has to be kept is
# each linear's $x$ and $\partial y$; everything else of the graph can go. In a transformer that is less than the graph itself,
# which is why delaying W (H1) is cheap and delaying the whole backward would not be.

# %% [markdown]
# ## Exercise 4 (challenge): run any schedule
# ●●●●○ difficulty · ●●●●● importance · 30 minutes · 4 points
#
# Now a rank. Go down `ops` and do what it says: F takes a microbatch (rank 0) or a message from the rank before, B goes backward.
# In the end every parameter's `.grad` is that of the mean of the microbatches' losses. The check runs GPipe's order, the same
# with the backwards last in, first out, 1F1B, and the last microbatch first: on three ranks, and on one that is the first and the last
# at once; with microbatches of different sizes.


# %% tags=["exercise"]
def run_schedule(
    comm: Communicator,
    stage: nn.Module,
    ops: list[tuple[str, int]],
    xs: list[Tensor],
    ys: list[Tensor],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
) -> float | None:
    """Run this rank's ops; leave gradients in stage.parameters(). Returns the mean loss
    on the last rank, None elsewhere.

    xs[i] is microbatch i (rank 0 feeds it to its stage), ys[i] its targets,
    loss_fn(output, ys[i]) its loss. comm.rank, comm.size. comm.recv(source): the next
    tensor from that rank. comm.isend(x, target): send and go on.
    """
    # BEGIN SOLUTION
    first, last = comm.rank == 0, comm.rank == comm.size - 1
    kept, total, sends = {}, 0.0, []
    for kind, i in ops:
        if kind == "F":
            x = xs[i] if first else comm.recv(comm.rank - 1).requires_grad_()
            y = stage(x)
            if last:
                y = loss_fn(y, ys[i]) / len(xs)
                total += y.item()
            else:
                sends.append(comm.isend(y, comm.rank + 1))
            kept[i] = x, y
        else:
            x, y = kept.pop(i)
            y.backward(None if last else comm.recv(comm.rank + 1))
            if not first:
                sends.append(comm.isend(x.grad, comm.rank - 1))
    for send in sends:
        send.wait()
    return total if last else None
    # END SOLUTION


# %% tags=["check"]
check.run_schedule(run_schedule)

# %% [markdown] tags=["solution"]
# Twenty lines, and no word of which schedule it is. Two things bite. With `comm.send`, which waits for the receiver, 1F1B stops at
# once: rank 0 sends the next hidden state while rank 1 sends a gradient, and both wait. And the loss must be divided by the number of
# microbatches exactly once: without it training runs with a learning rate (or a clipping) that is $m$ times off, and
# nothing looks wrong. `kept` is the memory of the lesson: its largest size is what the schedule decides.

# %% [markdown]
# ## Exercise 5 (open challenge): beat ZB-H1
# ●●●●● difficulty · ●●●○○ importance · 30 minutes · 3 points
#
# Make a schedule of your own: for each rank the list of its F, I and W. It must take less time than ZB-H1, and may hold up to twice
# as much. The simulator judges it, with F, I and W of one unit each. *Time* is the longest time from a rank's own first op to its
# own last. *Memory* is the most microbatches that any rank holds, each from its F to its W; ZB-H1 holds $p$, so $2p$ are allowed.
# The check tries four sizes, all with $m \ge 2p - 1$. More than one schedule is right: how little memory does yours need?


# %% tags=["exercise"]
def beat_h1(p: int, m: int) -> list[list[tuple[str, int]]]:
    """For each rank of p its ops, in order: pairs ("F", "I" or "W", microbatch)."""
    # BEGIN SOLUTION
    lists = []
    for r in range(p):
        ahead = min(2 * (p - r - 1), m)
        late = 2 * r
        ops = [("F", i) for i in range(ahead)]
        for i in range(m):
            if ahead + i < m:
                ops.append(("F", ahead + i))
            ops.append(("I", i))
            if i >= late:
                ops.append(("W", i - late))
        ops += [("W", i) for i in range(max(m - late, 0), m)]
        lists.append(ops)
    return lists
    # END SOLUTION


# %% tags=["check"]
check.beat_h1(beat_h1)

# %% [markdown] tags=["solution"]
# This is ZB-H2: twice the forwards ahead, and each W twice as late. Rank $r$ holds $2(p-r)-1$ microbatches up to their I, and $2r$
# more wait for their W: $2p - 1$ on every rank. No rank waits between its first op and its last, so no schedule is faster by this
# measure. What remains is the slant: the last rank begins $p-1$ units late, and ends as late.
