"""Counts the kernels that a function launches, and the bytes that they move.

PyTorch runs a function as a list of small operators. A `Counter` stands between Python
and them, and writes down each one that does work:

    launch     an operator that computes or copies; a view, as `transpose` or a slice,
               changes only how memory is read, and an `empty` only takes memory
    read       bytes of its tensors, each element once, however it is broadcast
    written    bytes of its new tensors, and of those that it changes in place

A kernel of another kind, as one in C, says itself what it reads and writes (`report`).

Simplified: every operator counts as one launch, which holds for those of a Llama layer;
a cache between the chip and the memory is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that take memory or a number, and launch nothing.
NO_WORK = {"empty", "empty_like", "empty_strided", "new_empty", "detach_", "item"}
NO_WORK |= {"_local_scalar_dense", "lift_fresh", "resolve_conj", "resolve_neg"}
# Operators that read only as much of their first tensor as they give.
GATHERS = {"embedding", "index", "index_select", "gather"}
# Operators in place that do not read what they write over.
OVERWRITES = {"copy_", "fill_", "zero_"}

COUNTING: ContextVar[Counter | None] = ContextVar("counting", default=None)


@dataclass(frozen=True)
class Launch:
    """One kernel: its name, its bytes, and the memory that it reads and makes."""

    name: str
    read: int
    written: int
    inputs: frozenset[int] = frozenset()  # storages
    outputs: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read + self.written


class Counter(TorchDispatchMode):
    """The launches made while it is on.

    It keeps all tensors that it has seen, so that no memory is given out twice: two
    storages with one number are one storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.kept: dict[int, Tensor] = {}
        self.result: frozenset[int] = frozenset()  # storages of what the function gave

    @property
    def bytes(self) -> int:
        """Of all launches."""
        return sum(launch.bytes for launch in self.launches)

    def __len__(self) -> int:
        return len(self.launches)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name not in NO_WORK and not name.startswith("sym_"):
            self._add(name, func._schema, args, kwargs, out)
        return out

    def _add(self, name: str, schema, args: tuple, kwargs: dict, out: Any) -> None:
        given = tensors((args, kwargs))
        changed = _changed(schema, args, kwargs)
        inside = {storage(x) for x in given}
        fresh = [x for x in tensors(out) if storage(x) not in inside]
        if not fresh and not changed:
            return  # a view
        read = list(given)
        if name in OVERWRITES or name in ("index_put_", "index_copy_"):
            read = [x for x in given if not any(x is y for y in changed)]
        if name in GATHERS:
            read = [*fresh, *given[1:]]
        written = [*fresh, *changed]
        if name in ("index_put_", "index_copy_"):
            written = read[-1:]
        self.add(name, read, written, given)

    def add(
        self,
        name: str,
        read: Sequence[Tensor],
        written: Sequence[Tensor],
        given: Sequence[Tensor] | None = None,
    ) -> None:
        """One launch; `given` are its inputs where they are not what it reads."""
        inputs = read if given is None else given
        for x in (*inputs, *written):
            self.kept.setdefault(storage(x), x)
        self.launches.append(
            Launch(
                name,
                sum(map(touched, read)),
                sum(map(touched, written)),
                frozenset(map(storage, inputs)),
                tuple(dict.fromkeys(map(storage, written))),
            )
        )


def count(function: Callable, *args, **kwargs) -> Counter:
    """The launches of function(*args, **kwargs), without a gradient.

    >>> x = torch.ones(4, 8)
    >>> counter = count(lambda: (x.T * 2).sum())
    >>> [(launch.name, launch.bytes) for launch in counter.launches]
    [('mul', 256), ('sum', 132)]
    """
    counter = Counter()
    # In inference mode an operator made of others would be seen as one.
    with torch.inference_mode(False), torch.no_grad():
        token = COUNTING.set(counter)
        try:
            with counter:
                out = function(*args, **kwargs)
        finally:
            COUNTING.reset(token)
    counter.result = frozenset(map(storage, tensors(out)))
    return counter


def report(
    name: str,
    read: Sequence[Tensor],
    written: Sequence[Tensor],
    changed: Sequence[Tensor] = (),
) -> None:
    """A kernel that PyTorch does not know tells the counter that is on, if one is.

    Args:
        changed: what of `written` was there before.
    """
    counter = COUNTING.get()
    if counter is not None:
        counter.add(name, read, written, (*read, *changed))


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def storage(x: Tensor) -> int:
    """A number for the memory that x lies in; its views have the same."""
    return x.untyped_storage()._cdata


def touched(x: Tensor) -> int:
    """Bytes that x covers: an element that is broadcast counts once.

    >>> touched(torch.ones(4, 1).expand(4, 100))
    16
    """
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        if stride != 0 or size == 0:
            elements *= size
    return elements * x.element_size()


def _changed(schema, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that an operator with this schema changes in place."""
    found = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += tensors(value)
    return found
