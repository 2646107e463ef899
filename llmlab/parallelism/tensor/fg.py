"""f and g, the two functions of Megatron-LM that make a split layer differentiable.

Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3. The two are conjugate:
f is the identity forward and an all-reduce backward, g is an all-reduce forward and the
identity backward.

f stands where a replicated activation enters a split region: each rank's gradient for
it is a partial sum. g stands where the partial sums of a split region become one
replicated activation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmlab.parallelism.runtime import Communicator


class _F(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator) -> Tensor:
        ctx.comm = comm
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.comm.all_reduce(grad), None


class _G(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator) -> Tensor:
        return comm.all_reduce(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator, dim: int) -> Tensor:
        ctx.comm, ctx.dim, ctx.length = comm, dim, x.shape[dim]
        return comm.all_gather(x, dim)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.narrow(ctx.dim, ctx.comm.rank * ctx.length, ctx.length), None, None


def copy_to_ranks(x: Tensor, comm: Communicator) -> Tensor:
    """f: x forward, the sum of all ranks' gradients backward."""
    return _F.apply(x, comm)


def sum_over_ranks(x: Tensor, comm: Communicator) -> Tensor:
    """g: the sum of all ranks' x forward, the gradient as it is backward."""
    return _G.apply(x, comm)


def gather_from_ranks(x: Tensor, comm: Communicator, dim: int = -1) -> Tensor:
    """All ranks' x joined along `dim` forward; backward, each rank keeps its own piece
    of the gradient.

    Right where what follows is replicated: then every rank holds the same, whole
        gradient.
    """
    return _Gather.apply(x, comm, dim % x.dim())
