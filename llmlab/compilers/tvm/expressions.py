"""Tensor expressions: what each number of a result is, and not a word on order.

    A = placeholder("A", (M, K))
    B = placeholder("B", (K, N))
    k = reduce_axis("k", K)
    C = compute("C", (M, N), lambda i, j: sum_over(A[i, k] * B[k, j], k))

says that C[i, j] = Σ_k A[i, k] B[k, j]. In which order the loops i, j and k run, and in
which pieces, is a schedule's business.

    axis        i, j: one per dimension of the result;  k: one that is summed over
    index       c₀ + Σ c·axis, with whole numbers c: `Affine`
    expression  numbers, reads A[index, …], operations on them; a sum or a maximum over
                axes, outermost

Simplified: indices are affine (no i // 4), all numbers are float32, and a result has
one expression.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

# Indices ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Affine:
    """c₀ + Σ c·name, with whole numbers.

    Attributes:
        terms: (name, c) by name, none of them 0.
        constant: c₀.
    """

    terms: tuple[tuple[str, int], ...] = ()
    constant: int = 0

    @staticmethod
    def of(terms: Mapping[str, int], constant: int = 0) -> Affine:
        kept = sorted((name, c) for name, c in terms.items() if c)
        return Affine(tuple(kept), constant)

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.terms}

    def substitute(self, values: Mapping[str, Affine]) -> Affine:
        """Every name that has a value is replaced by it."""
        result = Affine((), self.constant)
        for name, c in self.terms:
            result = result + values.get(name, Affine.of({name: 1})) * c
        return result

    def part(self, names: set[str]) -> Affine:
        """The terms of these names, without the constant."""
        return Affine(tuple(term for term in self.terms if term[0] in names))

    def __add__(self, other: Affine | Axis | int) -> Affine:
        other = affine(other)
        terms = dict(self.terms)
        for name, c in other.terms:
            terms[name] = terms.get(name, 0) + c
        return Affine.of(terms, self.constant + other.constant)

    def __mul__(self, factor: int) -> Affine:
        if not isinstance(factor, int):
            raise ValueError(f"{self} times {factor!r}: only times a whole number")
        terms = {name: c * factor for name, c in self.terms}
        return Affine.of(terms, self.constant * factor)

    def __sub__(self, other: Affine | Axis | int) -> Affine:
        return self + affine(other) * -1

    def __rsub__(self, other: int) -> Affine:
        return affine(other) - self

    __radd__ = __add__
    __rmul__ = __mul__

    def __str__(self) -> str:
        words = [name if c == 1 else f"{name} * {c}" for name, c in self.terms]
        if self.constant or not words:
            words.append(str(self.constant))
        return " + ".join(words).replace("+ -", "- ")


@dataclass(frozen=True)
class Axis:
    """A dimension of a result, or one that is summed over."""

    name: str
    extent: int
    reduced: bool = False

    def __add__(self, other: Affine | Axis | int) -> Affine:
        return affine(self) + other

    def __sub__(self, other: Affine | Axis | int) -> Affine:
        return affine(self) - other

    def __rsub__(self, other: int) -> Affine:
        return affine(other) - self

    def __mul__(self, factor: int) -> Affine:
        return affine(self) * factor

    __radd__ = __add__
    __rmul__ = __mul__


def affine(value: Affine | Axis | int) -> Affine:
    """An axis or a whole number as an index."""
    if isinstance(value, Affine):
        return value
    if isinstance(value, Axis):
        return Affine.of({value.name: 1})
    if isinstance(value, int):
        return Affine((), value)
    raise ValueError(f"index={value!r} must be an axis, a whole number, or a sum")


# Expressions --------------------------------------------------------------------------


class Expression:
    """What a number is computed from."""

    def __add__(self, other: Expression | float) -> Operation:
        return Operation("+", (self, expression(other)))

    def __radd__(self, other: float) -> Operation:
        return Operation("+", (expression(other), self))

    def __sub__(self, other: Expression | float) -> Operation:
        return Operation("-", (self, expression(other)))

    def __mul__(self, other: Expression | float) -> Operation:
        return Operation("*", (self, expression(other)))

    def __rmul__(self, other: float) -> Operation:
        return Operation("*", (expression(other), self))

    def __truediv__(self, other: Expression | float) -> Operation:
        return Operation("/", (self, expression(other)))


@dataclass(frozen=True, eq=False)
class Number(Expression):
    """A constant."""

    value: float


@dataclass(frozen=True, eq=False)
class Read(Expression):
    """One number of a tensor."""

    tensor: Tensor
    indices: tuple[Affine, ...]


@dataclass(frozen=True, eq=False)
class Operation(Expression):
    """+, -, *, /, max, exp or tanh of one or two expressions."""

    name: str
    inputs: tuple[Expression, ...]


@dataclass(frozen=True, eq=False)
class Reduction(Expression):
    """A sum ("+") or a maximum ("max") over axes."""

    name: str
    body: Expression
    axes: tuple[Axis, ...]


@dataclass(frozen=True, eq=False)
class Tensor:
    """A result, or an input if it has no expression."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[Axis, ...] = ()
    value: Expression | None = field(default=None, repr=False)

    def __getitem__(self, indices: Affine | Axis | int | tuple) -> Read:
        found = indices if isinstance(indices, tuple) else (indices,)
        if len(found) != len(self.shape):
            raise ValueError(
                f"{self.name} has {len(self.shape)} dimensions, and is read with"
                f" {len(found)} indices"
            )
        return Read(self, tuple(map(affine, found)))

    @property
    def reduced(self) -> tuple[Axis, ...]:
        """The axes that are summed over."""
        return self.value.axes if isinstance(self.value, Reduction) else ()

    @property
    def reads(self) -> list[Read]:
        """What its expression reads, from left to right."""
        return [] if self.value is None else reads_of(self.value)

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that it reads, each once."""
        return list(dict.fromkeys(read.tensor for read in self.reads))


def expression(value: Expression | float) -> Expression:
    """A number as an expression."""
    if isinstance(value, Expression):
        return value
    if isinstance(value, int | float):
        return Number(float(value))
    raise ValueError(f"{value!r} must be an expression or a number")


def reads_of(value: Expression) -> list[Read]:
    """Every read in an expression, from left to right."""
    match value:
        case Read():
            return [value]
        case Operation(inputs=inputs):
            return [read for each in inputs for read in reads_of(each)]
        case Reduction(body=body):
            return reads_of(body)
    return []


def exp(x: Expression) -> Operation:
    """eˣ."""
    return Operation("exp", (x,))


def tanh(x: Expression) -> Operation:
    """The hyperbolic tangent."""
    return Operation("tanh", (x,))


def maximum(x: Expression, y: Expression | float) -> Operation:
    """The larger of two."""
    return Operation("max", (x, expression(y)))


def placeholder(name: str, shape: tuple[int, ...]) -> Tensor:
    """An input."""
    return Tensor(name, tuple(shape))


def reduce_axis(name: str, extent: int) -> Axis:
    """An axis that is summed over."""
    return Axis(name, extent, reduced=True)


def sum_over(body: Expression, *axes: Axis) -> Reduction:
    """Σ over axes."""
    return Reduction("+", body, axes)


def max_over(body: Expression, *axes: Axis) -> Reduction:
    """The maximum over axes."""
    return Reduction("max", body, axes)


def compute(
    name: str, shape: tuple[int, ...], function: Callable[..., Expression]
) -> Tensor:
    """The tensor whose number at (i, j, …) is function(i, j, …).

    Raises:
        ValueError: a sum inside an expression, an axis of nobody, an index that leaves
            its tensor.
    """
    names = list(inspect.signature(function).parameters)
    if len(names) != len(shape):
        raise ValueError(
            f"{name}: shape={shape} has {len(shape)} dimensions, and the function takes"
            f" {len(names)} indices"
        )
    axes = tuple(map(Axis, names, shape))
    tensor = Tensor(name, tuple(shape), axes, expression(function(*axes)))
    check(tensor)
    return tensor


def check(tensor: Tensor) -> None:
    """Only axes that there are, and no index outside its tensor."""
    body = tensor.value.body if tensor.reduced else tensor.value
    if any(isinstance(each, Reduction) for each in inside(body)):
        raise ValueError(
            f"{tensor.name}: a sum or maximum must be outermost; give it its own tensor"
        )
    extents = {axis.name: axis.extent for axis in (*tensor.axes, *tensor.reduced)}
    if len(extents) < len(tensor.axes) + len(tensor.reduced):
        raise ValueError(f"{tensor.name}: two axes have one name")
    for read in tensor.reads:
        for index, size in zip(read.indices, read.tensor.shape, strict=True):
            if not index.names <= extents.keys():
                strange = sorted(index.names - extents.keys())
                raise ValueError(f"{tensor.name}: axis {strange[0]} is not summed over")
            first, last = interval(index, extents)
            if first < 0 or last >= size:
                raise ValueError(
                    f"{tensor.name} reads {read.tensor.name} at {index}, which goes"
                    f" from {first} to {last}, and there are 0 to {size - 1}"
                )


def inside(value: Expression) -> list[Expression]:
    """An expression and all parts of it."""
    parts = value.inputs if isinstance(value, Operation) else ()
    parts = (value.body,) if isinstance(value, Reduction) else parts
    return [value, *(each for part in parts for each in inside(part))]


def interval(index: Affine, extents: Mapping[str, int]) -> tuple[int, int]:
    """The smallest and the largest value of an index.

    Each name goes from 0 to its extent − 1, on its own, so the ends are reached.
    """
    first = last = index.constant
    for name, c in index.terms:
        far = c * (extents[name] - 1)
        first += min(far, 0)
        last += max(far, 0)
    return first, last


def stages(*results: Tensor) -> list[Tensor]:
    """All tensors that are computed, each after those that it reads."""
    found: dict[Tensor, None] = {}

    def visit(tensor: Tensor) -> None:
        if tensor in found or tensor.value is None:
            return
        for each in tensor.inputs:
            visit(each)
        found[tensor] = None

    for result in results:
        visit(result)
    return list(found)


def placeholders(*results: Tensor) -> list[Tensor]:
    """All inputs, in the order in which they are read first."""
    found = (each for stage in stages(*results) for each in stage.inputs)
    return list(dict.fromkeys(each for each in found if each.value is None))
