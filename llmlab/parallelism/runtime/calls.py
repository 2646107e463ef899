"""What each collective means, as a pure function of the inputs of all ranks.

No ring and no wire here: this is the specification. `World` computes with it, gloo is
tested against it, and the order of every reduction is fixed (rank 0 first), so that a
result never depends on timing.

    xs    the p inputs, in rank order
    root  the rank that gives or receives
    dim   the dimension that is cut or joined
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce as fold

import torch
from torch import Tensor

from llmlab.parallelism.runtime.cost import chunks

REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "mean": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}


@dataclass(frozen=True)
class Call:
    """One rank's side of one operation: what it asks for, with what, and from which
    line.
    """

    op: str
    value: object = None  # a tensor; a list of tensors for scatter and all_to_all
    root: int | None = None
    reduction: str | None = None
    dim: int = 0
    site: str = ""
    tag: int = 0

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors brought, none for a barrier or a scatter's receiver."""
        if isinstance(self.value, Tensor):
            return [self.value]
        return (
            [t for t in self.value or () if isinstance(t, Tensor)]
            if isinstance(self.value, list | tuple)
            else []
        )

    def __str__(self) -> str:
        said = [
            f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"
            for t in self.tensors[:1]
        ]
        said += [f"op={self.reduction!r}"] if self.reduction else []
        said += [f"root={self.root}"] if self.root is not None else []
        return f"{self.op}({', '.join(said)})"


def reduced(xs: Sequence[Tensor], op: str) -> Tensor:
    """The sum, mean, max or min of p tensors, taken in rank order."""
    total = fold(REDUCTIONS[op], xs)
    return total / len(xs) if op == "mean" else total


def _for_root(result, root: int, p: int) -> list:
    return [result if r == root else None for r in range(p)]


def all_reduce(xs, call: Call) -> list:
    """Everybody gets the reduction of all."""
    total = reduced(xs, call.reduction)
    return [total.clone() for _ in xs]


def reduce(xs, call: Call) -> list:
    """The root alone gets the reduction of all."""
    return _for_root(reduced(xs, call.reduction).clone(), call.root, len(xs))


def broadcast(xs, call: Call) -> list:
    """Everybody gets the root's tensor."""
    return [xs[call.root].clone() for _ in xs]


def all_gather(xs, call: Call) -> list:
    """Everybody gets all tensors, joined along `dim`."""
    return [torch.cat(list(xs), dim=call.dim) for _ in xs]


def gather(xs, call: Call) -> list:
    """The root alone gets the list of all tensors."""
    return _for_root([x.clone() for x in xs], call.root, len(xs))


def scatter(xs, call: Call) -> list:
    """Rank r gets the r-th tensor of the root's list."""
    return [part.clone() for part in xs[call.root]]


def reduce_scatter(xs, call: Call) -> list:
    """Rank r gets the r-th piece, along `dim`, of the reduction of all."""
    return [
        part.clone()
        for part in reduced(xs, call.reduction).chunk(len(xs), dim=call.dim)
    ]


def all_to_all(xs, call: Call) -> list:
    """Rank r gets the r-th tensor of everybody's list: a transpose of the table of
    tensors.
    """
    return [[row[r].clone() for row in xs] for r in range(len(xs))]


def barrier(xs, call: Call) -> list:
    """Nobody goes on before all have come."""
    return [None for _ in xs]


MEANING = {
    f.__name__: f
    for f in (
        all_reduce,
        reduce,
        broadcast,
        all_gather,
        gather,
        scatter,
        reduce_scatter,
        all_to_all,
        barrier,
    )
}


def wire_sizes(call: Call, xs: Sequence, rank: int) -> list[int]:
    """The p sizes in bytes that `cost.sent` asks for: how this collective's tensor
    falls into pieces.
    """
    p = len(xs)
    nbytes = lambda t: t.numel() * t.element_size()  # noqa: E731
    match call.op:
        case "barrier":
            return [0] * p
        case "all_gather" | "gather":
            return [nbytes(x) for x in xs]
        case "scatter":
            return [nbytes(x) for x in xs[call.root]]
        case "all_to_all":
            return [nbytes(x) for x in xs[rank]]
    return [c * xs[0].element_size() for c in chunks(xs[0].numel(), p)]


def disagreement(mine: Call, first: Call) -> str | None:
    """Why two ranks' calls cannot be the same collective, or None."""
    for what in ("op", "reduction", "root", "dim"):
        if getattr(mine, what) != getattr(first, what):
            return {
                "op": "different operations",
                "reduction": "different reductions",
            }.get(what, f"different {what}")
    if mine.op == "scatter" or not mine.tensors or not first.tensors:
        return None
    a, b = mine.tensors[0], first.tensors[0]
    if a.dtype != b.dtype:
        return "different dtypes"
    if mine.op == "all_to_all":
        return None
    drop = lambda t: [s for i, s in enumerate(t.shape) if i != call_dim]  # noqa: E731
    call_dim = mine.dim % a.dim() if mine.op == "all_gather" and a.dim() else None
    return None if a.dim() == b.dim() and drop(a) == drop(b) else "different shapes"
