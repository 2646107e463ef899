"""How OpenVINO rounds weights to nearest: tests/compression/golden/openvino.json.

Run it in an environment of its own (openvino 2026.4.1, nncf 3.4.0):

    python scripts/golden/openvino_goldens.py

`nncf.compress_weights` works on a model of one matrix product. Its codes, scales and
zero points are read from the constants of the graph; `product` is what OpenVINO then
computes on the CPU for one input, told to do so in float32.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import nncf
import numpy as np
import openvino as ov
from nncf import CompressWeightsMode as Mode
from openvino import opset13 as op

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tests" / "compression" / "golden" / "openvino.json"
# mode, and what is not its default
CASES = {
    "INT8_SYM": {},
    "INT8_ASYM": {},
    "INT4_SYM": {"all_layers": True, "group_size": 64},
    "INT4_ASYM": {"all_layers": True, "group_size": 64},
    "INT4_SYM, rows": {"all_layers": True, "group_size": -1},
    "INT4_SYM, by default": {"all_layers": True},
    "INT4_SYM, last layer": {"group_size": 64},
}

# By itself it rounds x to 8 bits, too, and may compute in bfloat16.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


def weight() -> np.ndarray:
    """(5, 128) of 1/1024ths; rows around 0, above it, below it, and with outliers."""
    i = np.arange(5)[:, None]
    j = np.arange(128)
    numbers = (i * i * 37 + j * j * 11 + i * j * 5) % 401 - 200
    numbers[1] += 260
    numbers[2] -= 150
    numbers[3, 70] = 1500
    numbers[4, 5] = -1500
    return (numbers / 1024).astype(np.float32)


def graph(w: np.ndarray) -> ov.Model:
    """y = x Wᵀ."""
    x = op.parameter([1, w.shape[1]], ov.Type.f32)
    return ov.Model([op.matmul(x, op.constant(w, ov.Type.f32), False, True)], [x])


def halves(packed: np.ndarray, signed: bool) -> np.ndarray:
    """Two codes a byte, the first in the lower half."""
    packed = np.frombuffer(packed.tobytes(), np.uint8)
    codes = np.stack([packed & 15, packed >> 4], -1).flatten().astype(int)
    return np.where(codes >= 8, codes - 16, codes) if signed else codes


def constants(model: ov.Model) -> dict:
    """Codes, scale and zero point, with the type of the codes and the group."""
    found = {}
    for node in model.get_ordered_ops():
        kind = node.get_element_type()
        if node.get_type_name() != "Constant" or kind == ov.Type.i64:
            continue
        name = node.get_friendly_name().rpartition("/")
        name = name[2] if name[1] else "codes"
        shape = list(node.get_output_shape(0))
        values = node.get_data()
        if kind in (ov.Type.i4, ov.Type.u4):
            values = halves(values, kind == ov.Type.i4)[: np.prod(shape)]
        if name == "codes":
            found |= {"type": kind.get_type_name(), "group": shape[-1]}
        found[name] = np.asarray(values).astype(float).reshape(5, -1).tolist()
    return found


def main() -> None:
    w = weight()
    x = np.linspace(-1, 1, w.shape[1], dtype=np.float32)[None]
    data = {"versions": {}, "weight": (w * 1024).astype(int).tolist(), "cases": {}}
    for library in ("openvino", "nncf"):
        data["versions"][library] = importlib.metadata.version(library)
    for name, settings in CASES.items():
        mode = Mode[name.partition(",")[0]]
        model = nncf.compress_weights(graph(w), mode=mode, **settings)
        data["cases"][name] = constants(model)
        exact = {
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        compiled = ov.compile_model(model, "CPU", exact)
        data["cases"][name]["product"] = compiled(x)[0][0].tolist()
    FILE.write_text(json.dumps(data) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
