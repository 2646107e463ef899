"""Layer fusion: which operations of a network become one layer of an engine.

    vertical     a product and what is done with its rows: the front end's rule of
                 fusion; Q ends a layer, so that codes are what is written
    int8         DQ of both inputs goes into the product that reads them: the layer
                 reads codes, and multiplies codes
    horizontal   layers whose products read the same value become one: x is read once,
                 and their weights may be one matrix (q, k and v; gate and up)

What depends on weights alone is computed when the engine is built, up to the codes of a
weight and no further: with its DQ computed, too, the product would be one of floats.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmlab.compilers.front_end import Graph, Kernel, Node, fuse, made
from llmlab.compilers.tensorrt.network import Network
from llmlab.compilers.tensorrt.placement import stored_bytes, stored_format


@dataclass(eq=False)
class Layer:
    """Operations that run together.

    Attributes:
        nodes: each after those that it reads.
        reads: values from outside.
        roots: values that are read outside; one, or one for each product.
    """

    nodes: list[Node]
    reads: list[Node]
    roots: list[Node]

    @property
    def products(self) -> list[Node]:
        return [node for node in self.nodes if node.op == "matmul"]

    @property
    def traffic(self) -> int:
        """Bytes that are read and written; a reshape moves none."""
        if all(node.op == "reshape" for node in self.nodes):
            return 0
        return sum(map(stored_bytes, [*self.reads, *self.roots]))

    @property
    def precision(self) -> str:
        """The format in which its products multiply, or f32."""
        formats = {operands_format(node) for node in self.products}
        return formats.pop() if len(formats) == 1 else "f32"

    def __str__(self) -> str:
        return " ".join(node.op for node in self.nodes)


def operands_format(product: Node) -> str:
    """int8, e4m3 …: the format of both operands, where both are dequantised."""
    a, b = product.inputs
    if a.op != "dequantize" or b.op != "dequantize":
        return "f32"
    first, second = (stored_format(each.inputs[0]) for each in (a, b))
    return first if first == second and first is not None else "f32"


# What is known when the engine is built ----------------------------------------------


@dataclass
class Split:
    """A network in two programs.

    Attributes:
        before: weights → what the engine stores, in the order of `stored`.
        after: inputs and what is stored → results.
        stored: inputs of `after` that are computed by `before`; each says its format.
    """

    before: Graph
    after: Graph
    stored: list[Node]


def split(network: Network) -> Split:
    """Take out what depends on weights and constants alone; never a DQ."""
    known: set[Node] = set(network.weights)
    for node in network.graph.nodes:
        computed = bool(node.inputs) and all(each in known for each in node.inputs)
        allowed = node.op != "dequantize" and node.kind != "effect"
        if node.kind == "constant" or (computed and allowed):
            known.add(node)
    rest = [node for node in network.graph.nodes if node not in known]
    read = [each for node in rest for each in node.inputs]
    read += network.graph.outputs
    edge = dict.fromkeys(n for n in read if n in known and n.number is None)
    new: dict[Node, Node] = {}
    for node in edge:
        form = stored_format(node)
        new[node] = Node("input", (), node.type, (form, "stored"))
    numbers = dict.fromkeys(each for each in read if each.number is not None)
    stored = list(new.values())
    program = [*network.inputs, *stored, *numbers]
    new.update({node: node for node in [*network.inputs, *numbers]})

    def shared(node: Node) -> bool:
        """A DQ is made for each reader anew: it costs nothing inside a layer."""
        return node.op != "dequantize" or node in network.graph.outputs

    def read_by_one(node: Node) -> Node:
        if shared(node):
            return new[node]
        program.append(made("dequantize", [new[each] for each in node.inputs]))
        return program[-1]

    for node in rest:
        if node in new or not shared(node):
            continue
        inputs = tuple(map(read_by_one, node.inputs))
        new[node] = Node(node.op, inputs, node.type, node.attributes)
        program.append(new[node])
    outputs = [new[node] for node in network.graph.outputs]
    after = Graph([*network.inputs, *stored], program, outputs)
    weights = list(network.weights)
    before = Graph(weights, [n for n in network.graph.nodes if n in known], list(edge))
    return Split(before, after, stored)


# Fusion -------------------------------------------------------------------------------


def fuse_layers(graph: Graph, horizontal: bool = True) -> list[Layer]:
    """The layers of a program, in an order in which they can run.

    Args:
        horizontal: whether products of the same value become one layer.
    """
    read = [node.inputs[0] for node in graph.work if node.op == "dequantize"]
    codes = [node for node in graph.work if node in read]
    ends = list(dict.fromkeys([*graph.outputs, *codes]))
    kernels = fuse(Graph(graph.inputs, graph.nodes, ends))
    layers = with_dequantize(graph, kernels)
    return beside(layers, graph) if horizontal else layers


def with_dequantize(graph: Graph, kernels: Sequence[Kernel]) -> list[Layer]:
    """Products take the DQ of their operands in."""
    users = graph.users()
    taken: set[Node] = set()
    for kernel in kernels:
        node = kernel.root
        alone = kernel.nodes == [node] and node.op == "dequantize"
        inner = node not in graph.outputs
        if alone and inner and all(user.op == "matmul" for user in users[node]):
            taken.add(node)
    layers = []
    for kernel in kernels:
        if kernel.root in taken:
            continue
        inside = [node for node in kernel.reads if node in taken]
        reads = [node for node in kernel.reads if node not in taken]
        more = [n for node in inside for n in node.inputs if n.number is None]
        reads = list(dict.fromkeys([*more, *reads]))
        layers.append(Layer([*inside, *kernel.nodes], reads, [kernel.root]))
    return layers


def beside(layers: list[Layer], graph: Graph) -> list[Layer]:
    """Layers whose products read one value, with weights that are stored, are joined.

    A layer joins an earlier one if all else that it reads was there before that one: it
    runs earlier than it did.
    """
    joined: list[Layer] = []
    for layer in layers:
        homes = [each for each in joined if may_join(each, layer, joined)]
        home = homes[0] if homes else None
        if home is None:
            joined.append(layer)
            continue
        home.nodes = list(dict.fromkeys([*home.nodes, *layer.nodes]))
        own = set(home.nodes)
        reads = dict.fromkeys([*home.reads, *layer.reads])
        home.reads = [node for node in reads if node not in own]
        home.roots = [*home.roots, *layer.roots]
    users = graph.users()
    for layer in joined:
        inside = set(layer.nodes)
        layer.roots = [
            root
            for root in layer.roots
            if root in graph.outputs or not inside.issuperset(users[root])
        ]
    return joined


def may_join(home: Layer, layer: Layer, order: list[Layer]) -> bool:
    """Whether `layer` may run inside the earlier `home`."""
    if not home.products or not layer.products:
        return False
    products = [*home.products, *layer.products]
    if not all(is_stored(weight_of(node)) for node in products):
        return False
    kinds = {(operand(n), n.attributes, operands_format(n)) for n in products}
    if len(kinds) > 1:
        return False
    later = order[order.index(home) + 1 :]
    made_later = {root for each in later for root in each.roots}
    return not made_later.intersection(layer.reads)


def operand(product: Node) -> Node:
    """What a product reads beside its weight: a value, or its codes."""
    x = product.inputs[0]
    return x.inputs[0] if x.op == "dequantize" else x


def weight_of(product: Node) -> Node:
    """The weight, or its codes."""
    w = product.inputs[1]
    return w.inputs[0] if w.op == "dequantize" else w


def is_stored(node: Node) -> bool:
    """Whether it is an input whose value the engine stores: a weight."""
    return node.op == "input" and "stored" in node.attributes


def traffic(layers: Iterable[Layer]) -> int:
    """Bytes that all layers read and write."""
    return sum(layer.traffic for layer in layers)
