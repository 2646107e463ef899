"""What a layer keeps for its backward pass: counted in the running code, and a formula.

Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4 and table 2, in
bytes per layer:

    none                                     sbh (34 + 5as/h)
    tensor                                   sbh (10 + 24/t + 5as/(ht))
    tensor and sequence                      sbh (34 + 5as/h) / t
    … and selective recomputation            the same without the term in 5as/h
    full recomputation                       2 sbh

The paper assumes a block of GPT (LayerNorm, biases, GELU, an MLP of 4h, three dropouts,
attention scores kept), 16-bit activations, and one byte per element of a dropout mask.
Weights and the norms' means and variances (2sb numbers) are not counted.
`recomputation.GPTLayer` is such a block.

`Saved` counts what autograd saves, `Peak` what is alive at the same time. Both see the
tensors of their own thread only, so that in a `World` each rank counts for itself. On
the meta device, where tensors have shapes and no numbers, `Saved` counts a model of any
size.

    s  tokens
    b  batch
    h  hidden size
    a  heads
    t  tensor-parallel ranks
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class GPTShape:
    """One layer of a GPT: s tokens, batch b, hidden size h, a heads."""

    s: int
    b: int
    h: int
    a: int

    def __post_init__(self) -> None:
        if self.h % self.a:
            raise ValueError(f"h={self.h} must be a multiple of a={self.a} heads")


def layer_bytes(
    shape: GPTShape,
    t: int = 1,
    *,
    sequence_parallel: bool = False,
    recompute: str = "none",
) -> float:
    """Table 2 of the paper: bytes that one layer keeps on each of t ranks.

    Raises:
        ValueError: an unknown kind of recomputation.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(
            f"recompute={recompute!r} must be one of {', '.join(RECOMPUTE)}"
        )
    sbh = shape.s * shape.b * shape.h
    # a rank's share of what tensor parallelism alone leaves whole
    outside_share = 1 / t if sequence_parallel else 1.0
    if recompute == "full":
        return 2 * sbh * outside_share
    scores = 0.0
    if recompute == "none":
        scores = 5 * shape.a * shape.s / shape.h / t
    return sbh * (10 * outside_share + 24 / t + scores)


def recompute_flops(shape: GPTShape) -> tuple[float, float]:
    """FLOPs of one layer, forward and backward, and what recomputation adds to them.

    Forward 24·bsh² + 4·bs²h, backward twice that (appendix A). Selective recomputation
    computes the two products of attention, 4·bs²h, once more.

    Returns:
        FLOPs without recomputation, and those that are added.
    """
    s = shape.s
    b = shape.b
    h = shape.h
    attention_products = 4 * b * s**2 * h
    forward = 24 * b * s * h**2 + attention_products
    return 3 * forward, attention_products


def _storage(t: Tensor) -> int:
    """An identity that two views of one memory share.

    Not data_ptr: on the meta device every data_ptr is 0.
    """
    return t.untyped_storage()._cdata


def _unchanged(t: Tensor) -> Tensor:
    return t


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd saves inside its `with` block, each storage once.

    >>> x = torch.ones(3, requires_grad=True)
    >>> with Saved() as saved:
    ...     y = x.exp()
    >>> saved.bytes
    12

    Args:
        ignore: tensors that do not count (the parameters).
    """

    def __init__(self, ignore: Iterable[Tensor] = ()) -> None:
        self._ignored = {_storage(t) for t in ignore}
        # by storage; holding them keeps their addresses from being used again
        self.tensors: dict[int, Tensor] = {}
        super().__init__(self._pack, _unchanged)

    def __enter__(self) -> Saved:
        super().__enter__()
        return self

    def _pack(self, t: Tensor) -> Tensor:
        if _storage(t) not in self._ignored:
            self.tensors.setdefault(_storage(t), t.detach())
        return t

    @property
    def bytes(self) -> int:
        """All that is saved."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors.values())

    @property
    def kinds(self) -> list[tuple[tuple[int, ...], str, int]]:
        """(shape, dtype, bytes) of each saved storage, in the order of saving."""
        rows = []
        for t in self.tensors.values():
            dtype = str(t.dtype).removeprefix("torch.")
            rows.append((tuple(t.shape), dtype, t.untyped_storage().nbytes()))
        return rows


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside its `with` block.

    `now` is what is alive, `peak` the most at any time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # a view of an argument, or an argument changed in place, is no new memory
        inputs = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in inputs:
                self._count_new(t.untyped_storage())
        return out

    def _count_new(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        size = storage.nbytes()
        if not size or address in self._known:
            return
        self._known[address] = weakref.finalize(
            storage, self._count_freed, address, size
        )
        self.now += size
        self.peak = max(self.peak, self.now)

    def _count_freed(self, address: int, size: int) -> None:
        self._known.pop(address, None)
        self.now -= size
