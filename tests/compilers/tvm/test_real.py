"""The product's schedules and the part's two functions, through the real TVM."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from llmlab.compilers.program import FUNCTIONS, attention_row, example_inputs, mlp
from llmlab.compilers.tvm import fusion, graph, with_tvm
from llmlab.compilers.tvm.loops import Refused
from llmlab.compilers.tvm.product import STEPS, matmul, registers
from tests.libraries import seen_in


def product_of(schedule, M, N, K):
    random = np.random.default_rng(0)
    a = random.standard_normal((M, K), dtype=np.float32)
    b = random.standard_normal((K, N), dtype=np.float32)
    real = with_tvm.scheduled(with_tvm.prim_func(matmul(M, N, K)), schedule)
    found = with_tvm.call(with_tvm.compiled(real), a, b, shape=(M, N))
    np.testing.assert_allclose(found, a @ b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", STEPS)
def test_each_step_computes_the_product(step):
    product_of(STEPS[step], 32, 48, 20)


@pytest.mark.parametrize(
    "sizes", [(30, 48, 20), (32, 50, 20), (33, 49, 21), (5, 17, 3)]
)
@pytest.mark.parametrize("packed", [False, True])
def test_tiles_need_not_divide(sizes, packed):
    if packed and sizes[1] % 16:
        pytest.skip("panels are whole")
    product_of(registers(packed=packed, steps=2), *sizes)


@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("columns", [1, 8])
def test_blocks_of_other_sizes(rows, columns):
    product_of(registers(rows, columns, packed=True, by_columns=False), 12, 16, 8)


def assembly(schedule, target):
    real = with_tvm.scheduled(with_tvm.prim_func(matmul(64, 64, 64)), schedule)
    text = with_tvm.source(with_tvm.compiled(real, target), "asm")
    return [line.strip() for line in text.splitlines()]


def test_a_block_of_4_by_16_is_eight_accumulators_on_avx2():
    lines = assembly(STEPS["packed"], "haswell")
    sums = {line.split()[-1] for line in lines if line.startswith("vfmadd231ps")}
    assert len({register for register in sums if register.startswith("%ymm")}) == 8


def test_one_schedule_for_other_machines():
    assert any("zmm" in line for line in assembly(STEPS["packed"], "skylake-avx512"))
    assert any("fmla" in line for line in assembly(STEPS["packed"], "neoverse-v1"))
    assert any("vfmacc" in line for line in assembly(STEPS["packed"], "riscv64"))


GPU = [
    ("split", "C", "j", (None, 16)),
    ("bind", "C", "i", "blockIdx.x"),
    ("bind", "C", "j_0", "blockIdx.y"),
    ("bind", "C", "j_1", "threadIdx.x"),
]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("cuda", "__global__"),
        ("webgpu", "@compute"),
        ("opencl", "__kernel"),
        ("metal", "kernel void"),
    ],
)
def test_source_for_devices_that_are_not_here(target, words):
    real = with_tvm.scheduled(with_tvm.prim_func(matmul(64, 64, 64)), GPU)
    assert words in with_tvm.source(with_tvm.compiled(real, target))


def test_c_is_a_target_like_the_others():
    real = with_tvm.scheduled(with_tvm.prim_func(matmul(8, 8, 8)), [])
    assert "for (int32_t k = 0; k < 8; ++k)" in with_tvm.source(
        with_tvm.compiled(real, "c")
    )


def test_another_target_is_refused():
    with pytest.raises(ValueError, match="target='abacus' must be one of haswell"):
        with_tvm.compiled(None, "abacus")


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (("tile", "C", "i"), "no primitive 'tile'"),
        (("unroll", "D", "i"), "no block 'D'"),
        (("unroll", "C", "l"), "it has i, j, k"),
        (("vectorize", "C", "k"), "not a data parallel block iter"),
        (("compute_inline", "C"), "has init statement"),
    ],
)
def test_refusals_have_one_line(step, words):
    with pytest.raises(Refused, match=words) as refusal:
        with_tvm.scheduled(with_tvm.prim_func(matmul(8, 8, 8)), [step])
    assert "\n" not in str(refusal.value)


# Relax --------------------------------------------------------------------------------


@cache
def stages(name):
    inputs = example_inputs(name, T=16, d=32, f=64)
    return graph.lowered(graph.imported(FUNCTIONS[name], *inputs))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_way_down_computes_the_same(name):
    inputs = example_inputs(name, T=16, d=32, f=64)
    found = graph.executable(stages(name)["merge"])(*inputs)
    torch.testing.assert_close(found, FUNCTIONS[name](*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_our_groups_are_those_of_tvm(name):
    steps, outputs = graph.steps(stages(name)["annotate"])
    callee = {line: f for line, f, _ in graph.calls(stages(name)["annotate"])}
    ours = fusion.fuse_groups(steps, outputs)
    assert [[callee[line] for line in group] for group in ours] == graph.groups(
        stages(name)["fuse"]
    )


def test_what_each_becomes():
    assert graph.groups(stages("mlp")["fuse"]) == [["matmul", "add", "gelu_tanh"]]
    found = graph.groups(stages("attention_row")["fuse"])
    assert found == [["transpose"], ["matmul", "divide"], ["softmax"], ["matmul1"]]


def test_one_function_has_many_loops_and_the_schedule_makes_them_one():
    inputs = example_inputs("mlp", T=16, d=32, f=64)
    function = graph.kernel(stages("mlp")["merge"], "fused_matmul_add_gelu_tanh")
    plain = with_tvm.scheduled(function, [])
    nest = with_tvm.scheduled(function, graph.one_nest(function))
    size = 16 * 64 * 4
    assert graph.handed_on(plain) == [size] * 10
    assert graph.handed_on(nest) == [4 * 16 * 4]
    arrays = [x.numpy() for x in inputs]
    for real in (plain, nest):
        found = with_tvm.call(with_tvm.compiled(real), *arrays, shape=(16, 64))
        np.testing.assert_allclose(found, mlp(*inputs), rtol=1e-3, atol=1e-4)


def test_a_function_without_a_product_has_no_such_schedule():
    function = graph.kernel(stages("attention_row")["merge"], "softmax")
    with pytest.raises(Refused, match="not a product"):
        graph.one_nest(function)


def test_one_program_for_every_length():
    inputs = example_inputs("attention_row", T=16, d=32)
    keys = {0: torch.export.Dim("S", min=2, max=4096)}
    module = graph.imported(attention_row, *inputs, dynamic={"k": keys, "v": keys})
    call = graph.executable(graph.lowered(module)["merge"])
    for length in (2, 17, 300):
        inputs = example_inputs("attention_row", T=length, d=32)
        torch.testing.assert_close(call(*inputs), attention_row(*inputs))
    assert graph.planned(graph.lowered(module)["merge"]) == [
        4096 * 32 * 4,
        4096 * 4,
        4096 * 4,
    ]


def test_memory_is_planned_once_for_values_that_do_not_meet():
    def chain(x, w):
        for _ in range(4):
            x = torch.softmax(x @ w, -1)
        return x

    module = graph.imported(chain, torch.randn(8, 16), torch.randn(16, 16))
    merged = graph.lowered(module)["merge"]
    assert len(graph.calls(merged)) == 8
    assert graph.planned(merged) == [8 * 16 * 4] * 2


@seen_in("apache-tvm", "0.27.0.post1")
def test_tvms_tanh_of_a_small_number_is_nought():
    """The overview says so; findings/ has more of it."""
    import tvm
    from tvm import relax
    from tvm.script import relax as R

    x = np.array([1e-8, 1.0], np.float32)
    builder, given = relax.BlockBuilder(), relax.Var("x", R.Tensor(x.shape, "float32"))
    with builder.function("main", [given]):
        builder.emit_func_output(builder.emit(relax.op.tanh(given)))
    program = tvm.compile(relax.transform.LegalizeOps()(builder.get()), target="llvm")
    machine = relax.VirtualMachine(program, tvm.cpu())
    found = machine["main"](tvm.runtime.tensor(x)).numpy()
    assert found[0] == 0 and found[1] == pytest.approx(np.tanh(1.0), rel=1e-6)
