"""A graph as an ONNX file's contents, for onnxruntime and others to read.

Opset 17, and 19 where there are codes of FP8. A product whose second input is read
transposed becomes a Transpose and a MatMul; effects other than a draw have no operation
there. `quantize` and `dequantize` are operations of the room `tensorrt`; their scales
must be constants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llmlab.compilers.front_end.ir import Graph, Node

if TYPE_CHECKING:
    import onnx

NAMES = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "maximum": "Max",
    "neg": "Neg",
    "exp": "Exp",
    "tanh": "Tanh",
    "sqrt": "Sqrt",
    "draw": "RandomUniformLike",
}
SCALED = {"quantize": "QuantizeLinear", "dequantize": "DequantizeLinear"}
MOVES = ("reshape", "transpose", "neg", "max", "maximum")  # of codes as of numbers
CODES = {"int8": "INT8", "e4m3": "FLOAT8E4M3FN", "e5m2": "FLOAT8E5M2"}


def to_onnx(graph: Graph) -> onnx.ModelProto:
    """The model; inputs and outputs are called in0, in1 … and out0, out1 …

    Raises:
        ValueError: an operation that ONNX has not, or a graph that changes its inputs.
    """
    from onnx import TensorProto, checker, helper, numpy_helper

    if graph.updates:
        raise ValueError("this program changes its inputs, and ONNX cannot say that")
    kinds = {torch.float32: TensorProto.FLOAT, torch.float64: TensorProto.DOUBLE}
    names = {node: f"v{i}" for i, node in enumerate(graph.nodes)}
    names.update({node: f"in{i}" for i, node in enumerate(graph.inputs)})
    nodes, constants = [], []

    def number_list(name: str, values: tuple[int, ...]) -> str:
        data = torch.tensor(values, dtype=torch.int64).numpy()
        constants.append(numpy_helper.from_array(data, name))
        return name

    def emit(op: str, inputs: list[str], output: str, **attributes) -> None:
        nodes.append(helper.make_node(op, inputs, [output], **attributes))

    small = any(form_of(node) in ("e4m3", "e5m2") for node in graph.nodes)
    readers = graph.users()
    for node in graph.nodes:
        here = names[node]
        read = reads(node, names, here, constants)
        only_scale = readers[node] and all(is_scale(node, x) for x in readers[node])
        if node.kind == "constant" and only_scale and node not in graph.outputs:
            continue  # written where it is read
        if node.kind == "constant":
            constants.append(numpy_helper.from_array(node.data.numpy(), here))
        elif node.op in NAMES:
            emit(NAMES[node.op], read, here)
        elif node.op in SCALED:
            scale, axis, zero = scale_and_zero(node, here)
            constants += [scale, zero]
            emit(SCALED[node.op], [read[0], scale.name, zero.name], here, **axis)
        elif node.op == "sum" or (node.op == "max" and small):
            axes = number_list(f"{here}_axes", node.attributes)
            emit("ReduceSum" if node.op == "sum" else "ReduceMax", [*read, axes], here)
        elif node.op == "max":  # axes are an input from opset 18 on
            emit("ReduceMax", read, here, axes=list(node.attributes))
        elif node.op == "transpose":
            emit("Transpose", read, here, perm=list(node.attributes[0]))
        elif node.op == "reshape":
            shape = number_list(f"{here}_shape", node.attributes[0])
            # a 0 would else mean: the size that it had
            empty = {"allowzero": 1} if 0 in node.attributes[0] else {}
            emit("Reshape", [*read, shape], here, **empty)
        elif node.op == "matmul":
            emit("MatMul", [read[0], second(node, read[1], here, emit)], here)
        elif node.kind != "input":
            raise ValueError(f"ONNX has no operation for {node.op!r}")
    results = []
    for i, node in enumerate(graph.outputs):
        emit("Identity", [names[node]], f"out{i}")
        results.append((f"out{i}", node))
    given = [(names[node], node) for node in graph.inputs]
    infos = [
        [
            helper.make_tensor_value_info(n, kinds[x.type.dtype], x.type.shape)
            for n, x in y
        ]
        for y in (given, results)
    ]
    opset = [helper.make_opsetid("", 19 if small else 17)]
    body = helper.make_graph(nodes, "program", *infos, initializer=constants)
    model = helper.make_model(body, opset_imports=opset, ir_version=9)
    checker.check_model(model, full_check=True)
    return model


def second(node: Node, name: str, here: str, emit) -> str:
    """The name of a product's second input, as ONNX reads it."""
    if not node.attributes[0]:
        return name
    rank = len(node.inputs[1].type.shape)
    order = [*range(rank - 2), rank - 1, rank - 2]
    emit("Transpose", [name], f"{here}_turned", perm=order)
    return f"{here}_turned"


def is_scale(node: Node, reader: Node) -> bool:
    """Whether it is read as a scale, and as nothing else."""
    return reader.op in SCALED and reader.inputs[0] is not node


def form_of(node: Node) -> str | None:
    """The format of the codes that a value holds; None if it holds numbers."""
    while node.op in MOVES:
        node = next((x for x in node.inputs if x.number is None), node.inputs[0])
    return node.attributes[0] if node.op == "quantize" else None


def reads(
    node: Node, names: dict[Node, str], here: str, constants: list[onnx.TensorProto]
) -> list[str]:
    """The names of its inputs. An operation on codes reads codes: its 0 is one, too.

    Raises:
        ValueError: ONNX has no such operation on codes.
    """
    from onnx import TensorProto, helper

    found = [names[each] for each in node.inputs]
    form = form_of(node) if node.op in MOVES else None
    if form not in (None, "int8") and node.op != "reshape":
        raise ValueError(
            f"ONNX has no operation for {node.op!r} of codes in {form}: place Q and DQ"
            " with carry=False"
        )
    for place, each in enumerate(node.inputs):
        if form is not None and each.number is not None:
            found[place] = f"{here}_zero"
            constants.append(
                helper.make_tensor(found[place], TensorProto.INT8, (), [0])
            )
    return found


def scale_and_zero(
    node: Node, here: str
) -> tuple[onnx.TensorProto, dict[str, int], onnx.TensorProto]:
    """A scale as ONNX reads it, its axis, and zeros that say what the codes are.

    Raises:
        ValueError: the scale is computed when the program runs.
    """
    from onnx import TensorProto, helper, numpy_helper

    scale = node.inputs[1]
    if scale.data is None:
        raise ValueError(f"{node.op}: its scale must be a constant")
    wide = [i for i, size in enumerate(scale.type.shape) if size > 1]
    data = scale.data.flatten() if wide else scale.data.reshape(())
    last = len(node.type.shape) - len(scale.type.shape)
    axis = {"axis": last + wide[0]} if wide else {}
    codes = node if node.op == "quantize" else node.inputs[0]
    kind = getattr(TensorProto, CODES[form_of(codes)])
    zeros = helper.make_tensor(f"{here}_zero", kind, data.shape, [0] * data.numel())
    return numpy_helper.from_array(data.numpy(), f"{here}_scale"), axis, zeros
