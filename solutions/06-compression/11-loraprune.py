# %% [markdown]
# # Solutions: LoRAPrune
#
# Four functions, which together are LoRAPrune: the gradient that LoRA's own gradients stand for, the score of a head or a channel, the moving average with the schedule that
# says how many have gone, and the linear whose output is masked. Symbols are those of the lesson: $W_0$ has shape (d, k), $A$ (r, k), $B$ (d, r), and the weight at
# work is $W_0 + s B A$. Stuck? `check.hint("estimated_gradient")` shows a hint, and the next one when it is called again.

# %%
import math

from torch import Tensor

from llmlab.checks.compression.loraprune import check

# %% [markdown]
# ## Exercise 1: what a step takes off the weight
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# A step of SGD makes $A' = A - \eta\,\partial A$ and $B' = B - \eta\,\partial B$. The weight goes from $W_0 + s B A$ to $W_0 + s B' A'$. Return what was taken off, divided
# by $\eta$:
#
# $$\hat g = \frac{s B A - s B' A'}{\eta} = s \left( \partial B\, A + B\, \partial A - \eta\, \partial B\, \partial A \right)$$


# %% tags=["exercise"]
def estimated_gradient(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scaling: float, lr: float
) -> Tensor:
    """ĝ (d, k): what a step of SGD with rate lr takes off scaling · B A, over lr.

    Shapes: A and grad_A (r, k), B and grad_B (d, r). All stay as they are.
    """
    # BEGIN SOLUTION
    change = grad_B @ A + B @ grad_A - lr * (grad_B @ grad_A)
    return scaling * change
    # END SOLUTION


# %% tags=["check"]
check.estimated_gradient(estimated_gradient)

# %% [markdown] tags=["solution"]
# The product of two changed factors has four terms: the old product, two in which one factor has changed, and one in which both have. The last has a plus in $B'A'$, and so a
# minus in what is taken off. It carries $\eta$ where the others do not, so the smaller the step, the less it matters; the paper sets $\eta = 1$, whatever the optimiser does.
# The factor $s$ stands outside because the model adds $s B A$, and not $B A$.

# %% [markdown]
# ## Exercise 2: the score of a unit
# ●●●○○ difficulty · ●●●●● importance · 15 minutes · 3 points
#
# A unit is what is cut at once: `each` rows of one linear, or `each` columns of another. Units lie one after the other: the first takes the first `each` rows (`axis=0`) or columns
# (`axis=1`), and so on. The score of a weight is $(\hat g_{ij} W_{ij})^2$ with the weight **at work**, $W = W_0 + s B A$. The score of a unit is the sum over all its weights.


# %% tags=["exercise"]
def group_importance(
    W0: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    gradient: Tensor,
    axis: int,
    each: int,
) -> Tensor:
    """The score of each unit, of shape (units,).

    Shapes: W0 and gradient (which is ĝ) (d, k), A (r, k), B (d, r); all stay as they
        are. There are d / each units if axis is 0, and k / each if it is 1.
    """
    # BEGIN SOLUTION
    W = W0 + scaling * B @ A
    scores = (gradient * W).square()  # (d, k)
    lines = scores.sum(1 - axis)  # (d,) or (k,)
    return lines.reshape(-1, each).sum(1)
    # END SOLUTION


# %% tags=["check"]
check.group_importance(group_importance)

# %% [markdown] tags=["solution"]
# To first order the loss changes by $-\hat g_{ij} W_{ij}$ when the weight becomes 0, up or down; the square says how much. It is squared *before* the sum: changes of opposite sign would
# cancel, and a unit whose weights all matter could come out at 0. The sum, and not the mean: a head goes with all its weights. And it is the weight at work that
# goes, LoRA's part included.

# %% [markdown]
# ## Exercise 3: how far the pruning has come
# ●●●○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# After each step two things are brought up to date. The **moving average** of the scores becomes `decay` times the old one plus `1 - decay` times the new scores. And of $n$ units
# this many are **gone**, with $\text{start} = \text{warmup} \cdot \text{steps}$ and $\text{stop} = \text{steps} - \text{cooldown} \cdot \text{steps}$,
# which need not be whole:
#
# $$0 \text{ up to start}, \qquad \lfloor n \cdot \text{final} \rfloor \text{ from stop on}, \qquad \left\lfloor n \cdot \text{final} \left( 1 - \left( 1 -
# \tfrac{\text{step} - \text{start}}{\text{stop} - \text{start}} \right)^3 \right) \right\rfloor \text{ between}$$
#
# Products of floats can fall just below a whole number, as 100 · 0.29 does: round to 6 digits before you cut off.


# %% tags=["exercise"]
def progress(
    average: Tensor,
    new: Tensor,
    decay: float,
    step: int,
    steps: int,
    warmup: float,
    cooldown: float,
    final: float,
) -> tuple[Tensor, int]:
    """(the new moving average, how many units are gone after this step of `steps`).

    average and new have the shape (units,), and stay as they are. Where start and stop
    are the same, everything goes at stop.
    """
    # BEGIN SOLUTION
    average = decay * average + (1 - decay) * new
    start = warmup * steps
    stop = steps - cooldown * steps
    if step >= stop:
        share = final
    elif step <= start:
        share = 0.0
    else:
        left = 1 - (step - start) / (stop - start)
        share = final * (1 - left**3)
    gone = math.floor(round(len(average) * share, 6))
    return average, gone
    # END SOLUTION


# %% tags=["check"]
check.progress(progress)

# %% [markdown] tags=["solution"]
# One batch is a noisy judge: the average remembers about $1 / (1 - \text{decay})$ of them. The cubic takes most units early, when there are many that nobody
# needs, and few at the end, when each one hurts. The rest of the steps, from stop on, lets LoRA mend what was done. If `final` were reached only beyond the last step, or were
# rounded down along the way, fewer units would go than were asked: the authors' code stops one step short of it, and of 32 heads cuts 15 at a half.

# %% [markdown]
# ## Exercise 4: the mask is on both parts
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# While LoRA trains, units are not cut yet: their outputs are multiplied by 0. Return
#
# $$z = (W_0 x + s B A x) \odot M$$
#
# for each row of `x`. LoRA trains through it: gradients reach `x`, `A` and `B`.


# %% tags=["exercise"]
def masked_linear(
    x: Tensor, W0: Tensor, A: Tensor, B: Tensor, scaling: float, mask: Tensor
) -> Tensor:
    """z (…, d). Shapes: x (…, k), W0 (d, k), A (r, k), B (d, r), mask (d,), 0 or 1.

    All stay as they are.
    """
    # BEGIN SOLUTION
    frozen = x @ W0.T
    change = scaling * (x @ A.T @ B.T)  # r numbers a token in between
    return (frozen + change) * mask
    # END SOLUTION


# %% tags=["check"]
check.masked_linear(masked_linear)

# %% [markdown] tags=["solution"]
# A mask on $W_0$ alone would leave $s B A x$ in the outputs that are gone: merged, their rows are not 0, and cutting them changes the model. With the mask on the sum, masked and cut are the same
# model, and rows of $B$ that are masked get no gradient. $B A$ is never built: that would take the memory of another $W_0$.
