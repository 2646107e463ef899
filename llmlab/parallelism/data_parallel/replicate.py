"""The older way, `torch.nn.DataParallel`: one rank owns the model and the batch.

In each step it sends copies of both to the others.

    replicate   the weights, to everybody            Ψ numbers to each of p − 1 ranks
    scatter     the batch, a piece to each
    gather      the outputs, on the owner, who computes the loss
    scatter     the loss's gradient at the outputs, a piece to each
    reduce      the gradients of the weights, to the owner, who alone has an optimizer

    p  ranks      Ψ  parameters      rank 0 is the owner

`torch.nn.DataParallel` does this with threads of one process and copies between its
GPUs. Here the ranks are those of a communicator, so that the ledger counts what
travels. Count with `World(p, algorithm="naive")`: copies go straight from the owner.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmlab.parallelism.runtime import Communicator


def replicate_step(
    comm: Communicator,
    model: nn.Module,
    x: Tensor | None,
    y: Tensor | None,
    loss_of: Callable[[Tensor, Tensor], Tensor],
) -> float | None:
    """Gradients of `loss_of(model(x), y)` in the owner's `.grad`.

    Returns the loss on the owner, None elsewhere.

    Args:
        model: the same shapes on every rank; the others' values are overwritten by the
            owner's.
        x, y: the whole batch on the owner (at least p rows), None elsewhere.
    """
    is_owner = comm.rank == 0
    replicate(model, comm)
    pieces = _pieces(x, comm.size) if is_owner else None
    output = model(comm.scatter(pieces))
    outputs = _collect(comm, output.detach())

    output_grads = None
    if is_owner:
        outputs.requires_grad_()
        loss = loss_of(outputs, y)
        loss.backward()
        output_grads = _pieces(outputs.grad, comm.size)
    output.backward(comm.scatter(output_grads))

    for w in model.parameters():
        if w.requires_grad:
            # A sum, not a mean: the loss was taken over the whole batch.
            total = comm.reduce(w.grad)
            w.grad = total if is_owner else None
    return loss.item() if is_owner else None


@torch.no_grad()
def replicate(model: nn.Module, comm: Communicator) -> None:
    """The owner's weights on every rank, one by one."""
    for w in model.parameters():
        w.copy_(comm.broadcast(w))


def _pieces(batch: Tensor, p: int) -> list[Tensor]:
    """p pieces along the batch; they may differ by one row."""
    return [piece.contiguous() for piece in batch.tensor_split(p)]


def _collect(comm: Communicator, output: Tensor) -> Tensor | None:
    """All outputs on the owner, joined along the batch; None elsewhere."""
    if comm.rank != 0:
        comm.send(output, 0)
        return None
    outputs = [output]
    for rank in range(1, comm.size):
        outputs.append(comm.recv(rank))
    return torch.cat(outputs)
