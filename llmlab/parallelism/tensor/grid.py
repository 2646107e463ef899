"""Tensor parallelism in 2, 2.5 and 3 dimensions: SUMMA, Cannon, Tesseract, a cube.

**2-D** (van de Geijn & Watts 1997, SUMMA; Xu et al. 2021, Optimus,
https://arxiv.org/abs/2104.05343, uses it for transformers). p = q² ranks form a q × q
grid. Rank (i, j) holds block (i, j) of *every* matrix, activations included:

    Y = X W       Y_ij  = Σ_t X_it W_tj       step t: broadcast X_it along row i,
                                              broadcast W_tj down column j,
                                              multiply, add
    dX = dY Wᵀ    dX_it = Σ_j dY_ij W_tjᵀ     step t: broadcast W_tj down column j,
                                              reduce along row i to rank (i, t)
    dW = Xᵀ dY    dW_tj = Σ_i X_itᵀ dY_ij     step t: broadcast X_it along row i,
                                              reduce down column j to rank (t, j)

A rank holds one foreign block of each matrix at a time. It sends
(|X| + |W|)(q − 1)/q² numbers forward, and three times that with backward.

**2.5-D** (Wang et al. 2021, Tesseract, https://arxiv.org/abs/2105.14500). p = d·q²
ranks form d layers of a q × q grid. The rows of X are cut into d·q parts. Each layer
multiplies its own part by SUMMA. W is replicated over the layers, and f around W sums
its gradient.

**3-D** (Agarwal et al. 1995; Bian et al. 2021, https://arxiv.org/abs/2105.14450).
p = q³ ranks (i, j, l) hold p blocks of each matrix:

    X_il  = all-gather of X_ijl over j           rows i, cut again by j; columns l
    W_lj  = all-gather of W_lji over i           rows l, cut again by i; columns j
    Y_ijl = reduce-scatter of X_il W_lj over l   rows i, cut again by l; columns j

All-gather and reduce-scatter are each other's gradient, so backward costs the same
three again. The output lies on the mesh as the next layer's input does, with j and l
exchanged.

Simplified: in 3-D the gathered operands are kept for backward, not gathered again. The
MLP at the end has no activation function.

    X        M × K, an activation
    W        K × N, a weight
    Y        M × N, their product
    q        side of the grid or of the cube
    d        layers of the 2.5-D mesh
    t        step of SUMMA
    i, j, l  coordinates of this rank
    Mq       M/q, and so on: the sizes of one block (Mqq is M/q², Mdq is M/(d·q))
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from llmlab.parallelism.runtime import Communicator, Mesh, World
from llmlab.parallelism.tensor.cost import Cost, MLPShape, mesh_for
from llmlab.parallelism.tensor.megatron import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_ranks,
)

# 2-D ---------------------------------------------------------------------------------


def block(whole: Float[Tensor, "M K"], mesh: Mesh) -> Float[Tensor, "Mq Kq"]:
    """Block (i, j) of a matrix, where i, j are the mesh's last two coordinates.

    Raises:
        ValueError: the last two axes of the mesh are not a square; a side of the matrix
            is not a multiple of q.
    """
    q = _side(mesh)
    if whole.shape[0] % q or whole.shape[-1] % q:
        raise ValueError(
            f"whole.shape={tuple(whole.shape)}: both sides must be multiples of the"
            f" mesh's side {q}"
        )
    i, j = mesh.coords[-2:]
    # (M, K) → (M/q, K) → (M/q, K/q)
    return whole.chunk(q, 0)[i].chunk(q, -1)[j].clone()


def unblock(local_block: Float[Tensor, "Mq Kq"], mesh: Mesh) -> Float[Tensor, "M K"]:
    """The whole matrix, on every rank, from the blocks of all ranks."""
    column, row = _column_and_row(mesh)
    row_of_blocks = row.all_gather(local_block, -1)  # (M/q, K/q) → (M/q, K)
    return column.all_gather(row_of_blocks, 0)  # (M/q, K) → (M, K)


def _side(mesh: Mesh) -> int:
    """q, the side of the grid in the last two axes of the mesh."""
    if mesh.shape[-1] != mesh.shape[-2]:
        raise ValueError(
            f"mesh.shape={mesh.shape}: SUMMA needs a square grid in the last two axes"
        )
    return mesh.shape[-1]


def _column_and_row(mesh: Mesh) -> tuple[Communicator, Communicator]:
    """The ranks of this rank's column (i varies) and of its row (j varies)."""
    column, row = mesh.axes[-2:]
    return column, row


