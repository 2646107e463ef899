"""Tensor parallelism in 2.5 and in three dimensions.

2.5-D (Wang et al. 2021, Tesseract, https://arxiv.org/abs/2105.14500): p = d·q² ranks
are d layers of a q × q grid. The rows of X are cut d·q ways, each layer multiplies its
own by SUMMA, and W is replicated over the layers: f around W sums its gradient.

3-D (Agarwal et al. 1995; Bian et al. 2021, https://arxiv.org/abs/2105.14450): p = q³
ranks (i, j, l), p blocks of each matrix:

    X_il = all-gather of X_ijl over j        rows i, cut again j; columns l
    W_lj = all-gather of W_lji over i        rows l, cut again i; columns j
    Y_ijl = reduce-scatter of X_il W_lj over l       rows i, cut again l; columns j

All-gather and reduce-scatter are each other's gradient, so backward costs the same
three again. The output lies on the mesh as the next layer's input does with j and l
exchanged. Simplified: the gathered operands are kept for backward, not gathered anew.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from llmlab.parallelism.runtime import Communicator, Mesh
from llmlab.parallelism.tensor.fg import copy_to_ranks
from llmlab.parallelism.tensor.summa import summa


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator) -> Tensor:
        ctx.comm = comm
        return comm.all_gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.comm.reduce_scatter(grad), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator) -> Tensor:
        ctx.comm = comm
        return comm.reduce_scatter(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.comm.all_gather(grad), None


def tesseract(
    X: Float[Tensor, "Mdq Kq"], W: Float[Tensor, "Kq Nq"], mesh: Mesh
) -> Float[Tensor, "Mdq Nq"]:
    """2.5-D: this rank's block of X W on a (d, q, q) mesh. X is cut d·q ways by rows, W
    is the same on all d layers.
    """
    if len(mesh.shape) != 3:
        raise ValueError(f"mesh.shape={mesh.shape}: 2.5-D needs a mesh (d, q, q)")
    return summa(X, copy_to_ranks(W, mesh.axes[0]), mesh)


def matmul_3d(
    X: Float[Tensor, "Mqq Kq"], W: Float[Tensor, "Kqq Nq"], mesh: Mesh
) -> Float[Tensor, "Mqq Nq"]:
    """3-D: this rank's block of X W on a (q, q, q) mesh, from `input_block` and
    `weight_block`.
    """
    over_i, over_j, over_l = _cube(mesh)
    return _ReduceScatter.apply(
        _AllGather.apply(X, over_j) @ _AllGather.apply(W, over_i), over_l
    )


def _cube(mesh: Mesh) -> tuple[Communicator, ...]:
    if len(set(mesh.shape)) != 1 or len(mesh.shape) != 3:
        raise ValueError(f"mesh.shape={mesh.shape}: 3-D needs a cube (q, q, q)")
    return mesh.axes


def _cut(whole: Tensor, q: int, row: int, again: int, column: int) -> Tensor:
    if whole.shape[0] % q**2 or whole.shape[1] % q:
        raise ValueError(
            f"whole.shape={tuple(whole.shape)} must be a multiple of ({q * q}, {q})"
        )
    return whole.chunk(q, 0)[row].chunk(q, 0)[again].chunk(q, 1)[column].clone()


def layer_block(X: Float[Tensor, "M K"], mesh: Mesh) -> Float[Tensor, "Mdq Kq"]:
    """2.5-D: this rank's block of an activation: its layer's rows, then its row and
    column of the grid.
    """
    (d, q, _), (layer, i, j) = mesh.shape, mesh.coords
    return X.chunk(d, 0)[layer].chunk(q, 0)[i].chunk(q, 1)[j].clone()


def input_block(X: Float[Tensor, "M K"], mesh: Mesh) -> Float[Tensor, "Mqq Kq"]:
    """3-D: X_ijl."""
    i, j, l = mesh.coords  # noqa: E741
    return _cut(X, mesh.shape[0], i, j, l)


def weight_block(W: Float[Tensor, "K N"], mesh: Mesh) -> Float[Tensor, "Kqq Nq"]:
    """3-D: W_lji."""
    i, j, l = mesh.coords  # noqa: E741
    return _cut(W, mesh.shape[0], l, i, j)


def output_block(Y: Float[Tensor, "M N"], mesh: Mesh) -> Float[Tensor, "Mqq Nq"]:
    """3-D: Y_ijl, with rows cut by i and l, columns by j."""
    i, j, l = mesh.coords  # noqa: E741
    return _cut(Y, mesh.shape[0], i, l, j)
