"""What real tools print, and what is read in it."""

from __future__ import annotations

import csv
import math
import re

import pytest
import torch
import torch.nn.functional as F

from llmlab.compilers import overview as ov
from llmlab.compilers import program
from llmlab.compilers.overview import in_language, languages
from llmlab.compilers.program import example_inputs
from tests.libraries import seen_in

BOTH = [(f, language) for f in ov.FUNCTIONS for language in ov.LANGUAGES]


@pytest.mark.parametrize(("function", "language"), BOTH)
def test_every_language_says_something_of_every_function(function, language):
    text = in_language(function, language)
    assert text.language == language
    assert re.search(r"\d+\.\d+", text.tool)
    assert "loc(" not in text.text
    assert "/" not in re.sub(r' / |"/\w+"', "", text.text), "a path of this machine"
    assert ov.operations(text) >= 3


COUNTS = {
    "FX": (3, 5),
    "ONNX": (3, 6),
    "StableHLO": (11, None),
    "HLO": (11, None),
    "Relax": (3, 5),
    "TIR": (11, 8),
    "linalg": (13, None),
}


@pytest.mark.parametrize("language", COUNTS)
def test_operations_counted_by_hand(language):
    for function, wanted in zip(ov.FUNCTIONS, COUNTS[language], strict=True):
        if wanted is not None:
            assert ov.operations(in_language(function, language)) == wanted


def test_decisions_of_each_language():
    found = {
        language: list(ov.decided(in_language("mlp", language)).values())
        for language in ov.LANGUAGES
    }
    none = [False] * len(ov.DECISIONS)
    assert found["FX"] == found["ONNX"] == found["Relax"] == none
    assert found["TTGIR"] == [True] * len(ov.DECISIONS)
    counts = {language: sum(each) for language, each in found.items()}
    assert counts["linalg"] == counts["StableHLO"] == 1
    assert counts["HLO"] == counts["TIR"] == 3
    assert counts["TTIR"] == len(ov.DECISIONS) - 2


def test_only_triton_has_forgotten_the_whole():
    for language in ov.LANGUAGES:
        known = ov.knows_the_whole(in_language("mlp", language))
        assert known == (language not in ("TTIR", "TTGIR"))


def test_the_constant_of_gelu():
    """√(2/π): right in each text but one, which has √(2/(22/7))."""
    right, other = math.sqrt(2 / math.pi), math.sqrt(7 / 11)
    found = {
        language: ov.root_two_over_pi(in_language("mlp", language))
        for language in ov.LANGUAGES
    }
    assert found.pop("linalg") == pytest.approx(other, abs=5e-7)
    for language in ("FX", "ONNX", "Relax"):
        assert found.pop(language) is None
    assert list(found.values()) == pytest.approx([right] * 5, abs=1e-7)


PARTS = {
    "FX": (1, 1, 1),
    "ONNX": (1, 1, 1),
    "Relax": (1, 1, 1),
    "linalg": (2, 5, 12),
}


@pytest.mark.parametrize("language", [*PARTS, "TIR", "TTIR", "TTGIR"])
def test_lines_that_correspond(language):
    text = in_language("mlp", language)
    of = ov.parts(text)
    assert len(of) == len(text.lines)
    lines = {
        part: [line for line, p in zip(text.lines, of, strict=True) if p == part]
        for part in ov.PARTS
    }
    assert all(lines.values())
    if language in PARTS:
        assert tuple(map(len, lines.values())) == PARTS[language]
    dot = re.compile(r"aten\.mm|MatMul|matmul|tt\.dot|warp_group_dot")
    assert any(dot.search(line) for line in lines["product"])
    assert not any(dot.search(line) for line in lines["gelu"])
    last = re.compile(r"gelu|Gelu|tanh|exp")
    assert any(last.search(line) for line in lines["gelu"])
    assert not any("0.0447" in line or "4.4715" in line for line in lines["bias"])


def test_parts_are_of_mlp_in_languages_of_the_environment():
    with pytest.raises(ValueError, match="language 'HLO' has no parts"):
        ov.parts(in_language("mlp", "HLO"))


@pytest.mark.parametrize("function", ov.FUNCTIONS)
@pytest.mark.parametrize("language", ["TTIR", "TTGIR"])
def test_without_triton_the_stored_text_is_shown(function, language, monkeypatch):
    pytest.importorskip("triton")
    made = in_language(function, language)
    monkeypatch.setattr(languages, "find_spec", lambda name: None)
    stored = in_language(function, language)
    assert stored.tool == "Triton 3.7.1, stored"
    assert stored.text == made.text