class Summa(torch.autograd.Function):
    """Y = X W on a grid, and its two gradients, block by block."""

    @staticmethod
    def forward(
        ctx,
        X: Float[Tensor, "Mq Kq"],
        W: Float[Tensor, "Kq Nq"],
        column: Communicator,
        row: Communicator,
    ) -> Float[Tensor, "Mq Nq"]:
        """Y_ij, the sum of q products."""
        ctx.save_for_backward(X, W)
        ctx.column = column
        ctx.row = row
        Y = 0
        for t in range(row.size):
            X_it = row.broadcast(X, src=t)
            W_tj = column.broadcast(W, src=t)
            Y = Y + X_it @ W_tj
        return Y

    @staticmethod
    def backward(ctx, dY: Float[Tensor, "Mq Nq"]):
        """dX_ij and dW_ij."""
        X, W = ctx.saved_tensors
        column = ctx.column
        row = ctx.row
        # Each rank of row i has a part of dX_it. Their sum belongs to rank (i, t), so
        # a rank keeps the result of one step only. dW likewise, down the columns.
        dX = None
        for t in range(row.size):
            W_tj = column.broadcast(W, src=t)
            dX_it = row.reduce(dY @ W_tj.mT, dst=t)
            if row.rank == t:
                dX = dX_it
        dW = None
        for t in range(column.size):
            X_it = row.broadcast(X, src=t)
            dW_tj = column.reduce(X_it.mT @ dY, dst=t)
            if column.rank == t:
                dW = dW_tj
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
    column, row = _column_and_row(mesh)
    return Summa.apply(X, W, column, row)


def cannon(
    X: Float[Tensor, "Mq Kq"], W: Float[Tensor, "Kq Nq"], mesh: Mesh
) -> Float[Tensor, "Mq Nq"]:
    """This rank's block of X W by Cannon 1969: shifts instead of broadcasts.

    Messages go between neighbours only. Forward only.
    """
    q = _side(mesh)
    column, row = _column_and_row(mesh)
    i, j = mesh.coords[-2:]
    # Skew: X_ij moves i places left and W_ij moves j places up. Now the two blocks of
    # each rank have the same inner index.
    X = _shift(X, row, i)
    W = _shift(W, column, j)
    Y = X @ W
    # Between two products, X moves one place left and W one place up.
    for _ in range(q - 1):
        X = _shift(X, row, 1)
        W = _shift(W, column, 1)
        Y = Y + X @ W
    return Y


def _shift(x: Tensor, comm: Communicator, places: int) -> Tensor:
    """Send x to the rank `places` before this one; return what arrives from behind."""
    destination = (comm.rank - places) % comm.size
    source = (comm.rank + places) % comm.size
    return comm.sendrecv(x, destination, source)


# 2.5-D -------------------------------------------------------------------------------


def layer_block(X: Float[Tensor, "M K"], mesh: Mesh) -> Float[Tensor, "Mdq Kq"]:
    """2.5-D: this rank's block of an activation.

    The rows are cut by layer and then by i, the columns by j.
    """
    d, q, _ = mesh.shape
    layer, i, j = mesh.coords
    # (M, K) → (M/d, K) → (M/(d·q), K) → (M/(d·q), K/q)
    return X.chunk(d, 0)[layer].chunk(q, 0)[i].chunk(q, 1)[j].clone()


def tesseract(
    X: Float[Tensor, "Mdq Kq"], W: Float[Tensor, "Kq Nq"], mesh: Mesh
) -> Float[Tensor, "Mdq Nq"]:
    """2.5-D: this rank's block of X W on a (d, q, q) mesh.

    Args:
        X: from `layer_block`.
        W: from `block`, the same on all d layers.
    Raises:
        ValueError: the mesh has not three axes, or its last two are not a square.
    """
    if len(mesh.shape) != 3:
        raise ValueError(f"mesh.shape={mesh.shape}: 2.5-D needs a mesh (d, q, q)")
    layers = mesh.axes[0]
    # Each layer sees its own rows of X. f sums the layers' gradients of W.
    return summa(X, copy_to_ranks(W, layers), mesh)


# 3-D ---------------------------------------------------------------------------------


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


def matmul_3d(
    X: Float[Tensor, "Mqq Kq"], W: Float[Tensor, "Kqq Nq"], mesh: Mesh
) -> Float[Tensor, "Mqq Nq"]:
    """3-D: this rank's block of X W on a (q, q, q) mesh.

    Args:
        X: from `input_block`.
        W: from `weight_block`.
    Raises:
        ValueError: the mesh is not a cube.
    """
    if len(mesh.shape) != 3 or len(set(mesh.shape)) != 1:
        raise ValueError(f"mesh.shape={mesh.shape}: 3-D needs a cube (q, q, q)")
    over_i, over_j, over_l = mesh.axes
    X_il = _AllGather.apply(X, over_j)  # (M/q², K/q) → (M/q, K/q)
    W_lj = _AllGather.apply(W, over_i)  # (K/q², N/q) → (K/q, N/q)
    # a partial sum: each l has its part of the inner dimension
    partial_Y_ij = X_il @ W_lj  # (M/q, N/q)
    return _ReduceScatter.apply(partial_Y_ij, over_l)  # (M/q, N/q) → (M/q², N/q)


