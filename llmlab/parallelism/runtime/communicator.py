"""The communicator: the first argument of a rank function, at all three distances.

    def fn(comm, x):
        return comm.all_reduce(x)

    World(4).run(fn, x)    threads, every byte counted        (world.py)
    launch(fn, 4, x)       real processes over gloo           (launch.py)
    attach(fn, x)          one rank of torchrun, gloo or NCCL (torchrun.py)

Collectives return new tensors and leave their inputs alone. They do not record
gradients: a method that needs a gradient through communication says which (see
`llmlab.parallelism.tensor.megatron`: f and g). `async_op=True` returns a handle at
once; `handle.wait()` gives the result.
"""

from __future__ import annotations

import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from llmlab.parallelism.runtime.calls import REDUCTIONS, Call
from llmlab.parallelism.runtime.ledger import Event, Ledger

_HERE = {
    str(Path(__file__).with_name(f"{name}.py"))
    for name in ("communicator", "world", "process", "launch")
}


@runtime_checkable
class Handle(Protocol):
    """An operation under way."""

    def wait(self):
        """Block until it is done; return its result."""


class Communicator(ABC):
    """A group of ranks, seen from one of them.

    Attributes:
        rank: this rank's number in the group, 0 … size − 1.
        size: how many ranks the group has.
        ranks: the members' numbers in the whole world.
        device: where tensors must be.
        ledger: what this world (or this process) has sent so far.
    """

    rank: int
    size: int
    ranks: tuple[int, ...]
    ledger: Ledger
    device: torch.device = torch.device("cpu")

    def __deepcopy__(self, memo: dict) -> Communicator:
        return self  # a copy of a model talks over the same wire

    @abstractmethod
    def _start(self, call: Call) -> Handle:
        """Begin an operation."""

    @abstractmethod
    def split(self, color: int | None, key: int | None = None) -> Communicator | None:
        """Cut the group: ranks of one `color` form a new group, in the order of `key`
        (by default, of rank).

        All ranks must call it. A rank with color None joins no group and gets None.
        """

    def all_reduce(self, x: Tensor, op: str = "sum", *, async_op: bool = False):
        """The sum, mean, max or min over all ranks, of the shape of x, on every
        rank.
        """
        return self._do(
            Call("all_reduce", _tensor(x, "x"), reduction=_reduction(op, x)), async_op
        )

    def all_gather(self, x: Tensor, dim: int = 0, *, async_op: bool = False):
        """All ranks' x joined along `dim`, in rank order, on every rank.

        Lengths along `dim` may differ.
        """
        return self._do(Call("all_gather", _tensor(x, "x"), dim=_dim(dim, x)), async_op)

    def reduce_scatter(
        self, x: Tensor, dim: int = 0, op: str = "sum", *, async_op: bool = False
    ):
        """Piece number `rank`, along `dim`, of the reduction over all ranks.

        Raises:
            ValueError: x.shape[dim] is not a multiple of the number of ranks (pad it).
        """
        _tensor(x, "x")
        if x.dim() == 0 or x.shape[_dim(dim, x)] % self.size:
            raise ValueError(
                f"x.shape={tuple(x.shape)}: dimension {dim} must be a multiple of the"
                f" {self.size} ranks; pad it"
            )
        call = Call("reduce_scatter", x, reduction=_reduction(op, x), dim=_dim(dim, x))
        return self._do(call, async_op)

    def broadcast(self, x: Tensor, src: int = 0, *, async_op: bool = False):
        """The tensor of rank `src` on every rank.

        The others bring a tensor of the same shape and dtype.
        """
        return self._do(
            Call("broadcast", _tensor(x, "x"), root=self._member(src, "src")), async_op
        )

    def reduce(self, x: Tensor, dst: int = 0, op: str = "sum"):
        """The reduction over all ranks on rank `dst`; None elsewhere."""
        return self._do(
            Call(
                "reduce",
                _tensor(x, "x"),
                root=self._member(dst, "dst"),
                reduction=_reduction(op, x),
            )
        )

    def gather(self, x: Tensor, dst: int = 0) -> list[Tensor] | None:
        """The list of all ranks' x, of one shape, on rank `dst`; None elsewhere."""
        return self._do(Call("gather", _tensor(x, "x"), root=self._member(dst, "dst")))

    def scatter(self, xs: Sequence[Tensor] | None, src: int = 0) -> Tensor:
        """Tensor number `rank` of the list that rank `src` brings.

        The others bring None.
        """
        root = self._member(src, "src")
        return self._do(
            Call(
                "scatter", self._one_each(xs) if self.rank == root else None, root=root
            )
        )

    def all_to_all(self, xs: Sequence[Tensor], *, async_op: bool = False):
        """A tensor to each rank, a tensor from each rank.

        Lengths along dimension 0 may differ, the rest may not.
        """
        return self._do(Call("all_to_all", self._one_each(xs)), async_op)

    def barrier(self) -> None:
        """Wait until all ranks have come here."""
        self._do(Call("barrier"))

    def isend(self, x: Tensor, dst: int, tag: int = 0) -> Handle:
        """Offer x to rank `dst` and go on; do not change x before `wait()` returns."""
        return self._start(
            Call(
                "send",
                _tensor(x, "x").detach(),
                root=self._other(dst, "dst"),
                tag=tag,
                site=call_site(),
            )
        )

    def irecv(self, src: int, tag: int = 0) -> Handle:
        """Ask for a tensor of rank `src` and go on; `wait()` returns it.

        The sender decides shape and dtype.
        """
        return self._start(
            Call("recv", root=self._other(src, "src"), tag=tag, site=call_site())
        )

    def send(self, x: Tensor, dst: int, tag: int = 0) -> None:
        """Send x to rank `dst`, and wait until it is received (as gloo and NCCL do for
        large tensors).
        """
        self.isend(x, dst, tag).wait()

    def recv(self, src: int, tag: int = 0) -> Tensor:
        """The next tensor that rank `src` sends here under `tag`."""
        return self.irecv(src, tag).wait()

    def sendrecv(self, x: Tensor, dst: int, src: int, tag: int = 0) -> Tensor:
        """Send x to `dst` while receiving from `src`: the shift of a ring, which two
        blocking calls would deadlock.
        """
        if dst == src == self.rank:
            return x.detach().clone()
        incoming, outgoing = self.irecv(src, tag), self.isend(x, dst, tag)
        received = incoming.wait()
        outgoing.wait()
        return received

    def group(self, ranks: Sequence[int]) -> Communicator | None:
        """A communicator of these ranks of this group, in this order; None on the
        others. All ranks must call it.
        """
        members = [self._member(r, "ranks") for r in ranks]
        inside = self.rank in members
        return self.split(
            0 if inside else None, members.index(self.rank) if inside else None
        )

    def mesh(self, *shape: int) -> Mesh:
        """The ranks as a grid, the last axis fastest: `comm.mesh(2, 4)`.

        All ranks must call it.

        Raises:
            ValueError: the shape's product is not the number of ranks.
        """
        if math.prod(shape) != self.size:
            raise ValueError(
                f"shape={shape} has {math.prod(shape)} places; this group has"
                f" {self.size} ranks"
            )
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        coords = [
            self.rank // stride % side
            for stride, side in zip(strides, shape, strict=True)
        ]
        axes = [
            self.split(self.rank - c * s, c)
            for c, s in zip(coords, strides, strict=True)
        ]
        return Mesh(tuple(shape), tuple(coords), tuple(axes), self)

    def work(self, seconds: float, label: str = "") -> None:
        """Say that this rank computes for so long: it moves the ledger's clock (no
        waiting is done).
        """
        self.ledger.add(
            Event(
                self.ranks[self.rank],
                "work",
                self.ranks,
                0,
                0,
                end=seconds,
                label=label,
            )
        )

    def _do(self, call: Call, async_op: bool = False):
        call = Call(
            call.op,
            _detached(call.value),
            call.root,
            call.reduction,
            call.dim,
            call_site(),
            call.tag,
        )
        handle = self._start(call)
        return handle if async_op else handle.wait()

    def _member(self, rank: int, name: str) -> int:
        if not 0 <= rank < self.size:
            raise ValueError(
                f"{name}={rank} must be one of the group's {self.size} ranks, 0 …"
                f" {self.size - 1}"
            )
        return rank

    def _other(self, rank: int, name: str) -> int:
        if self._member(rank, name) == self.rank:
            raise ValueError(
                f"{name}={rank} is this rank itself; a message goes to another rank"
            )
        return rank

    def _one_each(self, xs) -> list[Tensor]:
        if (
            xs is None
            or len(xs) != self.size
            or not all(isinstance(x, Tensor) for x in xs)
        ):
            said = "None" if xs is None else f"{len(xs)} items"
            raise ValueError(
                f"xs must be a list of {self.size} tensors, one for each rank, not"
                f" {said}"
            )
        return list(xs)


