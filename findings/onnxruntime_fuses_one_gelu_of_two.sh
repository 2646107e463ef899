#!/usr/bin/env bash
# onnxruntime 1.32.0, CPU: a GELU that is spelled out in small operations becomes one node
# at the level "extended", so one would expect that of both of its forms. The exact form
# (with Erf) becomes Gelu. The tanh form, which GPT-2, Gemma and others use, stays as it
# is, with x³ as Pow or as two products, with ½ first or last.
#
# Seen:
#   erf form: Gelu                       tanh form, four spellings: 8 or 9 nodes, none fused
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.11 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0

"$work/venv/bin/python" - <<'PYTHON'
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

print(f"onnxruntime {ort.__version__}, onnx {onnx.__version__}")
ort.set_default_logger_severity(3)
CUBES = {
    "Pow": [("Pow", ["x", 3.0], "x3")],
    "Mul": [("Mul", ["x", "x"], "x2"), ("Mul", ["x2", "x"], "x3")],
}
INNER = [
    ("Mul", ["x3", 0.044715], "a"),
    ("Add", ["x", "a"], "b"),
    ("Mul", ["b", 0.7978845608], "c"),
    ("Tanh", ["c"], "d"),
    ("Add", ["d", 1.0], "e"),
]
ENDS = {
    "half last": [("Mul", ["x", "e"], "f"), ("Mul", ["f", 0.5], "y")],
    "half first": [("Mul", ["x", 0.5], "f"), ("Mul", ["f", "e"], "y")],
}
ERF = [
    ("Div", ["x", 1.4142135624], "a"),
    ("Erf", ["a"], "b"),
    ("Add", ["b", 1.0], "c"),
    ("Mul", ["x", "c"], "d"),
    ("Mul", ["d", 0.5], "y"),
]


def optimised(steps):
    """The operations that are left, and the result for a few numbers."""
    constants, nodes = {}, []
    for op, inputs, output in steps:
        names = []
        for value in inputs:
            if isinstance(value, float):
                name = f"c{value}"
                data = np.array(value, dtype=np.float32)
                constants[name] = numpy_helper.from_array(data, name)
                value = name
            names.append(value)
        nodes.append(helper.make_node(op, names, [output]))
    x, y = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 8]) for n in ("x", "y")
    )
    graph = helper.make_graph(nodes, "gelu", [x], [y], list(constants.values()))
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "m.onnx")
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        left = onnx.load(options.optimized_model_filepath).graph.node
    numbers = np.linspace(-3, 3, 16, dtype=np.float32).reshape(2, 8)
    return [node.op_type for node in left], session.run(None, {"x": numbers})[0]


exact, wanted = optimised(ERF)
print("erf form:", *exact)
as_stated = exact == ["Gelu"]
for cube, first in CUBES.items():
    for end, last in ENDS.items():
        left, found = optimised([*first, *INNER, *last])
        print(f"tanh form, {cube}, {end}:", *left)
        as_stated &= len(left) == len([*first, *INNER, *last]) and "Tanh" in left
        assert np.abs(found - wanted).max() < 1e-3
sys.exit(0 if as_stated else 1)
PYTHON
