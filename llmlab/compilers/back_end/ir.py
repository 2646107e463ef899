"""Loops as data: what a back end changes until a processor likes it.

    for i in 0..512
      for k in 0..512
        for j in 0..512
          C[i, j] += A[i, k] * B[k, j]

A program has buffers (a shape, strides, a role) and a body of loops and statements.
Indices are affine: sums of loop variables times whole numbers. This is what makes it
possible to decide whether two statements meet in memory, without running them.

    kind       how the iterations of a loop run
    ---------  -------------------------------------------------------------------
    serial     one after the other
    unroll     the same, written out
    vector     all at once, statement by statement: the lanes of a register
    parallel   in any order, by several threads

Where a tile does not divide its loop, the inner one has a limit: iterations beyond it
do not exist. So a tail is a matter of code generation, and each step of a schedule may
take nests as if all was even.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

# Indices ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Affine:
    """Σ coefficient · variable + constant; the variables are sorted by name."""

    terms: tuple[tuple[str, int], ...] = ()
    constant: int = 0

    @property
    def variables(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.terms)

    def of(self, name: str) -> int:
        """The coefficient of a variable."""
        return dict(self.terms).get(name, 0)

    def __add__(self, other: Affine | int) -> Affine:
        if isinstance(other, int):
            return Affine(self.terms, self.constant + other)
        found = dict(self.terms)
        for name, factor in other.terms:
            found[name] = found.get(name, 0) + factor
        return affine(found, self.constant + other.constant)

    def __mul__(self, factor: int) -> Affine:
        terms = {name: each * factor for name, each in self.terms}
        return affine(terms, self.constant * factor)

    def __sub__(self, other: Affine) -> Affine:
        return self + other * -1

    def put(self, name: str, value: Affine | int) -> Affine:
        """With something in the place of a variable."""
        factor = self.of(name)
        if not factor:
            return self
        rest = Affine(tuple(t for t in self.terms if t[0] != name), self.constant)
        return rest + (value * factor)

    def value(self, at: Mapping[str, int]) -> int:
        """With numbers in the place of all variables."""
        return self.constant + sum(factor * at[name] for name, factor in self.terms)

    def __str__(self) -> str:
        words = [n if f == 1 else f"{f}*{n}" for n, f in self.terms]
        if self.constant or not words:
            words.append(str(self.constant))
        return " + ".join(words).replace("+ -", "- ")


def affine(terms: Mapping[str, int], constant: int = 0) -> Affine:
    """Without the terms that are 0."""
    return Affine(tuple(sorted((n, f) for n, f in terms.items() if f)), constant)


def var(name: str) -> Affine:
    """One loop variable."""
    return Affine(((name, 1),))


# Expressions --------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """A constant."""

    value: float

    def __str__(self) -> str:
        return f"{self.value:.9g}"


@dataclass(frozen=True)
class Load:
    """One element of a buffer."""

    buffer: str
    index: tuple[Affine, ...]

    def __str__(self) -> str:
        return f"{self.buffer}[{', '.join(map(str, self.index))}]"


@dataclass(frozen=True)
class Binary:
    """Two numbers to one: + − * / max."""

    op: str
    left: Expr
    right: Expr

    def __str__(self) -> str:
        if self.op == "max":
            return f"max({self.left}, {self.right})"
        return f"({self.left} {self.op} {self.right})"


@dataclass(frozen=True)
class Unary:
    """One number to one: neg exp tanh sqrt, and float, of a whole number."""

    op: str
    inner: Expr

    def __str__(self) -> str:
        return f"{self.op}({self.inner})"


@dataclass(frozen=True)
class Pair:
    """A word of two floats, rounded to whole numbers of 16 bits; the first lies low.

    They must be from −32,767 to 32,767.
    """

    low: Expr
    high: Expr

    def __str__(self) -> str:
        return f"pair({self.low}, {self.high})"


@dataclass(frozen=True)
class Codes:
    """Two codes of four bits as such a word: the one at bit `right`, and 16 above."""

    word: Load
    right: Affine

    def __str__(self) -> str:
        return f"codes({self.word}, {self.right})"


@dataclass(frozen=True)
class Dot:
    """The whole numbers of two words, multiplied in pairs and added up: a whole number.

    Many processors do it in one instruction: vpmaddwd on x86.
    """

    left: Expr
    right: Expr

    def __str__(self) -> str:
        return f"dot({self.left}, {self.right})"


Expr = Number | Load | Binary | Unary | Pair | Codes | Dot


def loads(value: Expr) -> Iterator[Load]:
    """All that an expression reads, from left to right."""
    match value:
        case Load():
            yield value
        case Binary() | Dot():
            yield from loads(value.left)
            yield from loads(value.right)
        case Pair():
            yield from loads(value.low)
            yield from loads(value.high)
        case Unary():
            yield from loads(value.inner)
        case Codes():
            yield value.word


def mapped(value: Expr, load: Callable[[Load], Expr], index: Callable) -> Expr:
    """An expression with every load and every affine index replaced."""

    def inside(expr: Expr) -> Expr:
        return mapped(expr, load, index)

    match value:
        case Load():
            return load(Load(value.buffer, tuple(map(index, value.index))))
        case Binary():
            return Binary(value.op, inside(value.left), inside(value.right))
        case Unary():
            return Unary(value.op, inside(value.inner))
        case Pair():
            return Pair(inside(value.low), inside(value.high))
        case Codes():
            return Codes(inside(value.word), index(value.right))
        case Dot():
            return Dot(inside(value.left), inside(value.right))
    return value


# Statements ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Store:
    """buffer[index] = value; or += value, or the larger of both, max=."""

    buffer: str
    index: tuple[Affine, ...]
    value: Expr
    op: str = "="

    @property
    def place(self) -> Load:
        return Load(self.buffer, self.index)

    def __str__(self) -> str:
        return f"{self.place} {self.op} {self.value}"


@dataclass(frozen=True)
class Limit:
    """Iterations exist only where index < total."""

    index: Affine
    total: int


@dataclass(frozen=True)
class Loop:
    """A loop from 0.

    Attributes:
        limits: of a tile that does not divide.
        local: buffers that exist anew in each iteration.
    """

    var: str
    extent: int
    body: tuple[Loop | Store, ...]
    kind: str = "serial"
    limits: tuple[Limit, ...] = ()
    local: tuple[str, ...] = ()

    def count(self, at: Mapping[str, int]) -> int:
        """How many iterations there are, with numbers for the variables around."""
        found = self.extent
        for limit in self.limits:
            step = limit.index.of(self.var)
            room = limit.total - limit.index.put(self.var, 0).value(at)
            found = min(found, -(-room // step))
        return max(found, 0)


Node = Loop | Store
DTYPES = ("f32", "u32", "i32")


@dataclass(frozen=True)
class Buffer:
    """An array.

    Attributes:
        dtype: f32, u32 for words, or i32 for whole numbers.
        strides: in elements; those of rows one after the other, if not said.
        role: input, output or temporary.
        memory: "registers" is a wish that code generation may not be able to grant.
        ahead: so many elements before they are read, a line is asked for; 0 is never.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "f32"
    role: str = "input"
    strides: tuple[int, ...] = ()
    memory: str = "memory"
    ahead: int = 0

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.shape):
            raise ValueError(f"{self.name}: shape={self.shape} must be of sizes from 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.name}: dtype={self.dtype!r} must be of {DTYPES}")
        if not self.strides:
            object.__setattr__(self, "strides", dense(self.shape))

    @property
    def size(self) -> int:
        """Elements from the first to the last."""
        pairs = zip(self.shape, self.strides, strict=True)
        return 1 + sum((size - 1) * stride for size, stride in pairs)

    @property
    def bytes(self) -> int:
        return 4 * self.size

    def offset(self, index: tuple[Affine, ...]) -> Affine:
        """From the first element to that of an index."""
        found = Affine()
        for each, stride in zip(index, self.strides, strict=True):
            found = found + each * stride
        return found


