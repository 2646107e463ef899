"""Tensor parallelism in two dimensions: SUMMA, and Cannon's algorithm.

van de Geijn & Watts 1997 (SUMMA); Xu et al. 2021 (Optimus),
https://arxiv.org/abs/2104.05343, uses it for transformers. p = q² ranks stand on a q ×
q grid. Rank (i, j) holds block (i, j) of *every* matrix, activations included:

    Y = X W         Y_ij = Σ_t X_it W_tj         step t: broadcast X_it along row i,
                                                 W_tj down column j, multiply, add
    dX = dY Wᵀ      dX_it = Σ_j dY_ij W_tjᵀ      step t: broadcast W_tj down column j,
                                                 reduce along row i to rank (i, t)
    dW = Xᵀ dY      dW_tj = Σ_i X_itᵀ dY_ij      step t: broadcast X_it along row i,
                                                 reduce down column j to rank (t, j)

Nothing but one block of each is held at a time. Bytes a rank sends, forward: (|X| +
|W|)(q − 1)/q²; with backward three times that.

    M × K  X      K × N  W      M × N  Y        here X is (…, K) with its first
                                                dimension cut over rows
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from llmlab.parallelism.runtime import Communicator, Mesh


def block(whole: Float[Tensor, "M K"], mesh: Mesh) -> Float[Tensor, "Mq Kq"]:
    """This rank's block of a matrix: rows by its first coordinate, columns by its
    last.
    """
    q = _side(mesh)
    if whole.shape[0] % q or whole.shape[-1] % q:
        raise ValueError(
            f"whole.shape={tuple(whole.shape)}: both sides must be multiples of the"
            f" mesh's side {q}"
        )
    i, j = mesh.coords[-2:]
    return whole.chunk(q, 0)[i].chunk(q, -1)[j].clone()


def unblock(mine: Float[Tensor, "Mq Kq"], mesh: Mesh) -> Float[Tensor, "M K"]:
    """The whole matrix, on every rank, from its blocks."""
    rows, columns = mesh.axes[-2:]
    return rows.all_gather(columns.all_gather(mine, -1), 0)


def _side(mesh: Mesh) -> int:
    if mesh.shape[-1] != mesh.shape[-2]:
        raise ValueError(
            f"mesh.shape={mesh.shape}: SUMMA needs a square grid in the last two axes"
        )
    return mesh.shape[-1]


class _Summa(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, X: Tensor, W: Tensor, down: Communicator, along: Communicator
    ) -> Tensor:
        ctx.save_for_backward(X, W)
        ctx.down, ctx.along = down, along
        return sum(
            along.broadcast(X, src=t) @ down.broadcast(W, src=t)
            for t in range(along.size)
        )

    @staticmethod
    def backward(ctx, dY: Tensor):
        (X, W), down, along = ctx.saved_tensors, ctx.down, ctx.along
        for t in range(along.size):
            part = along.reduce(dY @ down.broadcast(W, src=t).mT, dst=t)
            dX = part if along.rank == t else None if t == 0 else dX
        for t in range(down.size):
            part = down.reduce(along.broadcast(X, src=t).mT @ dY, dst=t)
            dW = part if down.rank == t else None if t == 0 else dW
        return dX, dW, None, None


def summa(
    X: Float[Tensor, "Mq Kq"], W: Float[Tensor, "Kq Nq"], mesh: Mesh
) -> Float[Tensor, "Mq Nq"]:
    """This rank's block of X W, from its blocks of X and W; differentiable in both.

    Raises:
        ValueError: the last two axes of the mesh are not a square; the blocks do not
            fit.
    """
    _side(mesh)
    if X.shape[-1] != W.shape[0]:
        raise ValueError(
            f"X of shape {tuple(X.shape)} and W of shape {tuple(W.shape)} cannot be"
            " multiplied"
        )
    return _Summa.apply(X, W, *mesh.axes[-2:])


def cannon(
    X: Float[Tensor, "Mq Kq"], W: Float[Tensor, "Kq Nq"], mesh: Mesh
) -> Float[Tensor, "Mq Nq"]:
    """The same product by Cannon 1969: shifts between neighbours instead of broadcasts.
    Forward only.

    First X_ij moves i places left and W_ij j places up; then q products, with one shift
    left and one up between them.
    """
    q, (down, along), (i, j) = _side(mesh), mesh.axes[-2:], mesh.coords[-2:]

    def shift(x, comm, by):
        return comm.sendrecv(x, (comm.rank - by) % q, (comm.rank + by) % q)

    X, W = shift(X, along, i), shift(W, down, j)
    Y = X @ W
    for _ in range(q - 1):
        X, W = shift(X, along, 1), shift(W, down, 1)
        Y = Y + X @ W
    return Y
