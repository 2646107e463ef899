"""What an answer asks torch to do: how often, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llmlab.course.grading.checking import Mistake

ELSEWHERE = ("numpy", "__array__", "tolist")
PRODUCTS = ("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "einsum")


class Operations(TorchFunctionMode):
    """Writes down each call of torch in its `with` block: its name and result's shape.

    A dispatch mode would see more, and takes seconds at its first use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[str, tuple[int, ...]]] = []
        # whether two tensors of whole numbers met, or one left torch: to NumPy, say
        self.integers = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        shape = tuple(out.shape) if isinstance(out, Tensor) else ()
        name = getattr(func, "__name__", "")
        self.done.append((name, shape))
        whole = [a for a in args if isinstance(a, Tensor) and _is_whole(a)]
        left = len(whole) == 1 and name in ELSEWHERE
        self.integers = self.integers or len(whole) > 1 or left
        return out

    def called(self, name: str) -> bool:
        """Whether a function whose name holds `name` was called."""
        return any(name in done for done, _ in self.done)


def _is_whole(t: Tensor) -> bool:
    """Whether a tensor of several numbers holds whole ones alone."""
    if t.numel() < 2 or t.dtype == torch.bool:
        return False
    return not t.is_floating_point() or bool((t == t.round()).all())


def no_loop(answer: Callable, few: tuple[Any, ...], many: tuple[Any, ...]) -> None:
    """A Mistake when `answer` does more operations for more rows."""
    counts = []
    for args in (few, many):
        with Operations() as seen:
            answer(*args)
        counts.append(len(seen.done))
    if counts[1] > counts[0]:
        raise Mistake(
            "the values are right, but there is a loop over rows: for a batch of"
            f" {len(few[0])} torch is called {counts[0]} times, for one of"
            f" {len(many[0])} {counts[1]} times. Let indexing and broadcasting do it"
        )


def not_built(seen: Operations, shape: tuple[int, int], name: str) -> None:
    """A Mistake when a product of `shape`, or its transpose, was computed."""
    for operation, made in seen.done:
        if operation in PRODUCTS and sorted(made) == sorted(shape):
            raise Mistake(
                f"the values are right, but {name} is built, a matrix of"
                f" {shape[0]} × {shape[1]}: go through the narrow middle, x first"
            )