def dense(
    shape: tuple[int, ...], order: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Strides without gaps; the last dimension of `order` lies side by side."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(order or range(len(shape))):
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)


@dataclass(frozen=True)
class Program:
    """Buffers by their names, and what is done with them."""

    name: str
    buffers: tuple[Buffer, ...]
    body: tuple[Node, ...]

    def buffer(self, name: str) -> Buffer:
        for each in self.buffers:
            if each.name == name:
                return each
        raise ValueError(f"buffer={name!r} must be one of {self.names}")

    @property
    def names(self) -> list[str]:
        return [each.name for each in self.buffers]

    @property
    def arguments(self) -> list[Buffer]:
        """What it is called with: inputs, then outputs."""
        inputs = [each for each in self.buffers if each.role == "input"]
        return inputs + [each for each in self.buffers if each.role == "output"]

    @property
    def loops(self) -> list[str]:
        return [node.var for node, _ in walk(self.body) if isinstance(node, Loop)]

    def loop(self, name: str) -> Loop:
        for node, _ in walk(self.body):
            if isinstance(node, Loop) and node.var == name:
                return node
        raise ValueError(f"loop={name!r} must be one of {self.loops}")

    def __str__(self) -> str:
        return "\n".join(lines(self))


def walk(
    body: tuple[Node, ...], around: tuple[Loop, ...] = ()
) -> Iterator[tuple[Node, tuple[Loop, ...]]]:
    """Every loop and statement in its order, with the loops around it."""
    for node in body:
        yield node, around
        if isinstance(node, Loop):
            yield from walk(node.body, (*around, node))


def rewritten(body: tuple[Node, ...], change: Callable) -> tuple[Node, ...]:
    """Every node, from the innermost out, replaced by change(node): nodes, or one."""
    found: list[Node] = []
    for node in body:
        if isinstance(node, Loop):
            node = replace(node, body=rewritten(node.body, change))
        new = change(node)
        found += new if isinstance(new, list | tuple) else [new]
    return tuple(found)


def reindexed(
    body: tuple[Node, ...], index: Callable, load: Callable = lambda e: e
) -> tuple[Node, ...]:
    """The same nodes with other indices; `load` may change what is read or written."""

    def change(node: Node) -> Node:
        if isinstance(node, Loop):
            limits = tuple(Limit(index(each.index), each.total) for each in node.limits)
            return replace(node, limits=limits)
        place = load(Load(node.buffer, tuple(map(index, node.index))))
        value = mapped(node.value, load, index)
        return Store(place.buffer, place.index, value, node.op)

    return rewritten(body, change)


def lines(program: Program) -> list[str]:
    """The program as text."""
    found = []
    for node, around in walk(program.body):
        space = "  " * len(around)
        if isinstance(node, Store):
            found.append(f"{space}{node}")
            continue
        kind = "" if node.kind == "serial" else f"  {node.kind}"
        limits = "".join(f"  if {each.index} < {each.total}" for each in node.limits)
        local = f"  with {', '.join(node.local)}" if node.local else ""
        text = f"{space}for {node.var} in 0..{node.extent}{limits}{kind}{local}"
        found.append(text)
    return found
