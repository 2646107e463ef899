"""What a benchmark is: two ways to do the same work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Case:
    """Two sides that do the same work on the same data.

    Each call of `ours` or `theirs` is one measurement.

    Args:
        rounds: how often each is called, in turn.
        models: our model and theirs, where the memory of a training step is to be
            counted.
        beside: the tensors that a step of theirs holds outside of their model.
        ranks: run `ours` and `theirs` in that many processes. They are then functions
            of the communicator that return the step.
    """

    name: str
    ours: Callable
    theirs: Callable
    rounds: int = 15
    models: tuple[nn.Module, nn.Module] | None = None
    beside: Callable[[], Iterable[torch.Tensor]] = tuple
    ranks: int | None = None

    def memory(self) -> tuple[int, int] | None:
        """`step_bytes` of ours and of theirs; takes a step with each."""
        if self.models is None:
            return None
        our_model, their_model = self.models
        mine = step_bytes(our_model, self.ours)
        library = step_bytes(their_model, self.theirs)
        return mine, library + sum(tensor.nbytes for tensor in self.beside())


def alternate(
    ours: Callable, theirs: Callable, rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of each call of ours and of theirs, in turn.

    One call of each comes before, and is not counted.
    """
    # the first calls fill allocators and caches, and import what is imported late
    ours()
    theirs()
    our_times: list[float] = []
    their_times: list[float] = []
    for i in range(rounds):
        order = [(theirs, their_times), (ours, our_times)]
        if i % 2:  # who comes first changes from round to round
            order.reverse()
        for call, times in order:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    return our_times, their_times


def step_bytes(model: nn.Module, step: Callable[[], object]) -> int:
    """Bytes that a training step with AdamW holds.

    Weights, what forward keeps for backward, gradients, and two moments.

    Counted, not measured: each storage once, so that it is the same in every run.
    """
    kept: dict[int, int] = {}  # the storage's address → its bytes

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    for tensor in (*model.parameters(), *model.buffers()):
        pack(tensor)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    trained = 0
    for p in model.parameters():
        if p.requires_grad:
            trained += p.numel() * p.element_size()
    return sum(kept.values()) + 3 * trained
