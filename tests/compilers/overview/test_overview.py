"""Our compiler: its lists, its LLVM IR, its machine code."""

from __future__ import annotations

import ctypes
import random
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.compilers import overview as ov
from llmlab.compilers.overview import (
    Expression,
    compile_expression,
    exp,
    linearise,
    literal,
    maximum,
    minimum,
    sqrt,
    tanh,
    to_llvm,
    trace,
)


def gate(x, b):
    y = x + b
    return y * minimum(maximum(y + 3, 0), 6) * (1 / 6)


# From expressions to LLVM IR ----------------------------------------------------------


def test_by_hand():
    """x·y + x, as the page works it out."""
    body, result = ov.lower(linearise(trace(lambda x, y: x * y + x, 2)))
    assert body == ["%v0 = fmul float %x0, %x1", "%v1 = fadd float %v0, %x0"]
    assert result == "%v1"


def test_a_value_that_is_read_twice_is_computed_once():
    """Repeated squaring: n lines, where a tree would have 2ⁿ."""

    def squares(x):
        for _ in range(60):
            x = x * x
        return x

    program = linearise(trace(squares, 1))
    assert [node.op for node in program] == ["argument"] + ["mul"] * 60


def test_a_deep_expression_needs_no_deep_stack():
    def deep(x):
        for _ in range(5000):
            x = x + 1
        return x

    assert len(linearise(trace(deep, 1))) == 10_001


@given(st.floats(width=32, allow_nan=False))
def test_a_literal_is_the_float_itself(value):
    bits = int(literal(value), 16)
    assert ctypes.c_double.from_buffer(ctypes.c_uint64(bits)).value == value


def test_a_literal_is_rounded_to_float32():
    found = ctypes.c_double.from_buffer(ctypes.c_uint64(int(literal(0.1), 16))).value
    assert found == torch.tensor(0.1).item() != 0.1


def test_what_is_not_known_cannot_decide():
    with pytest.raises(TypeError, match="cannot decide an `if`"):
        trace(lambda x: x if x else x + 1, 1)


def test_a_function_must_return_what_it_computed():
    with pytest.raises(ValueError, match=r"function returned 2\.0"):
        trace(lambda x: 2.0, 1)


# Machine code -------------------------------------------------------------------------


def arithmetic(x, y):
    return (x - y) / (x * x + 3) * -y


FORMULAS = {
    "arithmetic": (arithmetic, arithmetic),
    "roots": (lambda x, y: sqrt(x * x + y * y), lambda x, y: (x * x + y * y).sqrt()),
    "exp": (lambda x, y: exp(x) - y, lambda x, y: x.exp() - y),
    # not 1 + tanh, which would be all rounding error where x is far below 0
    "tanh": (lambda x, y: 2 / (2 + tanh(x)), lambda x, y: 2 / (2 + x.tanh())),
    "gate": (gate, lambda x, y: F.hardswish(x + y)),
    "gelu": (
        lambda x, y: ov.gelu(x + y),
        lambda x, y: F.gelu(x + y, approximate="tanh"),
    ),
    "one of two": (lambda x, y: y, lambda x, y: y),
    "a constant": (
        lambda x, y: Expression("constant", value=0.1),
        lambda x, y: torch.full_like(x, 0.1),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("level", [0, 3])
def test_machine_code_computes_what_torch_does(name, level):
    ours, theirs = FORMULAS[name]
    code = compile_expression(ours, 2, level)
    draw = torch.Generator().manual_seed(0)
    for size in (0, 1, 7, 8, 9, 100):
        x, y = torch.randn(2, size, generator=draw)
        torch.testing.assert_close(code(x, y), theirs(x, y), rtol=2e-5, atol=2e-6)


def test_nothing_is_written_outside():
    """The result is in the middle of an array whose rest stays as it is."""
    ir = to_llvm(gate, 2)
    code = ov.compile_ir(ir, 2)
    around = torch.full((64,), 7.0)
    x, b = torch.randn(2, 37)
    pointers = [ctypes.c_void_p] * 3
    call = ctypes.CFUNCTYPE(None, *pointers, ctypes.c_int64)(code.address)
    call(x.data_ptr(), b.data_ptr(), around[8:].data_ptr(), 37)
    torch.testing.assert_close(around[8:45], F.hardswish(x + b), rtol=1e-5, atol=1e-6)
    assert set(around[:8].tolist() + around[45:].tolist()) == {7.0}


@pytest.mark.parametrize("op", [maximum, minimum])
def test_not_a_number_stays_one(op):
    x = torch.tensor([float("nan"), 1.0, float("inf")])
    for function in (lambda x: op(x, 2), lambda x: op(2, x)):
        found = compile_expression(function, 1)(x)
        assert found.isnan().tolist() == [True, False, False]


def test_shapes_stay():
    x = torch.randn(3, 5, 7)
    assert compile_expression(lambda x: x + 1, 1)(x).shape == x.shape


def test_code_outlives_its_compiler():
    import gc

    codes = [compile_expression(lambda x, n=n: x + n, 1) for n in range(5)]
    gc.collect()
    assert [code(torch.zeros(1)).item() for code in codes] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((torch.zeros(3),), "1 tensors were given, and the function was compiled for"),
        ((torch.zeros(3), torch.zeros(3).double()), "tensor 1 is torch.float64"),
        ((torch.zeros(3, 4).T, torch.zeros(4, 3)), "tensor 0 must be contiguous"),
        ((torch.zeros(3), torch.zeros(4)), r"tensor 1 has the shape \(4,\)"),
    ],
)
def test_what_machine_code_would_misread_is_refused(tensors, message):
    with pytest.raises(ValueError, match=message):
        gate_code()(*tensors)


