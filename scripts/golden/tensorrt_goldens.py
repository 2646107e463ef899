"""What ModelOpt and OpenVINO make of our networks.

Their answers are kept in tests/compilers/golden/tensorrt.json.

Three steps, each in its own environment, from the repository's root:

    python scripts/golden/tensorrt_goldens.py write FOLDER     this project's
    python scripts/golden/tensorrt_goldens.py modelopt FOLDER  nvidia-modelopt[onnx]
                                                               0.47.0, torch 2.13,
                                                               onnxruntime-gpu 1.24.4
    python scripts/golden/tensorrt_goldens.py openvino FOLDER  openvino 2026.4.1

`write` leaves ONNX files, histograms and inputs in the folder; the others read them and
add to the golden file. OpenVINO is told to compute in float32 what is not quantised.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tests" / "compilers" / "golden" / "tensorrt.json"


def write(folder: Path) -> None:
    """Networks as ONNX, plain and with Q and DQ."""
    import onnx

    sys.path.insert(0, str(ROOT))
    from llmlab.compilers import tensorrt
    from llmlab.compilers.front_end import to_onnx
    from tests.compilers.tensorrt import programs

    for name, function, (x, weights) in (
        ("block", programs.block, programs.block_case()),
        ("two_layers", programs.two_layers, programs.two_case()),
    ):
        network = tensorrt.define(function, [x], weights)
        values = tensorrt.quantised_values(network.graph, network.weights)
        seen = tensorrt.observe(network, values, [[x]])
        scales = {node: tensorrt.scale_of(h) for node, h in seen.items()}
        quantised = tensorrt.quantise(network, scales, carry=False)
        for end, each in (("", network), ("_int8", quantised)):
            onnx.save(to_onnx(tensorrt.bound(each)), folder / f"{name}{end}.onnx")
        np.savez(folder / f"{name}.npz", in0=x.numpy())
    counts = {name: c.numpy() for name, c in programs.histograms().items()}
    np.savez(folder / "histograms.npz", **counts)


def modelopt(folder: Path) -> dict:
    """Thresholds of its histogram calibrator; scales of its command line."""
    import onnx
    from modelopt.torch.quantization.calib import histogram as calib
    from onnx import numpy_helper

    found: dict = {"version": importlib.metadata.version("nvidia-modelopt")}
    for name, counts in np.load(folder / "histograms.npz").items():
        edges = np.arange(len(counts) + 1, dtype=np.float64) / 256
        found[name] = {
            "entropy": float(
                calib._compute_amax_entropy(counts.copy(), edges, 8, False)
            ),
            "percentile": float(calib._compute_amax_percentile(counts, edges, 99.5)),
            "mse": float(calib._compute_amax_mse(counts, edges, 8, False)),
        }
    for method in ("max", "entropy"):
        target = folder / f"two_layers_{method}.onnx"
        command = f"-m modelopt.onnx.quantization --onnx_path={folder}/two_layers.onnx"
        command += (
            f" --calibration_data_path={folder}/two_layers.npz --quantize_mode=int8"
        )
        command += f" --calibration_method={method} --calibration_eps cpu --opset 17"
        command += f" --high_precision_dtype fp32 --output_path={target}"
        subprocess.run([sys.executable, *command.split()], check=True)
        graph = onnx.load(target).graph
        data = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        found[f"two_layers, {method}"] = {
            node.input[0]: data[node.input[1]].ravel()[:3].tolist()
            for node in graph.node
            if node.op_type == "QuantizeLinear"
        }
    return found


def openvino(folder: Path) -> dict:
    """Results, and in which type each layer ran."""
    import openvino as ov

    found: dict = {"version": importlib.metadata.version("openvino")}
    core = ov.Core()
    for name in ("block", "two_layers"):
        x = np.load(folder / f"{name}.npz")["in0"]
        for end in ("", "_int8"):
            model = core.read_model(folder / f"{name}{end}.onnx")
            hint = {"INFERENCE_PRECISION_HINT": "f32"}
            compiled = core.compile_model(model, "CPU", hint)
            layers = {}
            for op in compiled.get_runtime_model().get_ops():
                info = op.get_rt_info()
                kind = info["layerType"].astype(str)
                if kind in ("FullyConnected", "MatMul"):
                    layers[op.get_friendly_name()] = info["runtimePrecision"].astype(
                        str
                    )
            result = compiled([x])[0]
            found[name + end] = {"layers": layers, "result": result.round(6).tolist()}
    return found


if __name__ == "__main__":
    step, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    if step == "write":
        write(folder)
    else:
        golden = json.loads(FILE.read_text()) if FILE.exists() else {}
        golden[step] = {"modelopt": modelopt, "openvino": openvino}[step](folder)
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(json.dumps(golden, indent=1) + "\n")
