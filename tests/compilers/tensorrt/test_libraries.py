"""The same networks in ONNX Runtime, OpenVINO and ModelOpt."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from llmlab.compilers import tensorrt as trt
from llmlab.compilers.front_end import to_onnx
from tests.compilers.tensorrt import programs
from tests.compilers.tensorrt.test_calibration import GOLDEN
from tests.compilers.tensorrt.test_engine import network_of, quantised


def in_onnxruntime(network, x, folder):
    """What it computes, and the operations of its optimised graph."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # on x86, int8 inputs are left in floats unless this is asked for
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    session = onnxruntime.InferenceSession(
        to_onnx(trt.bound(network)).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    graph = onnx.load(options.optimized_model_filepath).graph
    result = torch.from_numpy(session.run(None, {"in0": x.numpy()})[0])
    return result, [node.op_type for node in graph.node]


def test_int8_products_are_onnxruntimes(tmp_path):
    """Its products run on codes as well, and the result is the same."""
    plain, x, *_ = quantised("two_layers", carry=False)
    theirs, ops = in_onnxruntime(plain, x, tmp_path)
    assert ops.count("MatMulIntegerToFloat") == 2
    ours = trt.build(quantised("two_layers")[0], repeat=1)(x)[0]
    assert programs.rows_agree(ours, theirs)


@pytest.mark.parametrize("residuals", [False, True])
@pytest.mark.parametrize("name", ["block", "with_bias"])
def test_qdq_programs_are_onnxruntimes(name, residuals, tmp_path):
    plain, x, *_ = quantised(name, residuals=residuals, carry=False)
    theirs, ops = in_onnxruntime(plain, x, tmp_path)
    ours = trt.build(quantised(name, residuals=residuals)[0], repeat=1)(x)[0]
    assert programs.rows_agree(ours, theirs)
    # a sum behind a product makes it a Gemm, and that stays in floats
    assert ops.count("Gemm") == (1 if name == "block" else 2)


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_fp8_is_onnxruntimes(form, tmp_path):
    plain, x, *_ = quantised("two_layers", form, carry=False)
    theirs, _ = in_onnxruntime(plain, x, tmp_path)
    ours = trt.build(quantised("two_layers", form)[0], repeat=1)(x)[0]
    assert programs.rows_agree(ours, theirs)


def test_a_scale_that_is_computed_cannot_be_written():
    network, *_ = quantised("two_layers")
    with pytest.raises(ValueError, match="must be a constant"):
        to_onnx(network.graph)


@pytest.mark.parametrize("name", ["block", "two_layers"])
def test_openvino_computes_the_same_with_int8_products(name):
    golden = json.loads(GOLDEN.read_text())["openvino"]
    _, x, weights, function = network_of(name)
    exact = torch.tensor(golden[name]["result"])
    torch.testing.assert_close(
        function(x, *weights.values()), exact, rtol=1e-4, atol=1e-4
    )
    theirs = torch.tensor(golden[f"{name}_int8"]["result"])
    assert set(golden[f"{name}_int8"]["layers"].values()) == {"i8"}
    ours = trt.build(quantised(name)[0], repeat=1)(x)[0]
    # it folds scales otherwise: a few codes of the inner layer differ by one
    assert (ours - theirs).abs().mean() < 0.1 * (ours - exact).abs().mean()


def test_modelopt_places_the_same_scales():
    """By its command line, max; its entropy comes to the same (128 bins and levels)."""
    golden = json.loads(GOLDEN.read_text())["modelopt"]
    maximum = golden["two_layers, max"]
    assert golden["two_layers, entropy"] == maximum
    network, x, weights, _ = network_of("two_layers")
    values = trt.quantised_values(network.graph, network.weights)
    seen = trt.observe(network, values, [[x]])
    ours = [trt.scale_of(h) for h in seen.values()]
    theirs = [s[0] for s in maximum.values() if len(s) == 1]
    np.testing.assert_allclose(sorted(theirs), sorted(ours), rtol=1e-5)
    columns = weights["w1"].abs().amax(0)[:3] / 127
    np.testing.assert_allclose(maximum["v1"], columns, rtol=1e-5)


def test_quantize_statics_entropy_is_its_maximum(tmp_path, capsys):
    """Its default has as many bins as levels, and they cannot be set there."""
    import onnx
    from onnx import numpy_helper
    from onnxruntime import quantization as q

    network, x, *_ = network_of("two_layers")
    onnx.save(to_onnx(trt.bound(network)), tmp_path / "m.onnx")

    class Reader(q.CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{"in0": x[:6].numpy()}, {"in0": 3 * x[6:].numpy()}])

        def get_next(self):
            return next(self.batches, None)

    # the reader's batches have 6 rows
    model = onnx.load(tmp_path / "m.onnx")
    for each in [*model.graph.input, *model.graph.output]:
        each.type.tensor_type.shape.dim[0].dim_value = 6
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "m.onnx")
    found = []
    for method in (q.CalibrationMethod.MinMax, q.CalibrationMethod.Entropy):
        q.quantize_static(
            tmp_path / "m.onnx",
            tmp_path / "q.onnx",
            Reader(),
            calibrate_method=method,
            extra_options={"ActivationSymmetric": True},
        )
        tensors = onnx.load(tmp_path / "q.onnx").graph.initializer
        found.append(
            {
                t.name: float(numpy_helper.to_array(t))
                for t in tensors
                if "scale" in t.name
            }
        )
    assert found[0] == found[1]
    assert len(found[0]) > 3