@cache
def gate_code():
    return compile_expression(gate, 2)


# Assembly for CPUs that are not here --------------------------------------------------

FLOATS = {"x86-64, SSE2": 4, "x86-64, AVX2": 8, "x86-64, AVX-512": 16}
FLOATS["AArch64, NEON"] = 4


@pytest.mark.parametrize("target", ov.TARGETS)
def test_vectors_begin_at_level_two(target):
    ir = to_llvm(gate, 2)
    widths = [
        ov.floats_per_trip(ov.hot_loop(ov.assembly(ir, target, level)))
        for level in ov.LEVELS
    ]
    assert widths == [1, 1, FLOATS[target], FLOATS[target]]


def test_each_target_speaks_its_own_language():
    ir = to_llvm(gate, 2)
    words = {
        "x86-64, SSE2": "addps\t%xmm",
        "x86-64, AVX2": "vmulps\t%ymm",
        "x86-64, AVX-512": "%zmm",
        "AArch64, NEON": "fmul\tv",
    }
    for target, word in words.items():
        text = ov.assembly(ir, target)
        assert word in text
        others = {w for t, w in words.items() if t != target and "x86" not in t}
        assert not any(other in text for other in others)


def test_numbers_stay_in_the_assembly():
    """Arm writes #4 for the number 4, and x86 begins a remark with #."""
    text = ov.assembly(to_llvm(gate, 2), "AArch64, NEON")
    assert "#3.00000000" in text
    assert "#" not in ov.assembly(to_llvm(gate, 2), "x86-64, AVX2")


def test_tanh_is_called_for_each_number():
    loop = ov.hot_loop(ov.assembly(to_llvm(ov.gelu, 1), "x86-64, AVX2"))
    assert sum("tanhf" in line for line in loop) == 8
    assert ov.floats_per_trip(loop) == 8


def test_shown_loop():
    assert "vmulps" in ov.loop_of(gate)
    assert "define void @f" in ov.better(to_llvm(gate, 2))
    assert "<8 x float>" in ov.better(to_llvm(gate, 2))
    assert "<8 x float>" not in ov.better(to_llvm(gate, 2), level=1)


def test_no_loop_is_none():
    assert ov.hot_loop("\tret") == []


def test_what_llvm_cannot_read_is_refused_in_its_words():
    with pytest.raises(ValueError, match="LLVM cannot read this"):
        ov.compile_ir("define void @f( {", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("Z80", 3), "target='Z80' must be one of"), (("x86-64, AVX2", 4), "level=4")],
)
def test_unknown_targets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ov.assembly(to_llvm(gate, 2), *arguments)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**20))
def test_random_programs(seed):
    """The same random formula, by our compiler and by torch."""
    draw = random.Random(seed)
    steps = [
        (draw.choice("+-*mM"), draw.randrange(9), draw.randrange(9)) for _ in range(12)
    ]

    def formula(x, y, largest, smallest):
        values = [x, y, x * 0.3]
        for op, i, j in steps:
            a, b = values[i % len(values)], values[j % len(values)]
            values.append(
                {
                    "+": lambda a=a, b=b: a + b,
                    "-": lambda a=a, b=b: a - b,
                    "*": lambda a=a, b=b: a * b * 0.5,
                    "m": lambda a=a, b=b: smallest(a, b),
                    "M": lambda a=a, b=b: largest(a, b),
                }[op]()
            )
        return values[-1]

    x, y = torch.rand(2, 21)
    ours = compile_expression(lambda x, y: formula(x, y, maximum, minimum), 2)(x, y)
    theirs = formula(x, y, torch.maximum, torch.minimum)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
