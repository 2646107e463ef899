#!/usr/bin/env bash
# onnxruntime 1.32.0: quantize_static with CalibrationMethod.Entropy should clip rare large
# values, as its name and TensorRT's method of that name do. Its histogram has 128 bins and
# keeps 128 of them at least, so there is one candidate, the maximum; and neither number
# can be given to quantize_static. The scales equal those of MinMax. With 2048 bins, asked
# of the calibrator itself, the same data are clipped.
#
# Seen, 65,536 normal numbers with one of 40 among them: scales of Entropy and MinMax are
# equal; with 2048 bins the range is below a fifth of the maximum
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.11 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 sympy

"$work/venv/bin/python" - <<'PYTHON'
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization as q
from onnxruntime.quantization.calibrate import HistogramCollector

onnxruntime.set_default_logger_severity(3)
random = np.random.default_rng(0)
x = random.standard_normal((64, 1024), dtype=np.float32)
x[3, 5] = 40.0
w = numpy_helper.from_array(random.standard_normal((1024, 8), dtype=np.float32), "w")
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "w"], ["y"])],
    "one product",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [64, 1024])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 8])],
    [w],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
model.ir_version = 9


class Reader(q.CalibrationDataReader):
    def __init__(self):
        self.batches = iter([{"x": x}])

    def get_next(self):
        return next(self.batches, None)


folder = Path(tempfile.mkdtemp())
onnx.save(model, folder / "m.onnx")
scales = {}
for method in (q.CalibrationMethod.MinMax, q.CalibrationMethod.Entropy):
    q.quantize_static(
        folder / "m.onnx",
        folder / "q.onnx",
        Reader(),
        calibrate_method=method,
        extra_options={"ActivationSymmetric": True},
    )
    scales[method.name] = {
        each.name: numpy_helper.to_array(each).tolist()
        for each in onnx.load(folder / "q.onnx").graph.initializer
        if "scale" in each.name
    }
collector = HistogramCollector("entropy", True, 2048, 128, 99.99, "all")
collector.collect({"x": [x]})
low, high, *_ = collector.compute_collection_result()["x"]
print("onnxruntime", onnxruntime.__version__, scales, "2048 bins:", low, high)
equal = scales["MinMax"] == scales["Entropy"] and len(scales["MinMax"]) >= 2
sys.exit(not (equal and high < 8))
PYTHON
