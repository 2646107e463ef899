"""What a layer keeps for its backward pass: counted from the running code, and as a
formula.

Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4 and table 2, in
bytes a layer:

    none                                     sbh (34 + 5as/h)
    tensor                                   sbh (10 + 24/t + 5as/(ht))
    tensor and sequence                      sbh (34 + 5as/h) / t
    … and selective recomputation            the same without the term in 5as/h
    full recomputation                       2 sbh

    s  tokens      b  batch      h  hidden size      a  heads   t  tensor-parallel ranks

Assumed there, and met by `recomputation.GPTLayer`: a block of GPT (LayerNorm, biases,
GELU, an MLP of 4h, three dropouts, attention scores kept), 16-bit activations, one byte
an element of a dropout mask; weights and the norms' means and variances (2sb numbers)
are not counted.

`Saved` counts what autograd saves, `Peak` what is alive at the same time. Both see the
tensors of their own thread only, so that in a `World` each rank counts for itself. On
the meta device, where tensors have shapes and no numbers, `Saved` counts a model of any
size.
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
    s, b, h, a = shape.s, shape.b, shape.h, shape.a
    # the share of what tensor parallelism leaves whole
    whole = 1 / t if sequence_parallel else 1.0
    if recompute == "full":
        return 2 * s * b * h * whole
    scores = 5 * a * s / h / t if recompute == "none" else 0.0
    return s * b * h * (10 * whole + 24 / t + scores)


def recompute_flops(shape: GPTShape) -> tuple[float, float]:
    """FLOPs of one layer, forward and backward: without recomputation, and what
    selective recomputation adds.

    Forward 24·bsh² + 4·bs²h, backward twice that (appendix A). Recomputed: the two
    products of attention, 4·bs²h, once.
    """
    s, b, h = shape.s, shape.b, shape.h
    return 3 * (24 * b * s * h**2 + 4 * b * s**2 * h), 4 * b * s**2 * h


def _storage(t: Tensor) -> int:
    """What two views of one memory have in common (on the meta device every data_ptr is
    0).
    """
    return t.untyped_storage()._cdata


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
        super().__init__(self._pack, lambda t: t)

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
        rows = self.tensors.values()
        return [
            (
                tuple(t.shape),
                str(t.dtype).removeprefix("torch."),
                t.untyped_storage().nbytes(),
            )
            for t in rows
        ]


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors made inside its `with` block: `now` alive, `peak` the
    most at any time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in old:
                self._made(t.untyped_storage())
        return out

    def _made(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size and address not in self._known:
            self._known[address] = weakref.finalize(storage, self._freed, address, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _freed(self, address: int, size: int) -> None:
        self._known.pop(address, None)
        self.now -= size
