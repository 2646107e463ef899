"""What a benchmark is: two ways to do the same work."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Case:
    """`ours` and `theirs` do the same work on the same data; each call is one
    measurement.

    Args:
        rounds: how often each is called, in turn.
        models: our model and theirs, where the memory of a training step is to be
            counted.
        ranks: run `ours` and `theirs` in that many processes. They are then functions
            of the communicator that return the step.
    """

    name: str
    ours: Callable
    theirs: Callable
    rounds: int = 15
    models: tuple[nn.Module, nn.Module] | None = None
    ranks: int | None = None

    def memory(self) -> tuple[int, int] | None:
        """`step_bytes` of ours and of theirs; takes a step with each."""
        return self.models and (
            step_bytes(self.models[0], self.ours),
            step_bytes(self.models[1], self.theirs),
        )


def alternate(
    ours: Callable, theirs: Callable, rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of each call of ours and of theirs, after one call of each that is not
    counted.
    """
    ours(), theirs()  # allocators, caches, lazy imports
    spent: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        for call, times in ((ours, spent[0]), (theirs, spent[1]))[
            :: 1 if i % 2 else -1
        ]:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    return spent


def step_bytes(model: nn.Module, step: Callable[[], object]) -> int:
    """Bytes that a training step with AdamW holds: weights, what forward keeps for
    backward, gradients, two moments.

    Counted, not measured: each storage once, so that it is the same in every run.
    """
    kept = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*model.parameters(), *model.buffers())
    }

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values()) + 3 * sum(
        p.numel() * p.element_size() for p in model.parameters() if p.requires_grad
    )
