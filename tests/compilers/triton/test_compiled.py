"""What was compiled once and kept, compiled again; and what the texts say."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest

from llmlab.compilers.triton_kernels import compiling, reading, stored
from llmlab.compilers.triton_kernels.compiling import (
    CannotCompile,
    Job,
    compile_jobs,
)

AGAIN = (Job("one_dot", "sm_80"), Job("one_dot", "sm_90"), Job("one_dot", "gfx942"))


@pytest.fixture(scope="module")
def again():
    """The smallest kernel for three targets, compiled in a process of its own."""
    pytest.importorskip("triton")
    return compile_jobs(AGAIN, sass=True)


def test_what_was_kept_is_what_the_compiler_makes(again):
    for compiled in again:
        found = json.loads(json.dumps(reading.facts(compiled)))
        assert found == stored.of(compiled.job), compiled.job


def test_what_was_kept_is_of_the_compiler_that_is_here():
    pytest.importorskip("triton")
    assert stored.triton_version() == version("triton"), "run scripts/triton_sweep.py"


def test_one_program_above_and_three_below(again):
    """The first level is the same for NVIDIA's targets; the next one knows the chip."""
    ttir = [reading.operations(compiled.texts["ttir"]) for compiled in again]
    ttgir = [reading.operations(compiled.texts["ttgir"]) for compiled in again]
    assert ttir[0] == ttir[1] and ttgir[0] != ttgir[1]
    names = [word.name for word in ttir[0]]
    assert names.count("tt.dot") == 1 and names.count("tt.load") == 2


def test_lines_correspond(again):
    """The line of tl.dot, at all levels; nothing else is a product."""
    for compiled in again:
        words = list(reading.instructions(reading.assembly(compiled)))
        lines = reading.lines(compiled, words)
        [line] = [n for n, at in lines.items() if "tt.dot" in at.get("ttir", {})]
        products = {w.name for w in words if reading.PRODUCT.match(w.name)}
        assert products and products <= set(lines[line]["assembly"])
        for other in set(lines) - {line}:
            assert not products & set(lines[other].get("assembly", {}))


