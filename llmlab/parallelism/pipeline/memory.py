"""Counts the bytes of the activations that a rank holds for its backward passes, with
saved-tensor hooks.

`torch.autograd.graph.saved_tensors_hooks` shows every tensor that autograd keeps, when
it keeps it and when it lets go. A storage that several ops keep (q, k and v have one
input) counts once; parameters, which are there anyway, count not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class _Held:
    """A tensor that is kept; the meter is told when it is let go."""

    def __init__(self, meter: ActivationMeter, tensor: Tensor) -> None:
        # detached: an op that keeps its own output would hold itself
        self.meter, self.tensor = meter, tensor.detach()
        meter._count(self.tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.meter._count(self.tensor.untyped_storage(), -1)


class ActivationMeter:
    """`with meter:` around a forward pass counts what it keeps. `now` and `peak` are
    bytes.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.now = self.peak = 0
        self._not_counted = {p.untyped_storage().data_ptr() for p in parameters}
        self._users: Counter[int] = Counter()
        self._hooks: list = []

    def hold(self, tensor: Tensor) -> _Held:
        """Count a tensor until the result is deleted."""
        return _Held(self, tensor)

    def __enter__(self) -> ActivationMeter:
        self._hooks.append(
            torch.autograd.graph.saved_tensors_hooks(
                self.hold, lambda held: held.tensor
            )
        )
        self._hooks[-1].__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.pop().__exit__(*error)

    def _count(self, storage: torch.UntypedStorage, users: int) -> None:
        key = storage.data_ptr()
        if key in self._not_counted:
            return
        before, self._users[key] = self._users[key], self._users[key] + users
        # the first user has come, or the last has gone
        if min(before, self._users[key]) == 0:
            self.now += users * storage.nbytes()
            self.peak = max(self.peak, self.now)
        if not self._users[key]:
            del self._users[key]
