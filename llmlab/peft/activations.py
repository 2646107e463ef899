"""What a backward pass keeps alive: the bytes that autograd saves, without weights.

PyTorch hands every tensor that an operation saves for its backward pass to
`torch.autograd.graph.saved_tensors_hooks`. Two operations that save the same memory, or
views of it, count once. On the meta device nothing is computed and nothing allocated,
and the same tensors are counted: so a model of any size can be measured on a laptop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Saved:
    """The memory that was saved, by storage, held alive until the count is read."""

    storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Sum over distinct storages."""
        return sum(storage.nbytes() for storage in self.storages.values())


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[Saved]:
    """Inside, count what operations save for the backward pass.

    Parameters and buffers of `model` are not activations. Below, the input is saved,
    2 × 3 numbers of 4 bytes, since the gradient of the weight needs it.

    >>> linear = nn.Linear(3, 5)
    >>> with saved_for_backward(linear) as saved:
    ...     out = linear(torch.ones(2, 3))
    >>> saved.bytes
    24
    """
    saved = Saved()
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved.storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        log_sum_exp = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        return out


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention for counting on the meta device; it computes nothing.

    It saves what a fused kernel does (Dao et al. 2022,
    https://arxiv.org/abs/2205.14135): q, k, v, the output and one log-sum-exp per
    query. PyTorch itself falls back, on that device, to attention that saves a T × T
    matrix for each head.

    Raises:
        ValueError: tensors that hold numbers.
    """
    if q.device.type != "meta":
        raise ValueError(
            f"q is on {q.device.type}: fused_attention only counts, on the meta device"
        )
    return _Fused.apply(q, k, v)
