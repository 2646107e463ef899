#!/usr/bin/env bash
# ONNX Runtime 1.32.0: one would expect quantize_static(…, extra_options={"SmoothQuant":
# True}) to smooth, or to name the package that it lacks. It looks for a module of Intel's
# neural-compressor 2, and version 3 (3.10 here), which pip installs, has moved it. So with
# the package installed it raises "neural-compressor is not correctly installed". Without
# that option the same model is quantised.
#
# Seen, neural-compressor 3.10 beside it:
#   plain: quantised; SmoothQuant: RuntimeError, neural-compressor is not correctly
#   installed; the cause: No module named 'neural_compressor.adaptor'
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.10 to 3.12.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip onnxruntime==1.32.0 onnx==1.23.2 neural-compressor==3.10

cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import logging
import sys
from importlib.metadata import version

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static

logging.disable(logging.CRITICAL)
print(
    f"onnxruntime {version('onnxruntime')},"
    f" neural_compressor {version('neural_compressor')}"
)
random = np.random.default_rng(0)
weight = numpy_helper.from_array(random.normal(size=(4, 3)).astype("float32"), "w")
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "w"], ["y"])],
    "one product",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
    [weight],
)
onnx.save(
    helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ),
    "product.onnx",
)


class Reader(CalibrationDataReader):
    """Two batches."""

    left = 2

    def get_next(self):
        self.left -= 1
        x = random.normal(size=(2, 4)).astype("float32")
        return {"x": x} if self.left >= 0 else None


def attempt(options):
    try:
        quantize_static("product.onnx", "out.onnx", Reader(), extra_options=options)
    except RuntimeError as error:
        print(f"{options}: RuntimeError, {error} (cause: {error.__cause__})")
        return str(error), str(error.__cause__)
    print(f"{options}: quantised")
    return None


plain = attempt({})
smooth = attempt({"SmoothQuant": True})
as_stated = (
    plain is None
    and smooth is not None
    and "not correctly installed" in smooth[0]
    and "neural_compressor.adaptor" in smooth[1]
)
print("as stated" if as_stated else "changed")
sys.exit(not as_stated)
PYTHON
