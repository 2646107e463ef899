"""Explicit quantisation: Q and DQ stand in the program, and decide what runs in 8 bits.

    quantize    x, s → codes of x / s, rounded and clipped
    dequantize  q, s → q s

A product whose inputs are both dequantised runs on their codes; so each input of a
product with a weight gets a pair: one scale for the whole of an input, one for each
column of a weight. Then codes are carried as far as they go, so that what is written
to memory between two layers has a quarter of the bytes:

    Q goes up     Q(reshape x) = reshape(Q x), and so for a transpose, a sign, a maximum
                  along a row, a maximum with 0: rounding keeps the order of numbers
    DQ goes down  reshape(DQ q) = DQ(reshape q), and so for the same operations
    DQ, then Q    with the same scale: nothing

Nothing else commutes: an addition of codes with two scales means nothing, and
GELU(s q) is not s' GELU(q). There Q must stand behind, where GELU's result is read by
the next product, and not before.

In this program codes are floats that hold whole numbers; a layer stores them in 8 bits.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from llmlab.compilers.front_end import (
    OPS,
    Graph,
    Node,
    Op,
    broadcast,
    constant,
    home,
    made,
    merge_equal,
    rebuilt,
    remove_dead,
    run,
)
from llmlab.compilers.tensorrt.calibration import Histogram, format_of, histogram
from llmlab.compilers.tensorrt.network import Network

TINY = 1e-12  # the least scale: a column of zeros has codes, too


def to_codes(x: Sequence[Tensor], attributes: tuple) -> Tensor:
    """Codes, as floats."""
    return format_of(attributes[0]).codes(x[0], x[1])


def wide(shapes: list[tuple[int, ...]], attributes: tuple) -> tuple[int, ...]:
    """The shape of x and a scale together."""
    return broadcast(shapes)


# two more lines of the front end's table, which makes them operations like any other
OPS["quantize"] = Op("elementwise", wide, to_codes)
OPS["dequantize"] = Op("elementwise", wide, lambda x, _: x[0] * x[1])


def has_weight(node: Node, weights: Container[Node]) -> bool:
    """Whether it is a product with a matrix of weights; a batch of them stays."""
    if node.op != "matmul" or node.inputs[1] not in weights:
        return False
    return len(node.inputs[1].type.shape) == 2


def quantised_values(
    graph: Graph, weights: Iterable[Node], residuals: bool = False
) -> list[Node]:
    """The values that need a scale: what products with a weight read beside it.

    Args:
        residuals: also what is added to the result of such a product: then the layer
            that adds reads 8 bits of it, not 32.
    """
    weights = set(weights)
    found: dict[Node, None] = {}
    products = set()
    for node in graph.nodes:
        if has_weight(node, weights):
            found[node.inputs[0]] = None
            products.add(node)
        elif residuals and node.op == "add":
            for one, other in (node.inputs, node.inputs[::-1]):
                if one in products and other.type == node.type:
                    found[other] = None
    return list(found)


def observe(
    network: Network,
    values: Sequence[Node],
    batches: Iterable[Sequence[Tensor]],
    bins: int = 2048,
) -> dict[Node, Histogram]:
    """A histogram of each of these values, while the network runs on examples.

    Raises:
        ValueError: there is no example, or a value holds NaN or infinity.
    """
    weights = [network.values[name] for name in network.weights.values()]
    graph = network.graph
    watched = Graph(graph.inputs, graph.nodes, list(values))
    seen: list[list[Tensor]] = [[] for _ in values]
    for batch in batches:
        for held, value in zip(seen, run(watched, *batch, *weights), strict=True):
            held.append(value)
    if values and not seen[0]:
        raise ValueError("batches is empty: calibration needs examples")
    return {
        node: histogram(held, bins) for node, held in zip(values, seen, strict=True)
    }


def quantise(
    network: Network,
    scales: Mapping[Node, float],
    form: str = "int8",
    residuals: bool = False,
    carry: bool = True,
) -> Network:
    """The network with a pair of Q and DQ at each input of each product with a weight.

    Args:
        scales: of each of `quantised_values`.
        carry: whether Q and DQ move from where they were put.

    Raises:
        ValueError: a scale is missing, or is not above zero and finite.
    """
    kind = format_of(form)
    graph = network.graph
    wanted = quantised_values(graph, network.weights, residuals)
    for i, node in enumerate(wanted):
        if not 0 < scales.get(node, 0) < float("inf"):
            raise ValueError(
                f"scales of value {i} ({node.op}, {node.type}) is"
                f" {scales.get(node)}: it must be above zero and finite"
            )
    numbers = {node: constant(scales[node]) for node in wanted}
    new: dict[Node, Node] = {}
    pairs: dict[Node, Node] = {}
    program: list[Node] = []

    def add(node: Node) -> Node:
        program.append(node)
        return node

    def pair(old: Node, scale: Node) -> Node:
        """DQ(Q(x)); one for all who read x."""
        if old not in pairs:
            codes = add(made("quantize", [new[old], scale], (form,)))
            pairs[old] = add(made("dequantize", [codes, scale]))
        return pairs[old]

    products = set()
    for node in graph.nodes:
        inputs = [new[each] for each in node.inputs]
        if has_weight(node, network.weights):
            x, w = node.inputs
            if x not in pairs:
                add(numbers[x])
            scale = None if w in pairs else weight_scale(w, node, kind.largest, program)
            inputs = [pair(x, numbers[x]), pair(w, scale)]
            products.add(node)
        elif residuals and node.op == "add":
            for place in (0, 1):
                other = node.inputs[place]
                beside = node.inputs[1 - place] in products
                if beside and other in numbers and other not in products:
                    if other not in pairs:
                        add(numbers[other])
                    inputs[place] = pair(other, numbers[other])
        same = all(a is b for a, b in zip(inputs, node.inputs, strict=True))
        if same:
            new[node] = add(node)
        else:
            new[node] = add(
                Node(node.op, tuple(inputs), node.type, node.attributes, node.data)
            )
    outputs = [new[node] for node in graph.outputs]
    placed = Graph(graph.inputs, program, outputs)
    if carry:
        placed = carried(placed)
    return Network(placed, network.weights, network.values, network.profiles)


def weight_scale(
    weight: Node, product: Node, largest: float, program: list[Node]
) -> Node:
    """max |w| of each column of the product, / the largest code: as operations.

    So a new weight (refit) gets new scales.
    """
    inner = 1 if product.attributes[0] else 0  # the dimension that is summed over
    negative = made("neg", [weight])
    absolute = made("maximum", [weight, negative])
    top = made("max", [absolute], (inner,))
    number = constant(1 / largest)
    scaled = made("mul", [top, number])
    least = constant(TINY)
    scale = made("maximum", [scaled, least])
    program += [negative, absolute, top, number, scaled, least, scale]
    return scale


def moves_through(node: Node) -> bool:
    """Whether f(Q(x)) = Q(f(x)) and f(s q) = s f(q), for one scale s > 0.

    It is so where f picks numbers, or changes their sign: rounding keeps the order of
    numbers, and the codes are symmetric.
    """
    if node.kind == "layout" or node.op in ("neg", "max"):
        return True
    return node.op == "maximum" and any(each.number == 0 for each in node.inputs)


def carried(graph: Graph) -> Graph:
    """Q as early and DQ as late as they go: until nothing moves."""
    text = ""
    while str(graph) != text:
        text = str(graph)
        graph = merge_equal(remove_dead(moved_once(graph)))
    return graph


def moved_once(graph: Graph) -> Graph:
    """Each pair that can change places does so once."""
    users = graph.users()
    results = set(graph.results)

    def read_once(node: Node) -> bool:
        return len(set(users[node])) == 1 and node not in results

    def rewrite(old: Node, node: Node, program: list[Node]) -> Node:
        # who else reads what is moved would miss it
        alone = [read_once(each) for each in old.inputs]
        if old.op == "quantize" and old.inputs[0].op == "max":
            # codes of all that a maximum reads are more bytes, if the numbers are
            # there for others, too
            source = home(old.inputs[0].inputs[0])
            alone[0] &= read_once(source) and source.op != "input"
        changed = (
            cancelled(node)
            or earlier(node, alone, program)
            or later(node, alone, program)
        )
        if changed is None:
            program.append(node)
        return changed or node

    return rebuilt(graph, rewrite)


def cancelled(node: Node) -> Node | None:
    """Q(DQ(q)) with one scale is q."""
    if node.op != "quantize" or node.inputs[0].op != "dequantize":
        return None
    codes, scale = node.inputs[0].inputs
    return codes if scale is node.inputs[1] else None


def earlier(node: Node, alone: list[bool], program: list[Node]) -> Node | None:
    """Q(f(x)) as f(Q(x)), where they commute."""
    if node.op != "quantize" or not alone[0] or not scalar(node.inputs[1]):
        return None
    first, scale = node.inputs
    if not moves_through(first):
        return None
    inside = []
    for each in first.inputs:
        if each.number != 0:
            program.append(made("quantize", [each, scale], node.attributes))
            each = program[-1]
        inside.append(each)
    program.append(made(first.op, inside, first.attributes))
    return program[-1]


def later(node: Node, alone: list[bool], program: list[Node]) -> Node | None:
    """f(DQ(q)) as DQ(f(q)), where they commute."""
    if not moves_through(node):
        return None
    places = [i for i, each in enumerate(node.inputs) if each.op == "dequantize"]
    if not places or not alone[places[0]]:
        return None
    codes, scale = node.inputs[places[0]].inputs
    if not scalar(scale):
        return None
    read = [codes if i == places[0] else each for i, each in enumerate(node.inputs)]
    program.append(made(node.op, read, node.attributes))
    program.append(made("dequantize", [program[-1], scale]))
    return program[-1]


def scalar(node: Node) -> bool:
    """Whether it is one number."""
    return node.type.shape in ((), (1,))


def stored_format(node: Node) -> str | None:
    """The format of the codes that a value holds; None if it is a value in floats."""
    if node.op == "quantize":
        return node.attributes[0]
    if node.op == "input" and node.attributes:
        return node.attributes[0]
    if moves_through(node):
        return next(filter(None, map(stored_format, node.inputs)), None)
    return None


def stored_bytes(node: Node) -> int:
    """What a value takes in memory: codes have one byte each."""
    if stored_format(node) is None:
        return node.type.bytes
    return node.type.bytes // torch.float32.itemsize
