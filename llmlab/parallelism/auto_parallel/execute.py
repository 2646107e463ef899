"""Running a sharded graph for real: every operator on its shard, every move and every
all-reduce by a communicator.

The same steps that `sharding` prices, forward and backward, so the ledger of a `World`
can be held against the price.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from llmlab.parallelism.auto_parallel.sharding import (
    Op,
    Spec,
    Strategy,
    missing,
    moves,
    spec,
)
from llmlab.parallelism.runtime import Communicator, Mesh


def cut(x: Tensor, to: Spec, mesh: Mesh) -> Tensor:
    """This rank's shard of a whole tensor."""
    for d, axes in enumerate(to):
        for a in axes:
            x = x.chunk(mesh.shape[int(a)], d)[mesh.coords[int(a)]]
    return x.contiguous()


def reshard(x: Tensor, src: Spec, dst: Spec, mesh: Mesh) -> Tensor:
    """From one cut to another by `moves`."""
    for kind, axis, d, to in moves(src, dst):
        comm, n = mesh.axes[axis], mesh.shape[axis]
        if kind == "slice":
            x = x.chunk(n, d)[mesh.coords[axis]].contiguous()
        elif kind == "gather":
            x = comm.all_gather(x.contiguous(), dim=d)
        # the piece of dimension `to` that each rank wants, for my piece of dimension d
        else:
            x = torch.cat(
                comm.all_to_all([piece.contiguous() for piece in x.chunk(n, to)]), dim=d
            )
    return x


def reduced(x: Tensor, axes: Sequence[int], mesh: Mesh) -> Tensor:
    """A partial sum made whole along some axes."""
    for axis in axes:
        x = mesh.axes[axis].all_reduce(x.contiguous())
    return x


def run(
    comm: Communicator,
    shape: tuple[int, ...],
    graph: Sequence[Op],
    choice: dict[str, Strategy],
    leaves: dict[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward of a graph whose loss is the sum of its last operator's
    output times `leaves["grad"]`.

    Args:
        shape: the mesh; its product is the number of ranks.
        leaves: whole inputs and weights by name, the same on every rank, and "grad" of
            the last output's shape.
    Returns:
        the whole output of the last operator, and the whole gradient of every leaf.
    """
    mesh = comm.mesh(*shape)
    tape = _forward(mesh, graph, choice, leaves)
    last = graph[-1]
    where = spec(last.writes, choice[last.name])
    gradients = _backward(mesh, graph, choice, tape, leaves["grad"])
    with_names = {
        name: reshard(g, at, ("",) * g.dim(), mesh)
        for name, (g, at) in gradients.items()
    }
    return reshard(tape[last.name][1], where, ("",) * len(where), mesh), with_names


def _forward(
    mesh: Mesh, graph, choice, leaves
) -> dict[str, tuple[list[Tensor], Tensor, Tensor]]:
    """For each operator: its local inputs, its whole (reduced) output, and the output
    that autograd knows.
    """
    tape, made = {}, {}
    for op in graph:
        s, inputs = choice[op.name], []
        for name, dims in zip(op.inputs, op.reads, strict=True):
            to = spec(dims, s)
            x = (
                reshard(*made[name], to, mesh)
                if name in made
                else cut(leaves[name], to, mesh)
            )
            inputs.append(x.detach().requires_grad_())
        with torch.enable_grad():
            out = op.fn(*inputs)
        whole = reduced(out.detach(), missing(op.writes, s), mesh)
        tape[op.name], made[op.name] = (inputs, whole, out), (whole, spec(op.writes, s))
    return tape


def _backward(
    mesh: Mesh, graph, choice, tape, grad: Tensor
) -> dict[str, tuple[Tensor, Spec]]:
    """Gradients of the leaves, each with its cut."""
    names, flowing, leaves = {op.name for op in graph}, defaultdict(list), {}
    last = graph[-1]
    flowing[last.name].append(cut(grad, spec(last.writes, choice[last.name]), mesh))
    for op in reversed(graph):
        inputs, _, out = tape[op.name]
        s, incoming = choice[op.name], sum(flowing[op.name])
        for name, dims, g in zip(
            op.inputs, op.reads, torch.autograd.grad(out, inputs, incoming), strict=True
        ):
            at, g = spec(dims, s), reduced(g, missing(dims, s), mesh)
            if name in names:
                producer = next(o for o in graph if o.name == name)
                flowing[name].append(
                    reshard(g, at, spec(producer.writes, choice[name]), mesh)
                )
            else:
                known = leaves.get(name)
                leaves[name] = (
                    g if known is None else known[0] + reshard(g, at, known[1], mesh),
                    known[1] if known else at,
                )
    return leaves
