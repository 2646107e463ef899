"""From the front end's graph to the dialect.

The graph knows sums and products. It was captured from `F.gelu` and `torch.softmax`,
and has forgotten their names: a GELU is nine operations. The dialect has the names, so
the import looks for the forms (patterns of the front end's `match`) and gives them
back. What it finds is used; the pieces have no reader then, and are dead.

This is raising. It works on forms that somebody thought of.
"""

from __future__ import annotations

import math

import numpy as np
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, UnitAttr, i64
from xdsl.ir import Block, SSAValue
from xdsl.transforms.dead_code_elimination import region_dce

from llmlab.compilers.front_end import Bindings, Graph, Node, match
from llmlab.compilers.mlir import dialect as lab


def rounded(number: float) -> float:
    """As it stands in a constant of fp32."""
    return float(np.float32(number))


CUBE = ("mul", ("mul", "x", "x"), "x")
INNER = (
    "mul",
    rounded(math.sqrt(2 / math.pi)),
    ("add", "x", ("mul", rounded(0.044715), CUBE)),
)
GELU = ("mul", ("mul", 0.5, "x"), ("add", 1.0, ("tanh", INNER)))
EXP = ("exp", ("sub", "x", ("max:dim", "x")))
SOFTMAX = ("div", EXP, ("sum:dim", EXP))


def is_gelu(node: Node, found: Bindings) -> bool:
    """Whether it is the tanh form of a GELU of found["x"]."""
    return match(GELU, node, found)


def is_softmax(node: Node, found: Bindings) -> bool:
    """Whether it is a softmax of found["x"] along its last dimension."""
    if not match(SOFTMAX, node, found):
        return False
    return found["dim"] == (len(node.type.shape) - 1,)


def is_add_bias(node: Node, found: Bindings) -> bool:
    """Whether it adds found["b"], one number for each column, to found["x"]."""
    if not match(("add", "x", "b"), node, found):
        return False
    if len(found["x"].type.shape) < len(found["b"].type.shape):
        found["x"], found["b"] = found["b"], found["x"]
    x, b = found["x"].type.shape, found["b"].type.shape
    return len(x) > 1 and b == x[-1:]


FORMS = (
    (is_gelu, lab.GeluOp, ("x",)),
    (is_softmax, lab.SoftmaxOp, ("x",)),
    (is_add_bias, lab.AddBiasOp, ("x", "b")),
)


def from_graph(graph: Graph, raising: bool = True) -> ModuleOp:
    """A captured program as a module of the dialect.

    Args:
        raising: whether forms are given their names back.
    Raises:
        ValueError: it changes an input, or has an effect.
    """
    effects = [node.op for node in graph.nodes if node.kind == "effect"]
    if effects or graph.updates:
        raise ValueError(f"the dialect has no effects: {effects or 'inputs change'}")
    module, block = lab.program(
        [node.type.shape for node in graph.inputs],
        [node.type.shape for node in graph.outputs],
    )
    values: dict[Node, SSAValue] = dict(zip(graph.inputs, block.args, strict=True))
    for node in graph.nodes:
        if node not in values:
            values[node] = imported(node, values, block, raising)
    lab.finish(block, *(values[node] for node in graph.outputs))
    region_dce(module.body)
    module.verify()
    return module


def imported(
    node: Node, values: dict[Node, SSAValue], block: Block, raising: bool
) -> SSAValue:
    """The value of one node, its operation appended."""
    op = (raised(node, values) if raising else None) or plain(node, values)
    block.add_op(op)
    return op.results[0]


def raised(node: Node, values: dict[Node, SSAValue]) -> lab.LabOp | None:
    """The operation whose form the node ends."""
    for is_form, kind, letters in FORMS:
        found: Bindings = {}
        # a constant of more dimensions makes the result larger than x
        if is_form(node, found) and found["x"].type.shape == node.type.shape:
            return kind.make(*(values[found[letter]] for letter in letters))
    return None


def plain(node: Node, values: dict[Node, SSAValue]) -> lab.LabOp:
    """The operation of the same name."""
    if node.data is not None:
        return lab.constant(node.data.flatten().tolist(), *node.type.shape)
    operands = [values[each] for each in node.inputs]
    properties = {}
    if node.op == "matmul" and node.attributes[0]:
        properties["transposed"] = UnitAttr()
    elif node.op in ("sum", "max"):
        properties["dim"] = IntegerAttr(node.attributes[0], i64)
    elif node.op == "transpose":
        properties["order"] = lab.dims(*node.attributes[0])
    elif node.op == "reshape":
        properties["to"] = lab.dims(*node.attributes[0])
    return lab.BY_NAME[node.op].make(*operands, **properties)
