# %% [markdown]
# # Solutions: Data parallelism
#
# Four pieces of DDP: the plan of the buckets, a mean that is one, a step with accumulation and clipping, and the overlap. The last three are rank
# functions: each runs once on every rank of a `World`, with a communicator `comm`, and the ranks' data are of unequal length. Stuck?
# `check.hint("buckets")` shows a hint, and the next one when it is called again.

# %%
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmlab.checks.parallelism.data_parallel import check
from llmlab.parallelism import Communicator

# %% [markdown]
# ## Exercise 1: what goes into a bucket
# ●●○○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# Gradients come in the reverse order of the parameters. Put their numbers into buckets in that order; as soon as a bucket holds `limit` bytes or more,
# it is closed and the next begins. The last may hold less.


# %% tags=["exercise"]
def buckets(sizes: list[int], limit: int) -> list[list[int]]:
    """Numbers of parameters, bucket by bucket. sizes[i]: bytes of parameter i, in the
    order of the model.

    buckets([10, 10, 30, 5, 5], limit=15) begins with the bucket [4, 3, 2].
    """
    # BEGIN SOLUTION
    plan, filling = [], []
    for i in reversed(range(len(sizes))):
        filling.append(i)
        if sum(sizes[j] for j in filling) >= limit:
            plan.append(filling)
            filling = []
    return [*plan, filling] if filling else plan
    # END SOLUTION


# %% tags=["check"]
check.buckets(buckets)

# %% [markdown] tags=["solution"]
# A tensor is never cut, so a bucket can be larger than its limit: a matrix of 500 MB is a bucket of 500 MB. The order matters more than the sizes. In the order of the
# model, the first bucket would hold the embedding, and nothing could leave before backward is over.

# %% [markdown]
# ## Exercise 2: the mean over tokens
# ●●●○○ difficulty · ●●●●● importance · 15 minutes · 3 points
#
# Each rank has computed the *sum* of the losses of its tokens. Make `.grad` of every parameter, on every rank, the gradient of the mean loss over the
# tokens of all ranks, and return that mean loss. One rank may have three tokens and another fifty.


# %% tags=["exercise"]
def backward_mean(
    comm: Communicator, loss_sum: Tensor, tokens: int, weights: list[Tensor]
) -> float:
    """The mean loss over all ranks' tokens; its gradient is then in the weights' .grad.

    loss_sum: this rank's sum of losses, with a graph (call .backward() on it, or on a
        multiple of it). tokens: how many it has.
    comm.all_reduce(x) is the sum over ranks and returns a new tensor;
    comm.all_reduce(x, "mean") is their mean.
    """
    # BEGIN SOLUTION
    N = comm.all_reduce(torch.tensor(tokens)).item()
    (loss_sum / N).backward()
    for w in weights:
        w.grad = comm.all_reduce(w.grad)
    return comm.all_reduce(loss_sum.detach()).item() / N
    # END SOLUTION


# %% tags=["check"]
check.backward_mean(backward_mean)

# %% [markdown] tags=["solution"]
# Each token's gradient has to be divided by $N$, the tokens of all ranks, and summed. DDP's all-reduce is a mean and divides by $p$ once more; with it one scales the loss by $p/N$
# (`token_share`). Dividing by the own number of tokens first is what every framework's default loss does, and it is right only if all ranks have equally many.

# %% [markdown]
# ## Exercise 3: a step
# ●●●○○ difficulty · ●●●●● importance · 20 minutes · 3 points
#
# Each rank has a list of microbatches `(x, y)`, at least one, of unequal lengths, and ranks may have unequally many. Return the gradient of the mean loss over all
# tokens of all microbatches of all ranks, clipped to norm `max_norm`. Communicate as little as you can: each parameter's gradient travels once.


# %% tags=["exercise"]
def gradients_of_step(
    comm: Communicator, model: nn.Module, microbatches: list, max_norm: float
) -> list[Tensor]:
    """The gradients of model.parameters(), in their order, the same on every rank.
    Their .grad is None at the beginning.

    model(x) returns logits (tokens, classes); y holds the classes (tokens).
    nn.utils.clip_grad_norm_(parameters, max_norm).
    """
    # BEGIN SOLUTION
    N = comm.all_reduce(torch.tensor(sum(len(y) for _, y in microbatches))).item()
    for x, y in microbatches:
        (F.cross_entropy(model(x), y, reduction="sum") / N).backward()  # .grad adds up
    weights = list(model.parameters())
    flat = comm.all_reduce(torch.cat([w.grad.flatten() for w in weights]))
    for w, g in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
        w.grad = g.view_as(w)
    nn.utils.clip_grad_norm_(weights, max_norm)
    return [w.grad for w in weights]
    # END SOLUTION


# %% tags=["check"]
check.gradients_of_step(gradients_of_step)

# %% [markdown] tags=["solution"]
# Autograd adds to `.grad`, so microbatches need nothing but a common divisor. Reducing after each of them would send $m$ times the bytes, and reduce what is already reduced again.
# Clipping comes last: the norm of a rank's own gradient says nothing about the norm of the sum, and ranks that clip by different factors
# add up something that is nobody's gradient.

# %% [markdown]
# ## Exercise 4 (challenge): send while you compute
# ●●●●○ difficulty · ●●●●○ importance · 30 minutes · 4 points
#
# Given the plan of Exercise 1 and a function that runs backward, start each bucket's all-reduce *during* backward, as soon as its last gradient has come, and collect the
# results at the end. The check lets time pass with each gradient and each message, and has a target: no more than the best possible schedule needs. Gradients of this
# model come in exactly the order of the plan, and every parameter gets one.


# %% tags=["exercise"]
def overlapped(
    comm: Communicator,
    weights: list[Tensor],
    plan: list[list[int]],
    backward: Callable[[], None],
) -> list[Tensor]:
    """Runs backward() once, and returns the means over ranks of the weights' gradients,
    in the order of the weights.

    w.register_post_accumulate_grad_hook(f): calls f(w) when w.grad is complete.
    comm.all_reduce(x, "mean", async_op=True): returns a handle at once; handle.wait()
    returns the result.
    """
    # BEGIN SOLUTION
    bucket_of = {i: b for b, bucket in enumerate(plan) for i in bucket}
    missing, handles = [len(bucket) for bucket in plan], {}

    def arrive(i: int) -> None:
        b = bucket_of[i]
        missing[b] -= 1
        if missing[b] == 0:
            flat = torch.cat([weights[j].grad.flatten() for j in plan[b]])
            handles[b] = comm.all_reduce(flat, "mean", async_op=True)

    for i, w in enumerate(weights):
        w.register_post_accumulate_grad_hook(lambda _, i=i: arrive(i))
    backward()
    means = [None] * len(weights)
    for b, bucket in enumerate(plan):
        parts = handles[b].wait().split([weights[j].numel() for j in bucket])
        for j, part in zip(bucket, parts, strict=True):
            means[j] = part.view_as(weights[j])
    return means
    # END SOLUTION


# %% tags=["check"]
check.overlapped(overlapped)

# %% [markdown] tags=["solution"]
# The hook must not wait: waiting in it stops backward, and nothing overlaps. `lambda _, i=i` keeps the number; without `i=i` all hooks would report the last parameter. Two things the
# package's `DataParallel` adds: buckets leave strictly in the order of the plan, even if a later one is full first, and gradients that never come are zeros.
