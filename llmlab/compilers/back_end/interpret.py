"""What a program means: every element read and written in Python, one at a time.

Slow, and the judge of everything else. An index outside of its array is an error, and
so is a number that nobody has written. Where a loop says that its iterations may run in
any order, they run in a random one; where they are lanes, each statement is done for
all of them before the next.
"""

from __future__ import annotations

import itertools
import math
import operator
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llmlab.compilers.back_end.ir import (
    Binary,
    Buffer,
    Codes,
    Dot,
    Expr,
    Load,
    Loop,
    Node,
    Number,
    Pair,
    Program,
    Store,
    Unary,
)


class OutOfBounds(IndexError):
    """An element that does not exist was touched."""


class NotWritten(RuntimeError):
    """An element was read before it was written."""


UNARY = {
    "neg": lambda x: -x,
    "exp": lambda x: math.exp(min(x, 700.0)),
    "tanh": math.tanh,
    "sqrt": lambda x: math.sqrt(x) if x >= 0 else math.nan,
    "float": float,
}
BINARY = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: float(np.divide(a, b)),  # by 0, it is ∞ or NaN
    "max": lambda a, b: a if a > b or a != a else b,  # a NaN stays one
}


def run(program: Program, *inputs: Tensor, seed: int = 0) -> list[Tensor]:
    """The outputs.

    Args:
        seed: of the order in which parallel loops run.
    Raises:
        OutOfBounds, NotWritten: what no program may do.
    """
    state = State(program, seed)
    for buffer, tensor in zip(program.arguments, inputs, strict=False):
        check_input(buffer, tensor)
        state.fill(buffer, tensor)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        state.nodes(program.body)
    return [
        state.tensor(buffer) for buffer in program.arguments if buffer.role == "output"
    ]


def check_input(buffer: Buffer, tensor: Tensor) -> None:
    """Whether a tensor is what a buffer says.

    Raises:
        ValueError: another shape or dtype, or not dense.
    """
    wanted = torch.float32 if buffer.dtype == "f32" else torch.int32
    if tuple(tensor.shape) != buffer.shape or tensor.dtype != wanted:
        raise ValueError(
            f"{buffer.name} must be {wanted} of shape {buffer.shape}, not"
            f" {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"{buffer.name} must be contiguous, on the CPU")


class State:
    """The numbers in all buffers, and those of the loop variables."""

    def __init__(self, program: Program, seed: int = 0) -> None:
        self.buffers = {each.name: each for each in program.buffers}
        self.data: dict[str, list] = {
            each.name: [None] * each.size for each in program.buffers
        }
        self.at: dict[str, int] = {}
        self.random = random.Random(seed)

    def fill(self, buffer: Buffer, tensor: Tensor) -> None:
        """The numbers of an input."""
        flat = tensor.flatten()
        if buffer.dtype == "u32":
            flat = flat.to(torch.int64) & 0xFFFFFFFF
        for index, value in zip(indices(buffer.shape), flat.tolist(), strict=True):
            self.data[buffer.name][dot(index, buffer.strides)] = value

    def tensor(self, buffer: Buffer) -> Tensor:
        """The numbers of an output."""
        data = self.data[buffer.name]
        places = [dot(index, buffer.strides) for index in indices(buffer.shape)]
        values = [math.nan if data[p] is None else data[p] for p in places]
        return torch.tensor(values, dtype=torch.float32).view(buffer.shape)

    def nodes(self, body: Sequence[Node]) -> None:
        """One after the other."""
        for node in body:
            if isinstance(node, Store):
                self.store(node)
            else:
                self.loop(node)

    def loop(self, node: Loop) -> None:
        """All iterations, in an order that its kind allows."""
        order = list(range(node.count(self.at)))
        if node.kind == "parallel":
            self.random.shuffle(order)
        parts = [(one,) for one in node.body] if node.kind == "vector" else [node.body]
        for body in parts:
            for iteration in order:
                self.at[node.var] = iteration
                for name in node.local:
                    self.data[name] = [None] * self.buffers[name].size
                self.nodes(body)

    def place(self, load: Load) -> int:
        """The offset of an element.

        Raises:
            OutOfBounds: there is none.
        """
        buffer = self.buffers[load.buffer]
        index = [each.value(self.at) for each in load.index]
        if not all(0 <= i < n for i, n in zip(index, buffer.shape, strict=True)):
            raise OutOfBounds(f"{load} is {load.buffer}{index} of shape {buffer.shape}")
        return dot(index, buffer.strides)

    def store(self, node: Store) -> None:
        """Compute, round to what the buffer holds, write."""
        value = self.value(node.value)
        place = self.place(node.place)
        if node.op != "=":
            value = BINARY[node.op.removesuffix("=")](self.value(node.place), value)
        floats = self.buffers[node.buffer].dtype == "f32"
        self.data[node.buffer][place] = rounded(value) if floats else int(value)

    def value(self, expr: Expr) -> float:
        """The value of an expression here and now."""
        match expr:
            case Number():
                return expr.value
            case Load():
                found = self.data[expr.buffer][self.place(expr)]
                if found is None:
                    raise NotWritten(f"{expr} is read at {self.at} and was not written")
                return found
            case Binary():
                return BINARY[expr.op](self.value(expr.left), self.value(expr.right))
            case Unary():
                return UNARY[expr.op](self.value(expr.inner))
            case Pair():
                low, high = (round(self.value(e)) for e in (expr.low, expr.high))
                return (low & 0xFFFF) | (high & 0xFFFF) << 16
            case Codes():
                return self.value(expr.word) >> expr.right.value(self.at) & 0x000F000F
            case Dot():
                words = self.value(expr.left), self.value(expr.right)
                return sum(map(operator.mul, *map(whole_numbers, words)))
        raise TypeError(f"{expr!r} is not an expression")


def whole_numbers(word: int) -> list[int]:
    """The two of 16 bits in a word."""
    return [(part & 0xFFFF ^ 0x8000) - 0x8000 for part in (word, word >> 16)]


def rounded(value: float) -> float:
    """To float32."""
    return float(torch.tensor(value, dtype=torch.float32))


def indices(shape: Sequence[int]) -> itertools.product:
    """All of them, the last dimension fastest."""
    return itertools.product(*map(range, shape))


def dot(index: Sequence[int], strides: Sequence[int]) -> int:
    """Where an index lies."""
    return sum(i * s for i, s in zip(index, strides, strict=True))


def random_inputs(program: Program, seed: int = 0) -> list[Tensor]:
    """Inputs for a program."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for each in program.arguments:
        if each.role == "input" and each.dtype == "u32":
            words = torch.empty(each.shape, dtype=torch.int32)
            found.append(words.random_(-(2**31), 2**31, generator=generator))
        elif each.role == "input":
            found.append(torch.randn(each.shape, generator=generator))
    return found
