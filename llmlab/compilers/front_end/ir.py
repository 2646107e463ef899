"""The intermediate representation: a list of operations, each on values named before.

    %0 = input                       f32[8, 16]
    %1 = constant                    f32[16, 4]
    %2 = matmul %0 %1                f32[8, 4]

Every value is written once (static single assignment) and has a type: its shape and
its dtype. So an optimisation may put one value in another's place wherever it can show
that both are the same number and have the same type, and nothing else has to be looked
at.

    kind          what it may be done with
    ------------  ------------------------------------------------------------------
    elementwise   each number of the result from one number of each input
    reduction     a sum or a maximum along one dimension
    matmul        with or without the second input transposed
    layout        the same numbers in another order: a copy, for tensors are dense
    constant      its data stands in the node
    effect        somebody outside sees it: never removed, merged or moved

Simplified: tensors are dense, shapes are numbers, all dtypes of a program are the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SHORT = {torch.float32: "f32", torch.float64: "f64"}


class TypeMismatch(ValueError):
    """An operation was given values that it does not take."""


@dataclass(frozen=True)
class Type:
    """Shape and dtype of a value."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{SHORT[self.dtype]}[{', '.join(map(str, self.shape))}]"


@dataclass(eq=False)
class Node:
    """One operation and the value that it makes.

    Attributes:
        attributes: what the operation needs beside its inputs, in a fixed order.
        data: of a constant.
    """

    op: str
    inputs: tuple[Node, ...]
    type: Type
    attributes: tuple = ()
    data: Tensor | None = None

    @property
    def kind(self) -> str:
        return OPS[self.op].kind

    @property
    def number(self) -> float | None:
        """The value of a constant that is one number, else None."""
        if self.data is None or self.data.numel() != 1:
            return None
        return float(self.data)


@dataclass
class Graph:
    """A program.

    Attributes:
        inputs: what it is called with.
        nodes: every node, each after those that it reads.
        outputs: what it returns.
        updates: inputs that it changes, each with the value it has afterwards.
    """

    inputs: list[Node]
    nodes: list[Node]
    outputs: list[Node]
    updates: dict[Node, Node] = field(default_factory=dict)

    @property
    def results(self) -> list[Node]:
        """What must be computed: outputs, new values of inputs, effects."""
        effects = [node for node in self.nodes if node.kind == "effect"]
        return [*self.outputs, *self.updates.values(), *effects]

    @property
    def work(self) -> list[Node]:
        """The nodes that compute something: no inputs, no constants."""
        return [n for n in self.nodes if n.kind not in ("input", "constant")]

    def users(self) -> dict[Node, list[Node]]:
        """Who reads each node; twice if it is read twice."""
        found: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for each in node.inputs:
                found[each].append(node)
        return found

    def check(self) -> None:
        """What holds after every pass.

        Raises:
            RuntimeError: a value is read before it is made, made twice, or its type is
                not that of its operation.
        """
        made: set[Node] = set()
        for node in self.nodes:
            if node in made:
                raise RuntimeError(f"{node.op} stands in the program twice")
            for each in node.inputs:
                if each not in made:
                    raise RuntimeError(f"{node.op} reads {each.op} before it is made")
            if node.op not in ("input", "constant") and node.type != inferred(
                node.op, node.inputs, node.attributes
            ):
                raise RuntimeError(f"{node.op} has the type {node.type}, wrongly")
            made.add(node)
        for node in [*self.results, *self.updates]:
            if node not in made:
                raise RuntimeError(f"the result {node.op} is not in the program")

    def __str__(self) -> str:
        return "\n".join(line for _, line in lines(self))


def lines(graph: Graph) -> Iterator[tuple[Node, str]]:
    """The program as text, a line per node."""
    names = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        words = [node.op, *(names[each] for each in node.inputs)]
        if node.number is not None:
            words.append(f"{node.number:.6g}")
        words += [f"{value}" for value in node.attributes]
        marks = ["returned"] if node in graph.outputs else []
        marks += ["stored"] if node in graph.updates.values() else []
        text = f"{names[node]:>4} = {' '.join(words):<34} {node.type}"
        yield node, f"{text}  {', '.join(marks)}".rstrip()


# Types --------------------------------------------------------------------------------


def broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of an elementwise result: sizes are equal, or one of them is 1.

    Raises:
        TypeMismatch: two sizes differ, and neither is 1.
    """
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    result = []
    for sizes in zip(*padded, strict=True):
        large = {size for size in sizes if size != 1}
        if len(large) > 1:
            raise TypeMismatch(f"shapes {shapes} do not fit: {sorted(large)}")
        result.append(large.pop() if large else 1)
    return tuple(result)


def elementwise_shape(shapes: list[tuple[int, ...]], attributes: tuple) -> tuple:
    """Broadcast."""
    return broadcast(shapes)


def reduced_shape(shapes: list[tuple[int, ...]], attributes: tuple) -> tuple:
    """The dimension stays, with the size 1."""
    (shape,), (dim,) = shapes, attributes
    if not 0 <= dim < len(shape):
        raise TypeMismatch(f"dim={dim} must lie between 0 and {len(shape) - 1}")
    return (*shape[:dim], 1, *shape[dim + 1 :])


def matmul_shape(shapes: list[tuple[int, ...]], attributes: tuple) -> tuple:
    """(…, m, k) and (…, k, n), or (…, n, k) if it is read transposed."""
    a, b = shapes
    (transposed,) = attributes
    if len(a) < 2 or len(b) < 2:
        raise TypeMismatch(f"matmul of {a} and {b}: both need two dimensions")
    inner, columns = (b[-1], b[-2]) if transposed else (b[-2], b[-1])
    if a[-1] != inner:
        raise TypeMismatch(f"matmul of {a} and {b}: {a[-1]} and {inner} differ")
    return (*broadcast([a[:-2], b[:-2]]), a[-2], columns)


def transposed_shape(shapes: list[tuple[int, ...]], attributes: tuple) -> tuple:
    """The sizes in the new order."""
    (shape,), (order,) = shapes, attributes
    if sorted(order) != list(range(len(shape))):
        raise TypeMismatch(f"order={order} must name each of {len(shape)} dimensions")
    return tuple(shape[dim] for dim in order)


def reshaped_shape(shapes: list[tuple[int, ...]], attributes: tuple) -> tuple:
    """Any shape with as many numbers."""
    (shape,), (new,) = shapes, attributes
    if math.prod(shape) != math.prod(new):
        raise TypeMismatch(f"reshape of {shape} to {new}: not as many numbers")
    return tuple(new)


# Operations ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """What an operation is.

    Attributes:
        shape: (shapes of the inputs, attributes) → shape of the result.
        run: (tensors, attributes) → the result, in torch.
        commutes: whether its two inputs may be exchanged.
    """

    kind: str
    shape: Callable[[list[tuple[int, ...]], tuple], tuple]
    run: Callable[..., Tensor] | None
    commutes: bool = False


def elementwise(run: Callable, commutes: bool = False) -> Op:
    """An operation on each number."""
    return Op("elementwise", elementwise_shape, lambda x, _: run(*x), commutes)


def matmul(x: list[Tensor], attributes: tuple) -> Tensor:
    """The product, with the second input as it is or transposed."""
    a, b = x
    return torch.matmul(a, b.mT if attributes[0] else b)


def report(x: list[Tensor], attributes: tuple) -> Tensor:
    """A line in the log, as an operation: it returns what it was given."""
    logger.info("%s: mean %.4f", attributes[0], x[0].mean())
    return x[0]


OPS = {
    "input": Op("input", elementwise_shape, None),
    "constant": Op("constant", elementwise_shape, None),
    "add": elementwise(torch.add, commutes=True),
    "sub": elementwise(torch.sub),
    "mul": elementwise(torch.mul, commutes=True),
    "div": elementwise(torch.div),
    "maximum": elementwise(torch.maximum, commutes=True),
    "neg": elementwise(torch.neg),
    "exp": elementwise(torch.exp),
    "tanh": elementwise(torch.tanh),
    "sqrt": elementwise(torch.sqrt),
    "sum": Op("reduction", reduced_shape, lambda x, a: x[0].sum(a[0], keepdim=True)),
    "max": Op("reduction", reduced_shape, lambda x, a: x[0].amax(a[0], keepdim=True)),
    "matmul": Op("matmul", matmul_shape, matmul),
    "transpose": Op(
        "layout", transposed_shape, lambda x, a: x[0].permute(a[0]).contiguous()
    ),
    "reshape": Op("layout", reshaped_shape, lambda x, a: x[0].reshape(a[0])),
    # draws from torch's generator: a second draw is another value
    "draw": Op("effect", elementwise_shape, lambda x, _: torch.rand_like(x[0])),
    "report": Op("effect", elementwise_shape, report),
}


def inferred(op: str, inputs: Sequence[Node], attributes: tuple = ()) -> Type:
    """The type of an operation's result.

    Raises:
        TypeMismatch: shapes that do not fit, or two dtypes.
    """
    dtypes = {node.type.dtype for node in inputs}
    if len(dtypes) > 1:
        names = " and ".join(sorted(str(dtype) for dtype in dtypes))
        raise TypeMismatch(f"{op} of {names}: convert one of them first")
    shape = OPS[op].shape([node.type.shape for node in inputs], attributes)
    return Type(shape, dtypes.pop())


def made(op: str, inputs: Sequence[Node], attributes: tuple = ()) -> Node:
    """A node with the type that follows from its inputs."""
    return Node(op, tuple(inputs), inferred(op, inputs, attributes), attributes)


def constant(data: Tensor | float, dtype: torch.dtype = torch.float32) -> Node:
    """A value that is known when the program is compiled."""
    data = torch.as_tensor(data, dtype=dtype)
    return Node("constant", (), Type(tuple(data.shape), dtype), data=data)


def run(graph: Graph, *arguments: Tensor) -> list[Tensor]:
    """Node by node, as it stands: what every optimised program is compared with.

    Raises:
        ValueError: arguments of other types than the program was captured for.
    """
    values = bind(graph, arguments)
    for node in graph.work:
        tensors = [values[each] for each in node.inputs]
        values[node] = OPS[node.op].run(tensors, node.attributes)
    return finish(graph, values)


def bind(graph: Graph, arguments: Sequence[Tensor]) -> dict[Node, Tensor]:
    """The values that are there before the first operation.

    Raises:
        ValueError: arguments of other types than the program was captured for.
    """
    found = [Type(tuple(x.shape), x.dtype) for x in arguments]
    wanted = [node.type for node in graph.inputs]
    if found != wanted:
        raise ValueError(
            f"called with {', '.join(map(str, found))}; captured for"
            f" {', '.join(map(str, wanted))}: capture it anew for other shapes"
        )
    values = dict(zip(graph.inputs, arguments, strict=True))
    values.update({n: n.data for n in graph.nodes if n.kind == "constant"})
    return values


def finish(graph: Graph, values: dict[Node, Tensor]) -> list[Tensor]:
    """Results, taken before inputs are overwritten; then inputs that it changes."""
    outputs = [values[node].clone() for node in graph.outputs]
    new = {node: values[result].clone() for node, result in graph.updates.items()}
    for node, value in new.items():
        values[node].copy_(value)
    return outputs