def input_block(X: Float[Tensor, "M K"], mesh: Mesh) -> Float[Tensor, "Mqq Kq"]:
    """3-D: X_ijl. Rows are cut by i and again by j, columns by l."""
    i, j, l = mesh.coords  # noqa: E741
    return _block_3d(X, mesh.shape[0], row=i, row_again=j, column=l)


def weight_block(W: Float[Tensor, "K N"], mesh: Mesh) -> Float[Tensor, "Kqq Nq"]:
    """3-D: W_lji. Rows are cut by l and again by i, columns by j."""
    i, j, l = mesh.coords  # noqa: E741
    return _block_3d(W, mesh.shape[0], row=l, row_again=i, column=j)


def output_block(Y: Float[Tensor, "M N"], mesh: Mesh) -> Float[Tensor, "Mqq Nq"]:
    """3-D: Y_ijl. Rows are cut by i and again by l, columns by j."""
    i, j, l = mesh.coords  # noqa: E741
    return _block_3d(Y, mesh.shape[0], row=i, row_again=l, column=j)


def _block_3d(whole: Tensor, q: int, *, row: int, row_again: int, column: int):
    if whole.shape[0] % q**2 or whole.shape[1] % q:
        raise ValueError(
            f"whole.shape={tuple(whole.shape)} must be a multiple of ({q * q}, {q})"
        )
    # (M, K) → (M/q, K) → (M/q², K) → (M/q², K/q)
    return whole.chunk(q, 0)[row].chunk(q, 0)[row_again].chunk(q, 1)[column].clone()


# One MLP of two matrices, run on a World and counted ---------------------------------
#
#     X: M × d   →   H = X A: M × f   →   Z = H B: M × d       (d: hidden size here)
#
# The ledger's numbers are those that `cost.mlp_cost` predicts.

# method: (how X is cut, how a weight is cut, the product)
MESH_METHODS = {
    "2-D": (block, block, summa),
    "2.5-D": (layer_block, block, tesseract),
    "3-D": (input_block, weight_block, matmul_3d),
}


def mlp_step(
    comm: Communicator, method: str, shape: MLPShape, depth: int = 2
) -> tuple[int, int]:
    """Forward and backward of the MLP on ones.

    Returns:
        How many weights this rank holds, and how many numbers of the products' inputs.
    Raises:
        ValueError: the ranks do not form the mesh that `method` needs, or the sizes do
            not divide over it.
    """
    mesh_shape = mesh_for(method, comm.size, depth)
    if mesh_shape is None:
        raise ValueError(f"{comm.size} ranks do not form the mesh of {method}")
    X = torch.ones(shape.M, shape.d)
    A = torch.ones(shape.d, shape.f)
    B = torch.ones(shape.f, shape.d)
    if method == "1-D":
        return _mlp_step_1d(comm, X, A, B)
    return _mlp_step_on_mesh(comm, method, mesh_shape, X, A, B)


def _mlp_step_1d(
    comm: Communicator, X: Tensor, A: Tensor, B: Tensor
) -> tuple[int, int]:
    # A by columns, B by rows; a linear keeps its weight as (out, in)
    A_r = A.T.chunk(comm.size, 0)[comm.rank].clone()  # (f, d) → (f/p, d)
    B_r = B.T.chunk(comm.size, 1)[comm.rank].clone()  # (d, f) → (d, f/p)
    first = ColumnParallelLinear(A_r, None, comm)
    second = RowParallelLinear(B_r, None, comm)
    X.requires_grad_()
    H = first(X)
    Z = second(H)
    Z.sum().backward()
    weights = first.weight.numel() + second.weight.numel()
    inputs = X.numel() + H.numel()
    return weights, inputs


def _mlp_step_on_mesh(
    comm: Communicator,
    method: str,
    mesh_shape: tuple[int, ...],
    X: Tensor,
    A: Tensor,
    B: Tensor,
) -> tuple[int, int]:
    mesh = comm.mesh(*mesh_shape)
    cut_input, cut_weight, product = MESH_METHODS[method]
    X_block = cut_input(X, mesh).requires_grad_()
    A_block = cut_weight(A, mesh).requires_grad_()
    B_block = cut_weight(B, mesh).requires_grad_()
    H_block = product(X_block, A_block, mesh)
    Z_block = product(H_block, B_block, mesh)
    Z_block.sum().backward()
    weights = A_block.numel() + B_block.numel()
    inputs = X_block.numel() + H_block.numel()
    return weights, inputs


def measure(method: str, p: int, shape: MLPShape, *, depth: int = 2) -> Cost:
    """What rank 0 of a `World(p)` sent and held, in bytes: to compare with `mlp_cost`.

    Args:
        depth: layers of the 2.5-D mesh.
    """
    world = World(p)
    weights, inputs = world.run(mlp_step, method, shape, depth)[0]
    fp32_bytes = 4.0
    return Cost(
        sent=float(world.ledger.bytes(rank=0)),
        parameters=fp32_bytes * weights,
        activations=fp32_bytes * inputs,
    )