@dataclass(frozen=True)
class Mesh:
    """Ranks on a grid.

    `axes[i]` is the group along axis i: the ranks that differ from this one in
    coordinate i only.
    """

    shape: tuple[int, ...]
    coords: tuple[int, ...]
    axes: tuple[Communicator, ...]
    comm: Communicator


def call_site() -> str:
    """The nearest line outside the communicators: 'cell:12 in fn' in a notebook,
    'tensor.py:80 in forward' elsewhere.
    """
    frame = sys._getframe(1)
    while frame.f_code.co_filename in _HERE or frame.f_code.co_filename.startswith(
        "<@"
    ):  # <@…>: a type checker's wrapper
        frame = frame.f_back
    name = frame.f_code.co_filename
    where = (
        "cell"
        if "ipykernel_" in name or name.startswith("<ipython")
        else os.path.basename(name)
    )
    return f"{where}:{frame.f_lineno} in {frame.f_code.co_name}"


def _detached(value):
    if isinstance(value, Tensor):
        return value.detach()
    return [x.detach() for x in value] if isinstance(value, list) else value


def _tensor(x, name: str) -> Tensor:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(x).__name__}")
    return x


def _reduction(op: str, x: Tensor) -> str:
    if op not in REDUCTIONS:
        raise ValueError(f"op={op!r} must be one of {', '.join(REDUCTIONS)}")
    if op == "mean" and not x.is_floating_point():
        raise ValueError(f"op='mean' needs floating-point tensors, not {x.dtype}")
    return op


def _dim(dim: int, x: Tensor) -> int:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(
            f"dim={dim} must be a dimension of a tensor of shape {tuple(x.shape)}"
        )
    return dim % x.dim()
