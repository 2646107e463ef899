"""The network definition: a captured program whose weights have names.

    weights   inputs of the program that are known when it is built, and may be replaced
              later (refit); all else that the program reads comes with each call
    profile   how many rows (the first dimension) the inputs may have: least, usual,
              most. Tactics are timed with the usual number.
    plugin    an operation that the front end does not know: what its result is like,
              and how it is computed

A program is captured for one shape. With a profile it is captured for all three, and
must be the same program: no operation may depend on the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmlab.compilers.front_end import (
    OPS,
    Graph,
    Node,
    Op,
    capture,
    constant,
    optimise,
    rebuilt,
    remove_dead,
)


@dataclass(frozen=True)
class Profile:
    """Rows that an input may have.

    Attributes:
        usual: what tactics are timed with; TensorRT calls it opt.
    """

    least: int
    usual: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.usual <= self.most:
            raise ValueError(
                f"profile {self.least}, {self.usual}, {self.most}: it must hold that"
                " 1 ≤ least ≤ usual ≤ most"
            )

    def holds(self, rows: int) -> bool:
        """Whether an input may have so many rows."""
        return self.least <= rows <= self.most


@dataclass
class Network:
    """A program, and the values of those inputs that are weights.

    Attributes:
        weights: input of the graph → its name.
        profiles: none if the shapes are fixed.
    """

    graph: Graph
    weights: dict[Node, str]
    values: dict[str, Tensor]
    profiles: tuple[Profile, ...] = field(default=())

    @property
    def inputs(self) -> list[Node]:
        """What comes with each call."""
        return [node for node in self.graph.inputs if node not in self.weights]


def define(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    profiles: Sequence[Profile] = (),
) -> Network:
    """Capture function(*inputs, *weights), and optimise the program.

    Args:
        inputs: examples. With profiles, the first dimension of each is replaced.

    Raises:
        CannotCapture: the function does what a trace cannot hold.
        ValueError: a weight holds NaN or infinity, or with profiles: the program is
            another one for another number of rows.
    """
    for name, value in weights.items():
        check_weight(name, value)
    values = [value.detach() for value in weights.values()]

    def traced(rows: int | None) -> Graph:
        given = inputs
        if rows is not None:
            given = [x.new_zeros(rows, *x.shape[1:]) for x in inputs]
        return optimise(capture(function, *given, *values), by_size=False)

    if not profiles:
        graph = traced(None)
    else:
        graph = traced(profiles[0].usual)
        for profile in profiles:
            for rows in (profile.least, profile.most):
                check_same(graph, traced(rows), profiles[0].usual, rows)
    named = dict(zip(graph.inputs[len(inputs) :], weights, strict=True))
    return Network(graph, named, dict(weights), tuple(profiles))


def check_weight(name: str, value: Tensor) -> None:
    """Raises: ValueError: it is no matrix or vector of finite floats."""
    if not value.is_floating_point():
        raise ValueError(f"weight {name!r} is of {value.dtype}: it must be of floats")
    if not value.isfinite().all():
        raise ValueError(f"weight {name!r} holds NaN or infinity")


def check_same(a: Graph, b: Graph, rows_a: int, rows_b: int) -> None:
    """Raises: ValueError: two programs differ in more than the number of rows."""
    problem = f"with {rows_b} rows the program is another one than with {rows_a}: "
    if len(a.nodes) != len(b.nodes):
        raise ValueError(f"{problem}{len(b.nodes)} operations, not {len(a.nodes)}")
    place_a = {node: i for i, node in enumerate(a.nodes)}
    place_b = {node: i for i, node in enumerate(b.nodes)}
    for x, y in zip(a.nodes, b.nodes, strict=True):
        same = x.op == y.op and x.attributes == y.attributes
        same &= [place_a[n] for n in x.inputs] == [place_b[n] for n in y.inputs]
        if x.data is not None and y.data is not None:
            same &= torch.equal(x.data, y.data)
        if not same:
            raise ValueError(f"{problem}{x.op} depends on the number of rows")
        rest = x.type.shape[1:] == y.type.shape[1:]
        first = x.type.shape == y.type.shape or (
            x.type.shape[0] == rows_a and y.type.shape[0] == rows_b
        )
        if not (rest and first):
            raise ValueError(
                f"{problem}{x.op} makes {x.type} and {y.type}: more than the first"
                " dimension follows the rows"
            )


def bound(network: Network) -> Graph:
    """The program with its weights as constants, for `to_onnx`.

    What depends on weights alone is computed, such as their scales; Q and DQ stay.
    """

    def rewrite(old: Node, node: Node, program: list[Node]) -> Node:
        data = [each.data for each in node.inputs]
        known = data and all(each is not None for each in data)
        if old in network.weights:
            value = network.values[network.weights[old]]
            node = constant(value.detach(), node.type.dtype)
        elif known and node.op not in ("quantize", "dequantize"):
            node = constant(OPS[node.op].run(data, node.attributes), node.type.dtype)
        program.append(node)
        return node

    whole = rebuilt(network.graph, rewrite)
    return remove_dead(Graph(network.inputs, whole.nodes, whole.outputs))


# Plugins -----------------------------------------------------------------------------


def register_plugin(
    name: str,
    shape: Callable[[list[tuple[int, ...]], tuple], tuple[int, ...]],
    run: Callable[[list[Tensor], tuple], Tensor],
) -> None:
    """Add an operation. It runs as a layer of its own: nothing is fused with it.

    Args:
        shape: (shapes of the inputs, attributes) → shape of the result.
        run: (tensors, attributes) → the result.

    Raises:
        ValueError: there is an operation of this name.
    """
    if name in OPS:
        raise ValueError(f"plugin {name!r}: there is an operation of this name")
    OPS[name] = Op("plugin", shape, run)


def plugin(name: str, *operands: object, attributes: tuple = ()) -> object:
    """Use it, in a function that is captured or is not.

    Raises:
        ValueError: it was not registered.
    """
    if name not in OPS:
        raise ValueError(f"plugin {name!r} is not registered: register_plugin first")
    for each in operands:
        if not isinstance(each, Tensor) and hasattr(each, "emit"):
            return each.emit(name, *operands, attributes=attributes)
    return OPS[name].run(list(operands), attributes)
