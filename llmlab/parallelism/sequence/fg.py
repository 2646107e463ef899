"""g and ḡ, the two functions of Megatron-LM's sequence parallelism, and the linear
layers that open a split region.

Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4.2.2. Outside of the
matrix products every token goes its own way, so each rank keeps T/p of them. At the
door of a product the tokens meet, behind it they part again:

    g   all-gather forward, reduce-scatter backward         (B, T/p, d) → (B, T, d)
    ḡ   reduce-scatter forward, all-gather backward         (B, T, d) partial sums → (B,
        T/p, d)

An all-reduce *is* a reduce-scatter and an all-gather, so g and ḡ send what f and g of
tensor parallelism send. The gathered input would be the one whole activation that is
left. `linears_of_shard` does not keep it: it saves the shard, and gathers again
backward, for the gradient of the weights (the paper's last paragraph of 4.2.2).

    B  batch      T  tokens      p  ranks      d  hidden size      dimension 1 is the
                                                  sequence
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llmlab.parallelism.runtime import Communicator


class _G(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator) -> Tensor:
        ctx.comm = comm
        return comm.all_gather(x, dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.comm.reduce_scatter(grad, dim=1), None


class _GBar(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator) -> Tensor:
        ctx.comm = comm
        return comm.reduce_scatter(x, dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.comm.all_gather(grad, dim=1), None


class _LinearsOfShard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator, *weights: Tensor):
        ctx.comm = comm
        ctx.save_for_backward(x, *weights)  # the shard, not the whole
        whole = comm.all_gather(x, dim=1)
        return tuple(F.linear(whole, w) for w in weights)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, *weights = ctx.saved_tensors
        whole = ctx.comm.all_gather(x, dim=1).flatten(0, 1)  # (B·T, d), the second time
        dw = [g.flatten(0, 1).T @ whole for g in grads]  # (out, B·T) (B·T, d)
        # (B, T, d), one partial sum for all of them
        dx = sum(g @ w for g, w in zip(grads, weights, strict=True))
        return ctx.comm.reduce_scatter(dx, dim=1), None, *dw


def gather_sequence(
    x: Float[Tensor, "B Tp d"], comm: Communicator
) -> Float[Tensor, "B T d"]:
    """g: all ranks' tokens forward; backward, this rank's tokens of the summed
    gradient.
    """
    return _G.apply(x, comm)


def scatter_sequence(
    x: Float[Tensor, "B T d"], comm: Communicator
) -> Float[Tensor, "B Tp d"]:
    """ḡ: this rank's tokens of the sum over ranks forward; backward, all ranks'
    gradients.

    Raises:
        ValueError: T is not a multiple of the number of ranks.
    """
    return _GBar.apply(x, comm)


def linears_of_shard(
    x: Float[Tensor, "B Tp d"], comm: Communicator, *weights: Float[Tensor, "out d"]
) -> tuple[Float[Tensor, "B T out"], ...]:
    """g(x) Wᵀ for each W, with one all-gather forward; backward one more, and one
    reduce-scatter. Saves x, not g(x).
    """
    return _LinearsOfShard.apply(x, comm, *weights)