def test_an_interpreter_compiles_nothing(monkeypatch):
    pytest.importorskip("triton")
    from llmlab.compilers.overview import kernel

    languages.triton_stages.cache_clear()
    monkeypatch.setattr(kernel, "mlp", print)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        in_language("mlp", "TTIR")


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_the_kernels_compute_the_functions(monkeypatch):
    """Run by Triton's interpreter, in this process: it needs no GPU."""
    pytest.importorskip("triton")
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    from llmlab.compilers.overview import kernel

    for name in ("sum", "max"):  # they are kernels themselves
        monkeypatch.setattr(tl, name, InterpretedFunction(getattr(tl, name).fn))
    x, w, b = example_inputs("mlp", T=64, d=64, f=128)
    y = torch.empty(64, 128)
    run = InterpretedFunction(kernel.mlp.fn)
    run[(2, 2)](x, w, b, y, d=64, f=128, R=32, C=64, K=32)
    torch.testing.assert_close(y, program.mlp(x, w, b), rtol=1e-4, atol=1e-4)
    q, k, v = example_inputs("attention_row", T=32, d=16)
    y = torch.empty(1, 16)
    InterpretedFunction(kernel.attention_row.fn)[(1,)](q, k, v, y, S=32, D=16)
    wanted = program.attention_row(q, k, v)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)


# Tools --------------------------------------------------------------------------------

HERE = [tool for tool in ov.TOOLS if tool not in ("PyTorch", "torch.compile")]


@pytest.fixture(scope="module")
def compiled():
    """Each tool that needs no C++ compiler, by function."""
    return {
        (function, tool): ov.compile_with(tool, function)
        for function in ov.FUNCTIONS
        for tool in HERE
        if (function, tool) != ("attention_row", "ours")
    }


def test_every_tool_computes_the_same(compiled):
    for (function, tool), run in compiled.items():
        inputs = example_inputs(function, seed=3)
        wanted = ov.FUNCTIONS[function](*[each.double() for each in inputs])
        error = (run(*inputs) - wanted).abs().max().item()
        assert error < 3e-4, (function, tool)


def test_gelu_with_another_pi(compiled):
    """IREE's GELU is the one with π = 22/7; all others have π."""
    x, w, b = example_inputs("mlp")
    x, w, b = x / 4, w / 4, b.clone()
    h = (x @ w + b).double()
    inner = h + 0.044715 * h**3
    right = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * inner))
    other = 0.5 * h * (1 + torch.tanh(math.sqrt(7 / 11) * inner))
    torch.testing.assert_close(right, F.gelu(h, approximate="tanh"))
    apart = (right - other).abs().max().item()
    assert 5e-5 < apart < 2e-4
    for tool in HERE:
        found = compiled["mlp", tool](x, w, b)
        to_right, to_other = [
            (found - each).abs().max().item() for each in (right, other)
        ]
        near, far = (to_other, to_right) if tool == "IREE" else (to_right, to_other)
        assert near < 1e-5 < 5e-5 < far, tool


def test_bytes_between_operations():
    """By hand: two results between three operations, ten between eleven loops, one
    between two fusions, none within a kernel.
    """
    one = 2 * 128 * 512 * 4
    counts = {"FX": 2, "ONNX": 2, "Relax": 2, "linalg": 2, "StableHLO": 10, "TIR": 10}
    counts |= {"HLO": 1, "TTIR": 0, "TTGIR": 0}
    found = {name: ov.bytes_between(in_language("mlp", name)) for name in ov.LANGUAGES}
    assert found == {name: count * one for name, count in counts.items()}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: in_language("mlp", "Fortran"), "language='Fortran' must be one of"),
        (lambda: in_language("conv", "FX"), "function='conv' must be one of mlp"),
        (lambda: ov.compile_with("GCC", "mlp"), "tool='GCC' must be one of"),
        (lambda: ov.compile_with("TVM", "conv"), "function='conv' must be one of"),
        (lambda: ov.compile_with("TVM", "mlp", "z80"), "cpu='z80' must be"),
        (lambda: ov.compile_with("ours", "attention_row"), "has sums"),
    ],
)
def test_what_is_unknown_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_stored_times_are_complete():
    """A line for each run of the sweep, with an error of a float32's size."""
    file = languages.STORED / "times.csv"
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    runs = [(row["function"], row["tool"]) for row in rows]
    assert len(runs) == len(set(runs)) == 14
    assert all(float(row["error"]) < 1e-4 for row in rows)


@seen_in("onnxruntime", "1.32.0")
def test_onnxruntimes_sigmoid_ends_at_minus_18():
    """The lesson says so; findings/ has more of it."""
    import onnxruntime
    from onnx import TensorProto, helper

    x = torch.linspace(-20, -18, 16)
    given, made = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [16]) for name in "xy"
    )
    node = helper.make_node("Sigmoid", ["x"], ["y"])
    graph = helper.make_graph([node], "sigmoid", [given], [made])
    opset = [helper.make_opsetid("", 17)]
    data = helper.make_model(graph, opset_imports=opset, ir_version=9)
    data = data.SerializeToString()
    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    assert (found == 0).all() and (torch.sigmoid(x) > 2e-9).all()
