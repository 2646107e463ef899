"""What checks of this part share: answers that run on a `World`, and their messages."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from operator import eq

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmlab.course.grading.checking import Mistake, close
from llmlab.parallelism.runtime import CollectiveMismatch, DeadlockError, Ledger, World


def on_ranks(p: int, fn: Callable) -> tuple[list, Ledger]:
    """Every rank's result of `fn(comm)`, and the ledger.

    Ranks that do not fit together are a Mistake.
    """
    world = World(p)
    try:
        return world.run(fn), world.ledger
    except (DeadlockError, CollectiveMismatch) as error:
        raise Mistake(f"the ranks do not fit together\n{error}") from None


def at_most(ledger: Ledger, allowed: float, cure: str, unit: str = "numbers") -> None:
    """No rank may have sent more than `allowed` numbers, of whatever dtype, or bytes.

    Args:
        cure: how to do with less.
        unit: "numbers" or "bytes", as the exercise's text counts.
    """
    sent = ledger.per_rank() if unit == "bytes" else numbers_per_rank(ledger)
    worst = max(sent)
    if worst > allowed * (1 + 1e-9):
        raise Mistake(
            f"the values are right, but a rank sends {worst:.0f} {unit} where"
            f" {allowed:.0f} are enough: {cure}"
        )


def numbers_per_rank(ledger: Ledger) -> list[float]:
    """How many numbers each rank sent: its bytes over the size of their dtype."""
    sent = [0.0] * ledger.size
    for event in ledger:
        numbers = math.prod(event.shape)
        size = event.payload / numbers if numbers else 0
        # a list of tensors has no single size: float32
        sent[event.rank] += event.bytes / (size if size in (1, 2, 4, 8) else 4)
    return sent


class Received:
    """A communicator that counts how much of what came is kept at a time.

    `most`: the most tensors that were alive at once, of those that `operations`
    returned; `most_numbers`: the most numbers in them.
    """

    def __init__(self, comm, *operations: str) -> None:
        self._comm = comm
        self._operations = operations
        self._alive: list[weakref.ref] = []
        self.most = 0
        self.most_numbers = 0

    def __getattr__(self, name: str):
        found = getattr(self._comm, name)
        if name not in self._operations:
            return found

        def watched(*args, **kwargs):
            out = found(*args, **kwargs)
            if isinstance(out, Tensor):
                self._count(out)
            return out

        # under such a name the report of a deadlock passes over this function, to the
        # learner's own line
        watched.__code__ = watched.__code__.replace(co_filename="<@received>")
        return watched

    def _count(self, new: Tensor) -> None:
        tensors = [ref() for ref in self._alive]
        tensors = [t for t in tensors if t is not None and t is not new]
        # a view keeps the tensor that it is a view of
        self._alive = [weakref.ref(t) for t in (*tensors, new)]
        self.most = max(self.most, len(self._alive))
        numbers = sum(t.numel() for t in (*tensors, new))
        self.most_numbers = max(self.most_numbers, numbers)


def explained(
    found: list[tuple], mistakes: dict[str, Callable], same: Callable = eq
) -> None:
    """A Mistake when one explains every result: in one case, several would.

    Args:
        found: (arguments, what the answer returned), case by case.
        mistakes: diagnosis → what it returns for such arguments.
        same: whether two results are equal.
    """
    for text, wrong in mistakes.items():
        if all(same(got, wrong(*args)) for args, got in found):
            raise Mistake(text)


def either(got, *values, tol: float = 1e-4):
    """The value that `got` is close to, for a mistake that can come out in more than
    one way.
    """
    return next((v for v in values if close(got, v, tol)), values[0])


# op → its argument before the product sign
_FACTORS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "mv": 0, "dot": 0}


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products in its `with` block, those of
    einsum and of autograd's backward too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # nothing is compiled here; True would import the compiler, for seconds
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        left = _FACTORS.get(func.overloadpacket.__name__)
        if left is not None:
            self.total += out.numel() * args[left].shape[-1]
        return out
