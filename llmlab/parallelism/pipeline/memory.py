"""Counts the bytes of the activations that a rank keeps for its backward passes.

`torch.autograd.graph.saved_tensors_hooks` shows every tensor that autograd saves: one
hook runs when it is saved, and what that hook returns is deleted when autograd frees
the tensor.

A storage that several ops save counts once: q, k and v, say, have one input. Parameters
do not count: they are there anyway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class SavedTensor:
    """A tensor that is kept. The meter counts it until this object is deleted."""

    def __init__(self, meter: ActivationMeter, tensor: Tensor) -> None:
        self.meter = meter
        # detached: an op that saves its own output would otherwise keep itself alive
        self.tensor = tensor.detach()
        meter.add_user(self.tensor.untyped_storage())

    def __del__(self) -> None:
        self.meter.remove_user(self.tensor.untyped_storage())


class ActivationMeter:
    """`with meter:` around a forward pass counts what it keeps.

    Attributes:
        now: bytes that are kept at this moment.
        peak: the most bytes that were ever kept.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.now = 0
        self.peak = 0
        self._not_counted = {p.untyped_storage().data_ptr() for p in parameters}
        self._users: Counter[int] = Counter()  # address of a storage → who keeps it
        self._hooks: list = []

    def hold(self, tensor: Tensor) -> SavedTensor:
        """Count a tensor until the result is deleted."""
        return SavedTensor(self, tensor)

    def __enter__(self) -> ActivationMeter:
        hooks = torch.autograd.graph.saved_tensors_hooks(self.hold, _tensor_of)
        hooks.__enter__()
        self._hooks.append(hooks)
        return self

    def __exit__(self, *error) -> None:
        self._hooks.pop().__exit__(*error)

    def add_user(self, storage: torch.UntypedStorage) -> None:
        """One more keeps this storage. Only the first adds its bytes."""
        address = storage.data_ptr()
        if address in self._not_counted:
            return
        self._users[address] += 1
        if self._users[address] == 1:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def remove_user(self, storage: torch.UntypedStorage) -> None:
        """One less keeps this storage. The last takes its bytes away."""
        address = storage.data_ptr()
        if address in self._not_counted:
            return
        self._users[address] -= 1
        if self._users[address] == 0:
            self.now -= storage.nbytes()
            del self._users[address]


def _tensor_of(saved: SavedTensor) -> Tensor:
    return saved.tensor
