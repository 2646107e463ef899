"""Running a sharded graph: every operator on its shard, every move over the network.

These are the steps that `sharding` prices, forward and backward. So the ledger of a
`World` can be compared with the price.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmlab.parallelism.auto_parallel.sharding import (
    Op,
    Spec,
    Strategy,
    moves,
    partial_axes,
    spec,
)
from llmlab.parallelism.runtime import Communicator, Mesh

Graph = Sequence[Op]
Choice = dict[str, Strategy]


def cut(x: Tensor, to: Spec, mesh: Mesh) -> Tensor:
    """This rank's shard of a whole tensor."""
    for dim, axes in enumerate(to):
        for axis in axes:
            n = mesh.shape[int(axis)]
            x = x.chunk(n, dim)[mesh.coords[int(axis)]]
    return x.contiguous()


def reshard(x: Tensor, src: Spec, dst: Spec, mesh: Mesh) -> Tensor:
    """A shard cut by `src` becomes one cut by `dst`, step by step as in `moves`."""
    for step in moves(src, dst):
        comm = mesh.axes[step.axis]
        n = mesh.shape[step.axis]
        if step.kind == "slice":
            x = x.chunk(n, step.dim)[mesh.coords[step.axis]].contiguous()
        elif step.kind == "gather":
            x = comm.all_gather(x.contiguous(), dim=step.dim)
        else:
            # Every rank gets its piece of `to_dim`, and so has all pieces of `dim`.
            pieces = [piece.contiguous() for piece in x.chunk(n, step.to_dim)]
            x = torch.cat(comm.all_to_all(pieces), dim=step.dim)
    return x


def gather_whole(x: Tensor, src: Spec, mesh: Mesh) -> Tensor:
    """The whole tensor on every rank."""
    return reshard(x, src, ("",) * x.dim(), mesh)


def reduce_partial(x: Tensor, axes: Sequence[int], mesh: Mesh) -> Tensor:
    """Add up a partial sum along some axes of the mesh."""
    for axis in axes:
        x = mesh.axes[axis].all_reduce(x.contiguous())
    return x


@dataclass
class Recorded:
    """What the forward pass keeps of one operator, all on this rank's shards."""

    inputs: list[Tensor]  # cut as the operator wants them; leaves of autograd
    output: Tensor  # before the all-reduce, with its autograd graph
    reduced: Tensor  # after the all-reduce
    spec: Spec  # how both outputs are cut


def run(
    comm: Communicator,
    shape: tuple[int, ...],
    graph: Graph,
    choice: Choice,
    leaves: dict[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward of a graph.

    The loss is the sum of the last operator's output times `leaves["grad"]`.

    Args:
        shape: the mesh; its product is the number of ranks.
        leaves: whole inputs and weights by name, the same on every rank, and "grad" of
            the last output's shape.
    Returns:
        The whole output of the last operator, and the whole gradient of every leaf.
    """
    mesh = comm.mesh(*shape)
    tape = _forward(mesh, graph, choice, leaves)
    gradients = _backward(mesh, graph, choice, tape, leaves["grad"])

    # Not part of a training step: results are made whole to be looked at.
    whole_gradients = {}
    for name, (grad, cut_as) in gradients.items():
        whole_gradients[name] = gather_whole(grad, cut_as, mesh)
    last = tape[graph[-1].name]
    return gather_whole(last.reduced, last.spec, mesh), whole_gradients


def _forward(
    mesh: Mesh, graph: Graph, choice: Choice, leaves: dict[str, Tensor]
) -> dict[str, Recorded]:
    tape: dict[str, Recorded] = {}
    for op in graph:
        s = choice[op.name]
        inputs = []
        for name, dims in zip(op.inputs, op.reads, strict=True):
            wanted = spec(dims, s)
            if name in tape:
                x = reshard(tape[name].reduced, tape[name].spec, wanted, mesh)
            else:
                x = cut(leaves[name], wanted, mesh)
            # Cut off from the producer: autograd sees one operator at a time, and
            # `_backward` carries the gradients from one to the next.
            inputs.append(x.detach().requires_grad_())
        with torch.enable_grad():
            output = op.fn(*inputs)
        reduced = reduce_partial(output.detach(), partial_axes(op.writes, s), mesh)
        tape[op.name] = Recorded(inputs, output, reduced, spec(op.writes, s))
    return tape


def _backward(
    mesh: Mesh,
    graph: Graph,
    choice: Choice,
    tape: dict[str, Recorded],
    grad: Tensor,
) -> dict[str, tuple[Tensor, Spec]]:
    """The gradient of every leaf, and how it is cut."""
    # For each operator, one gradient from each of its readers, cut as its output is.
    arrived: dict[str, list[Tensor]] = defaultdict(list)
    last = graph[-1].name
    arrived[last].append(cut(grad, tape[last].spec, mesh))

    leaf_grads: dict[str, tuple[Tensor, Spec]] = {}
    for op in reversed(graph):
        s = choice[op.name]
        recorded = tape[op.name]
        # The all-reduce of the forward pass adds up copies: its gradient is the same
        # on every rank, and needs no communication.
        output_grad = sum(arrived[op.name])
        input_grads = torch.autograd.grad(recorded.output, recorded.inputs, output_grad)
        for name, dims, input_grad in zip(
            op.inputs, op.reads, input_grads, strict=True
        ):
            cut_as = spec(dims, s)
            input_grad = reduce_partial(input_grad, partial_axes(dims, s), mesh)
            if name in tape:
                # Back along the edge: from the reader's cut to the producer's.
                back = reshard(input_grad, cut_as, tape[name].spec, mesh)
                arrived[name].append(back)
            elif name in leaf_grads:
                # A leaf with several readers: its first cut is kept.
                known, first_cut = leaf_grads[name]
                more = reshard(input_grad, cut_as, first_cut, mesh)
                leaf_grads[name] = (known + more, first_cut)
            else:
                leaf_grads[name] = (input_grad, cut_as)
    return leaf_grads
