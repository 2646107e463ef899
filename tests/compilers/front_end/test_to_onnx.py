"""What goes out as ONNX computes the same in onnxruntime."""

from __future__ import annotations

import onnxruntime
import pytest
import torch

from llmlab.compilers import front_end as fe
from llmlab.compilers import tensorrt as trt
from tests.compilers.front_end.programs import KNOWN, inputs_of
from tests.libraries import seen_in


def session_of(graph: fe.Graph) -> onnxruntime.InferenceSession:
    onnxruntime.set_default_logger_severity(3)
    data = fe.to_onnx(graph).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])


def both(x, w):
    """A product with each layout, reductions along each dimension, more outputs."""
    y = torch.maximum(x, -x).amax(0) + x.sum(1, keepdim=True)
    return y @ w.T, torch.exp(x.reshape(3, 2, 4).transpose(1, 2)), torch.tanh(x) @ x.mT


@pytest.mark.parametrize("optimise", [False, True])
@pytest.mark.parametrize("name", ["norm", "twice", "turned", "swiglu", "both"])
def test_onnxruntime_computes_the_same(name, optimise):
    function, shapes = KNOWN.get(name, (both, ((6, 4), (5, 4))))
    inputs = inputs_of(shapes)
    graph = fe.capture(function, *inputs)
    graph = fe.optimise(graph) if optimise else graph
    named = {f"in{i}": x.numpy() for i, x in enumerate(inputs)}
    found = session_of(graph).run(None, named)
    wanted = fe.run(graph, *inputs)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(x), y, rtol=1e-5, atol=1e-5)


def test_double_precision_and_draws():
    x = torch.randn(3, 4, dtype=torch.float64)
    graph = fe.capture(lambda x: x / 3.0 - torch.rand_like(x), x)
    (found,) = session_of(graph).run(None, {"in0": x.numpy()})
    drawn = x.numpy() / 3 - found
    assert found.dtype == x.numpy().dtype
    assert 0 <= drawn.min() < drawn.max() < 1


def test_a_constant_that_is_returned_and_shapes_without_numbers():
    c = torch.arange(3.0)
    functions = [
        (lambda x: (x, c), torch.ones(2, 3)),
        (lambda x: x.reshape(4, 0, 1) - 1.0, torch.ones(2, 0, 2)),
        (lambda x: x.reshape(0, 0, 1).sum(), torch.ones(2, 0)),
    ]
    for function, x in functions:
        graph = fe.capture(function, x)
        found = session_of(graph).run(None, {"in0": x.numpy()})
        for ours, theirs in zip(found, fe.run(graph, x), strict=True):
            torch.testing.assert_close(torch.as_tensor(ours), theirs)


@pytest.mark.parametrize("form", ["int8", "e4m3"])
def test_a_maximum_beside_codes_of_eight_bits(form):
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    network = trt.define(lambda x, w: torch.softmax(x @ w, -1), [x], {"w": w})
    scales = dict.fromkeys(trt.quantised_values(network.graph, network.weights), 0.03)
    graph = trt.bound(trt.quantise(network, scales, form))
    (found,) = session_of(graph).run(None, {"in0": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), fe.run(graph, x)[0])


def on_codes(x, w):
    return torch.relu(-torch.amax(x @ w, 1, keepdim=True).mT.reshape(2, 4)) @ w


def test_operations_on_codes():
    x, w = torch.randn(8, 4), torch.randn(4, 4)
    network = trt.define(on_codes, [x], {"w": w})
    values = trt.quantised_values(network.graph, network.weights)
    seen = trt.observe(network, values, [[x]])
    for form in ("int8", "e4m3"):
        scales = {node: trt.scale_of(h, "max", form) for node, h in seen.items()}
        graph = trt.bound(trt.quantise(network, scales, form))
        held = [n.op for n in graph.nodes if n.inputs and trt.stored_format(n)]
        assert {"max", "neg", "maximum", "transpose", "reshape"} <= set(held)
        if form == "int8":
            (found,) = session_of(graph).run(None, {"in0": x.numpy()})
            (wanted,) = fe.run(graph, x)
            torch.testing.assert_close(torch.from_numpy(found), wanted)
        else:
            with pytest.raises(ValueError, match="codes in e4m3: place Q and DQ with"):
                fe.to_onnx(graph)


def test_what_onnx_cannot_say():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="no operation for 'report'"):
        fe.to_onnx(fe.capture(lambda x: fe.report(x, "x"), x))
    function, shapes = KNOWN["changed"]
    with pytest.raises(ValueError, match="changes its inputs"):
        fe.to_onnx(fe.capture(function, *inputs_of(shapes)))


@seen_in("onnxruntime", "1.32.0")
def test_a_gelu_in_its_tanh_form_stays_in_pieces(tmp_path):
    """The lesson says so."""
    import onnx

    x = torch.randn(4, 8)
    gelu = torch.nn.functional.gelu
    graph = fe.capture(lambda x: gelu(x, approximate="tanh"), x)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "m.onnx")
    data = fe.to_onnx(graph).SerializeToString()
    onnxruntime.set_default_logger_severity(3)
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    left = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert "Tanh" in left
    assert len(left) == len(graph.work)
