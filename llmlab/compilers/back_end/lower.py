"""From loops to the words of a target: what both code generators share.

Loops that are unrolled are written out here, lanes become vectors, and tails are cut
off: where an inner loop would end early in the last iteration of an outer one, the
outer loop is written twice, once for the whole tiles and once for the rest. Then the
counts of both are numbers, and an inner loop of 14 rows or of 8 can be written out.

A target (`to_c`, `to_llvm`) knows how to write a loop, a load, a store and arithmetic
on one number or on several lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llmlab.compilers.back_end.ir import (
    Affine,
    Binary,
    Buffer,
    Codes,
    Dot,
    Expr,
    Limit,
    Load,
    Loop,
    Node,
    Number,
    Pair,
    Program,
    Store,
    Unary,
    walk,
)

STACK = 64 * 1024  # bytes of one local array, at most


class CannotGenerate(ValueError):
    """A program that has no code."""


@dataclass(frozen=True)
class Value:
    """What a target computes: its own object, and how many lanes it has."""

    code: Any
    lanes: int = 1


class Target(Protocol):
    """What a code generator can do."""

    def loop(
        self, node: Loop, start: int, stop: Any, body: Callable[[], None]
    ) -> None: ...

    def scope(
        self, local: Sequence[Buffer], body: Callable[[], None], alone: bool
    ) -> None: ...

    def count(self, index: Affine, limit: Limit, step: int, extent: Any) -> Any: ...

    def number(self, value: float, dtype: str = "f32") -> Value: ...

    def load(
        self, buffer: Buffer, offset: Affine, lanes: int, stride: int
    ) -> Value: ...

    def store(
        self, buffer: Buffer, offset: Affine, value: Value, lanes: int, stride: int
    ) -> None: ...

    def binary(self, op: str, a: Value, b: Value) -> Value: ...

    def unary(self, op: str, a: Value) -> Value: ...

    def pair(self, low: Value, high: Value) -> Value: ...

    def codes(self, word: Value, right: Affine) -> Value: ...

    def dot(self, left: Value, right: Value) -> Value: ...


class Lowering:
    """One walk through a program, telling a target what to write."""

    def __init__(self, program: Program, target: Target) -> None:
        self.buffers = {each.name: each for each in program.buffers}
        self.target = target
        self.ranges: dict[str, tuple[int, int]] = {}  # least and largest value
        self.vector: tuple[str, int] | None = None  # variable, lanes

    def nodes(self, body: Sequence[Node]) -> None:
        """One after the other."""
        for node in body:
            if isinstance(node, Store):
                self.store(node)
            else:
                self.loop(node)

    # Loops ----------------------------------------------------------------------------

    def loop(self, node: Loop) -> None:
        """A loop: as lanes, written out, or as a loop."""
        least, most = self.counts(node)
        if most == 0:
            return
        if least < most:
            self.open_ended(node, most)
        elif node.kind == "vector" and most == node.extent:
            self.vector = (node.var, node.extent)
            self.nodes(node.body)
            self.vector = None
        elif node.kind == "unroll":
            for iteration in range(most):
                self.fixed(node, iteration)
        else:
            self.pieces(node, most)

    def fixed(self, node: Loop, iteration: int) -> None:
        """One iteration, its number known."""
        self.ranges[node.var] = (iteration, iteration)
        self.inside(node, alone=True)

    def inside(self, node: Loop, alone: bool = False) -> None:
        """The body, with its own arrays; alone if no loop is written around it."""
        local = [self.buffers[name] for name in node.local]
        self.target.scope(local, lambda: self.nodes(node.body), alone)

    def open_ended(self, node: Loop, most: int) -> None:
        """A loop whose end is computed when it begins."""
        stop: Any = node.extent
        for limit in node.limits:
            step = limit.index.of(node.var)
            index = self.known(limit.index.put(node.var, 0))
            stop = self.target.count(index, limit, step, stop)
        self.ranges[node.var] = (0, most - 1)
        self.target.loop(node, 0, stop, lambda: self.inside(node))

    def pieces(self, node: Loop, count: int) -> None:
        """The iterations in which all inside is whole, and those after them."""
        whole = min([count, *self.whole(node)])
        for start, stop in ((0, whole), (whole, count)):
            if stop - start == 1:
                self.fixed(node, start)
            elif stop > start:
                self.ranges[node.var] = (start, stop - 1)
                self.target.loop(node, start, stop, lambda: self.inside(node))

    def whole(self, node: Loop) -> list[int]:
        """For each limit inside: in how many iterations it does not matter."""
        found = []
        inner = {
            each.var: each for each, _ in walk(node.body) if isinstance(each, Loop)
        }
        for each in inner.values():
            for limit in each.limits:
                step = limit.index.of(node.var)
                if not step:
                    continue
                rest = limit.index.put(node.var, 0)
                for name, loop in inner.items():
                    rest = rest.put(name, loop.extent - 1)
                room = limit.total - 1 - self.bounds(rest)[1]
                found.append(max(0, room // step + 1))
        return found

    def bounds(self, index: Affine) -> tuple[int, int]:
        """The least and the largest value of an index, here."""
        low = high = index.constant
        for name, factor in index.terms:
            ends = [factor * end for end in self.ranges[name]]
            low, high = low + min(ends), high + max(ends)
        return low, high

    def counts(self, node: Loop) -> tuple[int, int]:
        """The fewest and the most iterations that a loop may have here."""
        least = most = node.extent
        for limit in node.limits:
            step = limit.index.of(node.var)
            low, high = self.bounds(limit.index.put(node.var, 0))
            least = min(least, -(-(limit.total - high) // step))
            most = min(most, -(-(limit.total - low) // step))
        return max(least, 0), max(most, 0)

    # Statements -----------------------------------------------------------------------

    def known(self, index: Affine) -> Affine:
        """With numbers for the variables that have one value here."""
        for name in index.variables:
            low, high = self.ranges.get(name, (0, 1))
            if low == high:
                index = index.put(name, low)
        return index

    def place(self, load: Load) -> tuple[Buffer, Affine, int, int]:
        """Its buffer, the offset of the first lane, lanes, and from lane to lane."""
        buffer = self.buffers[load.buffer]
        offset = buffer.offset(load.index)
        name, lanes = self.vector or ("", 1)
        stride = offset.of(name)
        offset = self.known(offset.put(name, 0))
        return buffer, offset, (lanes if stride else 1), stride

    def store(self, node: Store) -> None:
        """Compute and write."""
        buffer, offset, lanes, stride = self.place(node.place)
        if isinstance(node.value, Number):
            value = self.target.number(node.value.value, buffer.dtype)
        else:
            value = self.value(node.value)
        if node.op != "=":
            old = self.target.load(buffer, offset, lanes, stride)
            value = self.target.binary(node.op.removesuffix("="), old, value)
        self.target.store(buffer, offset, value, lanes, stride)

    def value(self, expr: Expr) -> Value:
        """An expression, with as many lanes as it needs."""
        match expr:
            case Number():
                return self.target.number(expr.value)
            case Load():
                return self.target.load(*self.place(expr))
            case Binary():
                left, right = self.value(expr.left), self.value(expr.right)
                return self.target.binary(expr.op, left, right)
            case Unary():
                return self.target.unary(expr.op, self.value(expr.inner))
            case Pair():
                return self.target.pair(self.value(expr.low), self.value(expr.high))
            case Codes():
                word = self.value(expr.word)
                if self.vector and self.vector[0] in expr.right.variables:
                    raise CannotGenerate(f"{expr}: each lane would shift by another")
                return self.target.codes(word, self.known(expr.right))
            case Dot():
                return self.target.dot(self.value(expr.left), self.value(expr.right))
        raise CannotGenerate(f"{expr!r} is not an expression")


def parameters(program: Program) -> list[Buffer]:
    """What its function is called with: inputs, outputs, then temporaries.

    Small local arrays are on the stack. Large ones would break it, so that they come
    from outside, where one thread alone works on them.

    Raises:
        CannotGenerate: a large array for each of several threads.
    """
    stack: set[str] = set()
    for node, around in walk(program.body):
        if not isinstance(node, Loop):
            continue
        for name in node.local:
            size = program.buffer(name).bytes
            shared = all(each.kind != "parallel" for each in (*around, node))
            if size <= STACK:
                stack.add(name)
            elif not shared:
                raise CannotGenerate(
                    f"{name}: each thread would need {size:,} bytes on its stack, and"
                    f" {STACK:,} are allowed: tile before"
                )
    temporaries = [each for each in program.buffers if each.role == "temporary"]
    return program.arguments + [each for each in temporaries if each.name not in stack]
