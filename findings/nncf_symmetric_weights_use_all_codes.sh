#!/usr/bin/env bash
# nncf 3.4.0 with openvino 2026.4.1, weight compression: of symmetric rounding to b bits one
# expects the scale max|w| / (2^(b-1) - 1), as in bitsandbytes, torchao, llmcompressor and
# the papers, and scales above 0. INT8_SYM and INT4_SYM divide by 2^(b-1), so that the
# code -2^(b-1) is used too, and turn the scale's sign in the rows whose largest weight is
# positive: that weight becomes the code -2^(b-1) with a negative scale. Who reads such a
# model must not assume positive scales, nor codes from -127 or -7.
#
# Seen, one row whose largest weight is +1.5 and one where it is -1.5:
#   8 bits: scales -1.5/128 and 1.5/128, the code of the largest is -128 in both
#   4 bits: scales -1.5/8 and 1.5/8, the code of the largest is -8 in both
#
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.10 to 3.13.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip openvino==2026.4.1 nncf==3.4.0

"$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import logging
import sys

import nncf
import numpy as np
import openvino as ov
from nncf import CompressWeightsMode as Mode
from openvino import opset13 as op

logging.disable(logging.INFO)
for library in ("nncf", "openvino"):
    print(library, importlib.metadata.version(library))
weights = np.linspace(-0.9, 0.9, 64, dtype=np.float32)[None].repeat(2, 0).copy()
weights[0, 40] = 1.5
weights[1, 20] = -1.5


def compressed(mode, **settings):
    """Scales of the two rows, and the codes of their largest weights."""
    x = op.parameter([1, 64], ov.Type.f32)
    product = op.matmul(x, op.constant(weights, ov.Type.f32), False, True)
    model = nncf.compress_weights(ov.Model([product], [x]), mode=mode, **settings)
    scale = codes = None
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant":
            continue
        kind, values = node.get_element_type(), node.get_data()
        if kind == ov.Type.i4:
            packed = np.frombuffer(values.tobytes(), np.uint8)
            halves = np.stack([packed & 15, packed >> 4], -1).flatten().astype(int)
            codes = np.where(halves > 7, halves - 16, halves)[:128]
        elif kind == ov.Type.i8:
            codes = np.asarray(values).astype(int)
        elif "scale" in node.get_friendly_name():
            scale = np.asarray(values).astype(float).flatten()
    codes = codes.reshape(2, 64)
    return scale, (int(codes[0, 40]), int(codes[1, 20]))


as_stated = True
for bits, mode, settings in (
    (8, Mode.INT8_SYM, {}),
    (4, Mode.INT4_SYM, {"all_layers": True, "group_size": -1}),
):
    scale, codes = compressed(mode, **settings)
    expected = 1.5 / 2 ** (bits - 1)
    print(f"{bits} bits: scales {scale}, codes of the largest {codes}")
    as_stated &= np.allclose(scale, [-expected, expected], rtol=2e-3)
    as_stated &= codes == (-(2 ** (bits - 1)),) * 2
sys.exit(0 if as_stated else 1)
PYTHON