@pytest.mark.parametrize("kernel", ["one_dot", "mlp_tile"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_instructions_make_up_the_product(kernel, target):
    """Shape times count times those who issue it: the block's, once or a few times."""
    warps = 4 if kernel == "one_dot" else 8
    facts = stored.of(Job(kernel, target, warps=warps))
    [(name, product)] = facts["products"].items()
    threads = warps * compiling.TARGETS[target][2]
    groups = threads / product["threads"] if product["threads"] > 1 else 1
    m, n, k = product["shape"]
    constants = facts["constants"]
    sizes = [
        constants.get(a, constants.get(b)) for a, b in (("M", "ROWS"), ("N", "COLS"))
    ]
    whole = sizes[0] * sizes[1] * constants["DEPTH"]
    copies = product["count"] * m * n * k * groups / whole
    # loops that are taken apart have the product before or after them, too
    expected = {("mlp_tile", "sm_100"): 2, ("mlp_tile", "gfx942"): 3}
    assert copies == expected.get((kernel, target), 1), name


def test_the_table_of_the_lesson():
    kinds = {
        "sm_75": {},
        "sm_80": {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": (16, 8, 16)},
        "sm_90": {"wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16": (64, 64, 16)},
        "sm_100": {"tcgen05.mma.cta_group::1.kind::f16": (64, 64, 16)},
        "sm_120": {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": (16, 8, 16)},
        "gfx942": {"v_mfma_f32_32x32x8_f16": (32, 32, 8)},
    }
    for target, wanted in kinds.items():
        products = stored.of(Job("one_dot", target))["products"]
        assert {k: tuple(v["shape"]) for k, v in products.items()} == wanted
    assert stored.of(Job("one_dot", "sm_90"))["sass"]["HGMMA.64x64x16.F32"] == 4
    assert stored.of(Job("one_dot", "sm_100"))["sass"]["UTCHMMA"] == 4


def test_descriptors_use_the_copy_engine_where_there_is_one():
    for target, engine in (("sm_80", False), ("sm_90", True), ("sm_100", True)):
        kinds = stored.of(Job("dots_by_descriptor", target, warps=8))["kinds"]
        assert ("copy engine" in kinds) == engine
        assert ("background copy" in kinds) != engine


PTX = """
	.loc	1 5 0                           // kernels.py:5:0
$L__func_begin0:
	@%p1 bra 	$L__BB0_2;
	.loc	2 43 17                         // standard.py:43:17 @[ kernels.py:7:22 ]
	// begin inline asm
	mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r1 }, { %r2 }, { %r3 };
	@%p2 cp.async.cg.shared.global [ %r4 + 0 ], [ %rd1 + 0 ], 0x10, %r5;
	ret;
	.section	.debug_abbrev
	mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
"""


MLIR = """
#loc = loc("kernels.py":5:0)
module {
  tt.func public @f(%x: i32 loc("x"(#loc))) {
    %a = arith.addi %x, %x : i32 loc(#loc5)
    %b:2 = scf.for %i = %x to %x step %x iter_args(%c = %a) -> (i32, i32)  : i32 {
      %d = tt.dot %c, %c, %c : i32 loc(#loc6)
      scf.yield %d, %d : i32, i32 loc(#loc7)
    } loc(#loc7)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
#loc2 = loc("standard.py":43:17)
#loc3 = loc("kernels.py":7:22)
#loc4 = loc("down"(#loc3))
#loc5 = loc(callsite(#loc2 at #loc4))
#loc6 = loc("kernels.py":9:1)
#loc7 = loc("kernels.py":8:1)
"""


def test_operations_have_the_line_of_the_call_and_loops_that_of_their_end():
    found = [(word.name, word.line) for word in reading.operations(MLIR)]
    assert found == [("arith.addi", 7), ("scf.for", 8), ("tt.dot", 9)]
    assert reading.first_line(MLIR) == 5


def test_instructions_have_the_line_of_the_kernel():
    found = [(word.name.split(".")[0], word.line) for word in reading.instructions(PTX)]
    assert found == [("bra", 5), ("mma", 7), ("cp", 7), ("ret", 7)]


@pytest.mark.parametrize(
    ("instruction", "kind"),
    [
        ("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16", "tensor core"),
        ("wgmma.wait_group.sync.aligned", "wait"),
        ("cp.async.bulk.tensor.2d.shared::cta.global", "copy engine"),
        ("cp.async.cg.shared.global", "background copy"),
        ("cp.async.commit_group", "wait"),
        ("tcgen05.ld.sync.aligned.32x32b.x64.b32", "tensor memory"),
        ("tcgen05.mma.cta_group::1.kind::f16", "tensor core"),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16", "shared memory"),
        ("ld.global.v4.b32", "load"),
        ("ld.param.b64", "addresses and moves"),
        ("ex2.approx.f32", "arithmetic"),
        ("div.full.f32", "arithmetic"),
        ("div.s32", "addresses and moves"),
        ("v_mfma_f32_32x32x8_f16", "tensor core"),
        ("v_exp_f32_e32", "arithmetic"),
        ("v_add_u32_e32", "addresses and moves"),
        ("global_load_dwordx4", "load"),
        ("ds_read_b64", "shared memory"),
        ("s_cbranch_scc1", "control"),
    ],
)
def test_kinds(instruction, kind):
    assert reading.kind_of(instruction) == kind


def test_refuses(monkeypatch):
    with pytest.raises(ValueError, match="target='sm_1' must be one of sm_75"):
        Job("one_dot", "sm_1")
    with pytest.raises(ValueError, match="kernel='dot' must be one of"):
        Job("dot", "sm_80")
    with pytest.raises(ValueError, match="'add' is no product of a tensor core"):
        reading.product("add", "", 2)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CannotCompile, match="triton is not installed"):
        compile_jobs([Job("one_dot", "sm_80")])


def test_a_compiler_that_hangs_or_dies_is_told(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setattr(compiling, "__file__", str(tmp_path / "other.py"))
    (tmp_path / "other.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(compiling.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(CannotCompile, match=r"1 kernels took longer than 0\.5 s"):
        compile_jobs([Job("one_dot", "sm_80")], timeout=0.5)
    (tmp_path / "other.py").write_text("raise OSError('No space left on device')")
    with pytest.raises(CannotCompile, match="ended early: OSError: No space left"):
        compile_jobs([Job("one_dot", "sm_80")])
    assert [path.name for path in tmp_path.iterdir()] == ["other.py"]
