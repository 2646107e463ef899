#!/usr/bin/env bash
# onnxruntime 1.32.0, CPU, the operation Sigmoid in float32. Between 0 and ½ a float32 has
# room for a sigmoid with seven digits down to −87, and torch uses it; so one would expect
# at least the order to be kept. The error is 1e-7 of 1, not of the result: from −14 on more
# than a tenth of it, below −18 it is 0. In between some dozen values occur, and a larger
# x can have a smaller one. log(sigmoid(x)) is −∞ from −18 on, where it should be x. The same
# model in float64 has all digits; Softplus has, too, so −Softplus(−x) is the logarithm.
#
# Seen:
#   x −16, −17, −18, −20: 6.0e-08, 8.9e-08, 0, 0 (right: 1.1e-07, 4.1e-08, 1.5e-08, 2.1e-09)
#   16,667 numbers from −18 to −15: 14 different results, which thousands of times go down
#   −Softplus(−x): −16, −17, −18, −20
# (How many, and the values at −16 and −17, may differ from CPU to CPU.)
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

import numpy as np
import onnxruntime as ort
from onnx import helper

ort.set_default_logger_severity(3)


def run(operation, x):
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    given, made = (
        helper.make_tensor_value_info(name, kind, x.shape) for name in ("x", "y")
    )
    graph = helper.make_graph(
        [helper.make_node(operation, ["x"], ["y"])], "one", [given], [made]
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    session = ort.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


x = np.array([-16, -17, -18, -20], np.float32)
right = 1 / (1 + np.exp(-x.astype(np.float64)))
single, double = run("Sigmoid", x), run("Sigmoid", x.astype(np.float64))
logarithm = -run("Softplus", -x)
print("onnxruntime", ort.__version__, "float32", single, "float64", double)
print("right", right, "-Softplus(-x)", logarithm)
tail = np.linspace(-18, -15, 16_667, dtype=np.float32)[1:]
found = run("Sigmoid", tail)
values, down = len(np.unique(found)), int((np.diff(found) < 0).sum())
error = np.abs(found * (1 + np.exp(-tail.astype(np.float64))) - 1).max()
print(f"{values} values, {down} times down, relative error up to {error:.2f}")
as_stated = (
    (single[2:] == 0).all()
    and np.allclose(double, right, rtol=1e-12)
    and np.allclose(logarithm, x, rtol=1e-6)
    and values < 100
    and down > 1000
    and error > 0.5
)
sys.exit(0 if as_stated else 1)
PYTHON
