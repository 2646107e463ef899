"""One MLP of two matrices, forward and backward, in 1, 2, 2.5 and 3 dimensions: run on
a `World` and counted.

    X: M × d   →   H = X A: M × f   →   Z = H B: M × d

The numbers that come out of the ledger are those that `tensor_cost.mlp_cost` predicts.
Simplified: no activation function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmlab.parallelism.runtime import Communicator, World
from llmlab.parallelism.tensor.cost import Cost, MLPShape, mesh_for
from llmlab.parallelism.tensor.cube import (
    input_block,
    layer_block,
    matmul_3d,
    tesseract,
    weight_block,
)
from llmlab.parallelism.tensor.megatron import ColumnParallelLinear, RowParallelLinear
from llmlab.parallelism.tensor.summa import block, summa

# method: how X is cut, how a weight is cut, the product
_CUTS = {
    "2-D": (block, block, summa),
    "2.5-D": (layer_block, block, tesseract),
    "3-D": (input_block, weight_block, matmul_3d),
}


def mlp_step(
    comm: Communicator, method: str, shape: MLPShape, depth: int = 2
) -> tuple[int, int]:
    """Forward and backward of the MLP on ones; returns how many weights and how many
    inputs of products this rank holds.

    Raises:
        ValueError: the ranks do not form the mesh that `method` needs, or the sizes do
            not divide over it.
    """
    mesh_shape = mesh_for(method, comm.size, depth)
    if mesh_shape is None:
        raise ValueError(f"{comm.size} ranks do not form the mesh of {method}")
    X, A, B = (
        torch.ones(*size)
        for size in ((shape.M, shape.d), (shape.d, shape.f), (shape.f, shape.d))
    )
    return (
        _in_one(comm, X, A, B)
        if method == "1-D"
        else _on_mesh(comm, method, mesh_shape, X, A, B)
    )


def _in_one(comm: Communicator, X: Tensor, A: Tensor, B: Tensor) -> tuple[int, int]:
    p, r = comm.size, comm.rank
    first = ColumnParallelLinear(A.T.chunk(p)[r].clone(), None, comm)
    second = RowParallelLinear(B.T.chunk(p, 1)[r].clone(), None, comm)
    H = first(X.requires_grad_())
    second(H).sum().backward()
    return first.weight.numel() + second.weight.numel(), X.numel() + H.numel()


def _on_mesh(
    comm: Communicator,
    method: str,
    mesh_shape: tuple[int, ...],
    X: Tensor,
    A: Tensor,
    B: Tensor,
) -> tuple[int, int]:
    mesh, (cut_x, cut_w, product) = comm.mesh(*mesh_shape), _CUTS[method]
    x, a, b = (
        t.requires_grad_() for t in (cut_x(X, mesh), cut_w(A, mesh), cut_w(B, mesh))
    )
    h = product(x, a, mesh)
    product(h, b, mesh).sum().backward()
    return a.numel() + b.numel(), x.numel() + h.numel()


def measure(method: str, p: int, shape: MLPShape, *, depth: int = 2) -> Cost:
    """What rank 0 of a `World(p)` sent and held, in bytes: to lay beside `mlp_cost`."""
    world = World(p)
    weights, inputs = world.run(mlp_step, method, shape, depth)[0]
    return Cost(float(world.ledger.bytes(rank=0)), 4.0 * weights, 4.0 * inputs)
