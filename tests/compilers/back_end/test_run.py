"""Generated code: the same numbers, nothing outside its arrays, and what goes wrong."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from llmlab.compilers.back_end import interpret, machine, programs, run, to_c, to_llvm
from llmlab.compilers.back_end.ir import (
    Affine,
    Binary,
    Buffer,
    Codes,
    Dot,
    Load,
    Loop,
    Number,
    Pair,
    Program,
    Store,
    Unary,
    var,
)
from llmlab.compilers.back_end.lower import CannotGenerate, parameters
from llmlab.compilers.back_end.schedule import apply
from llmlab.compilers.llvm import binding, optimised
from llmlab.compilers.program import attention_row, mlp
from llmlab.models.c_library import NoCompiler, compiler
from tests.compilers.back_end.programs import captured, recurrence

TARGETS = [
    pytest.param("c", marks=pytest.mark.skipif(not compiler(), reason="no C compiler")),
    "llvm",
]


@cache
def scheduled() -> dict[str, tuple[Program, list[torch.Tensor]]]:
    """Programs whose tiles do not divide, with lanes, tails and copies."""
    found = {}
    product = programs.matmul(9, 5, 21)
    found["product"] = apply(product, machine.best_schedule(machine.AVX2))
    odd = [("tile", "j", 5), ("tile", "j_i", 3), ("tile", "i", 4), ("tile", "k", 2)]
    odd.append(("reorder", "k_o", "j_o", "i_o", "i_i", "k_i", "j_i_o", "j_i_i"))
    odd += [("pack", "A", "i_o", (1, 0)), ("cache", "C", "i_o")]
    found["odd"] = apply(product, odd)
    lanes = [
        ("tile", "i", 4),
        ("reorder", "i_o", "j", "k", "i_i"),
        ("vectorise", "i_i"),
    ]
    found["far"] = apply(product, lanes)  # lanes that do not lie side by side
    program = programs.matvec_4bit(4, 128, 64, streams=2)
    found["codes"] = program
    program = programs.matvec_4bit(4, 256, streams=2)
    found["words"] = apply(program, machine.matvec_schedule(machine=machine.AVX2))
    program, _ = captured("mlp", T=7, d=3, f=19)
    found["mlp"] = apply(program, machine.mlp_schedule(program, machine.SSE))
    program, _ = captured("attention_row", T=13, d=8)
    found["row"] = apply(program, machine.attention_schedule(machine.NEON))
    threads = [("parallel", "i")]
    found["threads"] = apply(product, threads)
    named = {}
    for name, program in found.items():
        inputs = interpret.random_inputs(program)
        named[name] = replace(program, name=name), inputs
    return named


@cache
def interpreted() -> dict[str, torch.Tensor]:
    """What each of them computes."""
    return {name: interpret.run(p, *x)[0] for name, (p, x) in scheduled().items()}


@pytest.mark.parametrize("target", TARGETS)
def test_code_computes_what_the_interpreter_does(target):
    for name, (program, inputs) in scheduled().items():
        kernel = run.compiled(program, target)
        wanted = interpreted()[name]
        torch.testing.assert_close(
            kernel(*inputs), wanted, rtol=1e-4, atol=1e-3, msg=lambda m, n=name: n + m
        )
        assert kernel.made_by


@pytest.mark.parametrize("target", TARGETS)
def test_functions_of_every_float(target):
    """exp, tanh, sqrt and max, in lanes and one by one, also of what is no number."""
    inf, nan = math.inf, math.nan
    special = [0.0, -0.0, 1.0, -1.0, 87.9, -86.9, 200.0, -200.0, inf, -inf, nan, 1e-30]
    values = torch.cat([torch.tensor(special), torch.linspace(-20, 20, 60)])
    n = len(values)
    body = tuple(
        Loop(
            f"i{op}",
            n,
            (Store(op, (var(f"i{op}"),), Unary(op, Load("x", (var(f"i{op}"),)))),),
        )
        for op in ("exp", "tanh", "sqrt")
    )
    larger = Binary("max", Load("x", (var("m"),)), Number(0.5))
    body += (Loop("m", n, (Store("most", (var("m"),), larger),)),)
    names = ("exp", "tanh", "sqrt", "most")
    outs = tuple(Buffer(name, (n,), role="output") for name in names)
    program = Program("floats", (Buffer("x", (n,)), *outs), body)
    loops = [loop.var for loop in program.body]
    tiles = [step for v in loops for step in (("tile", v, 8), ("vectorise", f"{v}_i"))]
    wanted = [values.exp(), values.tanh(), values.sqrt()]
    wanted.append(torch.maximum(values, torch.tensor(0.5)))
    wanted[0] = torch.where(values > 88, math.exp(88), wanted[0])  # cut off there
    wanted[0] = torch.where(values < -87, math.exp(-87), wanted[0])
    for each in (program, apply(program, tiles)):
        found = run.compiled(each, target)(values)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("lanes", [1, 16])
def test_tanh_keeps_the_digits_of_small_numbers(target, lanes):
    sizes = torch.cat([torch.logspace(-30, 1, 1000), torch.linspace(0.2, 0.3, 24)])
    x = torch.cat([sizes, -sizes])
    store = Store("y", (var("i"),), Unary("tanh", Load("x", (var("i"),))))
    buffers = (Buffer("x", (2048,)), Buffer("y", (2048,), role="output"))
    program = Program("tanh_of", buffers, (Loop("i", 2048, (store,)),))
    if lanes > 1:
        program = apply(program, [("tile", "i", lanes), ("vectorise", "i_i")])
    found = run.compiled(program, target)(x).double()
    torch.testing.assert_close(found, x.double().tanh(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 32])
def test_whole_numbers_in_words(target, lanes):
    """Pairs are rounded to even, keep their signs, and are added up without a loss."""
    ends = [0.0, -0.0, 0.5, 1.5, -0.5, -1.5, 2.49, -7.51, 32767.0, -32767.0, 32766.5]
    values = torch.tensor((ends * 12)[:128]).view(4, 32)
    values[1:] = torch.stack([row.roll(shift) for shift, row in enumerate(values[1:])])
    at = (var("i"),)
    rows = [Load(name, at) for name in "abcd"]
    dot = Dot(Pair(*rows[:2]), Pair(*rows[2:]))
    store = Store("y", at, Unary("float", dot))
    codes = Dot(Codes(Load("w", at), Affine((), 8)), Pair(Number(1.0), Number(-3.0)))
    add = Store("y", at, Unary("float", codes), "+=")
    names = [Buffer(name, (32,)) for name in "abcd"] + [Buffer("w", (32,), "u32")]
    buffers = (*names, Buffer("y", (32,), role="output"))
    program = Program("whole", buffers, (Loop("i", 32, (store, add)),))
    if lanes > 1:
        program = apply(program, [("tile", "i", lanes), ("vectorise", "i_i")])
    (*_, w) = interpret.random_inputs(program)
    a, b, c, d = values.round().long()
    wanted = (a * c + b * d).float() + ((w >> 8 & 15) - 3 * (w >> 24 & 15)).float()
    inputs = (*values, w)
    assert torch.equal(interpret.run(program, *inputs)[0], wanted)
    assert torch.equal(run.compiled(program, target)(*inputs), wanted)


@pytest.mark.parametrize(
    ("cpu", "lanes", "instruction"),
    [
        ("x86-64", machine.SSE, "pmaddwd"),
        ("haswell", machine.AVX2, "vpmaddwd"),
        ("skylake-avx512", machine.AVX512, "vpmaddwd"),
        ("znver4", machine.AVX512, "vpdpwssd"),  # and adds it to the sum
    ],
)
def test_llvm_finds_the_instruction_of_a_dot(cpu, lanes, instruction):
    """Four for each 8 codes, and of the row's start; no product of 32 bits is left."""
    program = programs.matvec_4bit(2, 128)
    program = apply(program, machine.matvec_schedule(machine=lanes))
    target = binding().Target.from_triple("x86_64-unknown-linux-gnu")
    processor = target.create_target_machine(cpu=cpu, opt=3)
    text = processor.emit_assembly(optimised(to_llvm.to_llvm(program), processor))
    assert text.count(f"\t{instruction}\t") >= 4 * program.buffer("t_tg").shape[0]
    assert "pmull" not in text


def test_lanes_are_shifted_alike():
    """By a loop's variable, but not by another number in each lane."""
    word = Codes(Load("w", (var("i"),)), var("i") * 4)
    store = Store("y", (var("i"),), Unary("float", Dot(word, word)))
    buffers = (Buffer("w", (8,), "u32"), Buffer("y", (8,), role="output"))
    program = Program("shifts", buffers, (Loop("i", 8, (store,)),))
    (w,) = interpret.random_inputs(program)
    (wanted,) = interpret.run(program, w)
    assert torch.equal(run.compiled(program, "llvm")(w), wanted)
    with pytest.raises(CannotGenerate, match="each lane would shift by another"):
        to_c.to_c(apply(program, [("vectorise", "i")]))


@pytest.mark.parametrize("target", TARGETS)
def test_the_part_s_functions_as_machine_code(target):
    for name, function, steps, sizes in (
        ("mlp", mlp, machine.mlp_schedule, {"T": 20, "d": 8, "f": 40}),
        ("attention_row", attention_row, None, {"T": 50, "d": 32}),
    ):
        program, inputs = captured(name, **sizes)
        steps = steps(program) if steps else machine.attention_schedule()
        found = run.compiled(apply(program, steps), target)(*inputs)
        torch.testing.assert_close(found, function(*inputs), rtol=1e-5, atol=1e-5)


MAIN = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
{declared}
static void *room(long n, const char *file) {{
    uint32_t *found = malloc(4 * n); /* not a byte more */
    for (long i = 0; i < n; i++) found[i] = 0x7fc00000; /* NaN */
    FILE *f = file ? fopen(file, "rb") : NULL;
    if (f && fread(found, 4, n, f) != (size_t)n) exit(3);
    if (f) fclose(f);
    return found;
}}
int main(void) {{
{body}
    return 0;
}}
"""


def sanitised_main(named: dict, folder: Path) -> str:
    """A C program that calls each function with arrays of its own, exactly as large."""
    declared, body = [], []
    for name, (program, inputs) in named.items():
        buffers = parameters(program)
        declared.append(f"void {name}({', '.join('void *' for _ in buffers)});")
        names = []
        for buffer in buffers:
            file = "NULL"
            if buffer.role == "input":
                path = folder / f"{name}_{buffer.name}"
                path.write_bytes(inputs[len(names)].numpy().tobytes())
                file = f'"{path}"'
            pointer = f"{name}_{buffer.name}"
            body.append(f"    float *{pointer} = room({buffer.size}, {file});")
            names.append(pointer)
        body.append(f"    {name}({', '.join(names)});")
        (out,) = [b for b in program.arguments if b.role == "output"]
        pointer = f"{name}_{out.name}"
        print_it = f'printf("%.9g\\n", {pointer}[i]);'
        body.append(f"    for (long i = 0; i < {out.size}; i++) {print_it}")
        body += [f"    free({each});" for each in names]
    return MAIN.format(declared="\n".join(declared), body="\n".join(body))


@pytest.fixture(scope="module")
def sanitiser(tmp_path_factory):
    """The flags of a compiler that finds accesses outside of arrays."""
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    folder = tmp_path_factory.mktemp("sanitiser")
    (folder / "empty.c").write_text("int main(void) { return 0; }\n")
    words = compiler()
    if words is None:
        pytest.skip("no C compiler")
    command = [*words, *flags, "empty.c", "-o", "empty"]
    made = subprocess.run(command, cwd=folder, capture_output=True)
    if made.returncode or subprocess.run([folder / "empty"]).returncode:
        pytest.skip("this compiler has no address sanitiser")
    return [*words, "-O0", "-w", *flags]


def test_nothing_is_touched_outside_of_arrays(sanitiser, tmp_path):
    """The sanitiser build: arrays of exact size, one program after the other."""
    named = scheduled()
    for name, (program, _) in named.items():
        (tmp_path / f"{name}.c").write_text(to_c.to_c(program))
    (tmp_path / "main.c").write_text(sanitised_main(named, tmp_path))
    files = [f"{name}.c" for name in (*named, "main")]
    command = [*sanitiser, *files, "-o", "main", "-lm"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.tensor([float(line) for line in done.stdout.split()])
    wanted = torch.cat([each.flatten() for each in interpreted().values()])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_the_sanitiser_would_find_it(sanitiser, tmp_path):
    program, inputs = scheduled()["odd"]
    text = to_c.to_c(program)
    place = text.rindex("C[")
    wrong = text[:place] + "C[400 + " + text[place + 2 :]
    (tmp_path / "odd.c").write_text(wrong)
    (tmp_path / "main.c").write_text(
        sanitised_main({"odd": (program, inputs)}, tmp_path)
    )
    command = [*sanitiser, "odd.c", "main.c", "-o", "main", "-lm"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True)
    assert "heap-buffer-overflow" in done.stderr


def test_registers_are_variables_where_places_are_known():
    text = to_c.to_c(scheduled()["product"][0])
    assert "f8 C_i_o_0, C_i_o_8" in text
    assert "float C_i_o[" in text  # the tail, whose lanes are not whole


def test_tensors_are_checked_before_code_runs():
    kernel = run.compiled(programs.matmul(3, 4, 5), "llvm")
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    for inputs, words in (
        ((a,), "2 inputs|1 inputs were given"),
        ((b, a), "A must be torch.float32 of shape"),
        ((a.double(), b), "torch.float64"),
        ((torch.ones(4, 3).T, b), "contiguous"),
    ):
        with pytest.raises(ValueError, match=words):
            kernel(*inputs)
    with pytest.raises(ValueError, match="target='cuda' must be one of"):
        run.compiled(programs.matmul(2, 2, 2), "cuda")


def test_a_stack_for_each_thread_has_an_end():
    program = apply(
        programs.matmul(4, 200, 200), [("parallel", "i"), ("pack", "B", "i")]
    )
    with pytest.raises(CannotGenerate, match="160,000 bytes on its stack"):
        to_c.to_c(program)


@pytest.mark.parametrize(
    ("gpu", "cpu", "fused"),
    [("nvptx", "sm_80", "fma.rn"), ("amdgcn", "gfx942", "v_fma")],
)
def test_assembly_for_a_gpu_that_is_not_here(gpu, cpu, fused):
    steps = [("tile", "j", 4), ("tile", "i", 4)]
    steps += [("reorder", "i_o", "j_o", "k", "i_i", "j_i")]
    steps += [("unroll", "i_i"), ("unroll", "j_i"), ("cache", "C", "j_o")]
    steps += [("parallel", "i_o")]
    text = to_llvm.assembly(apply(programs.matmul(8, 8, 8), steps), gpu, cpu)
    assert cpu in text and text.count(fused) >= 16
    with pytest.raises(ValueError, match="gpu='metal' must be one of"):
        to_llvm.to_llvm(recurrence(), "metal")


# What goes wrong ----------------------------------------------------------------------

unix = pytest.mark.skipif(os.name != "posix", reason="fake compilers are shell scripts")


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """A PATH with one compiler, written by the test, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setitem(sys.modules, "ziglang", None)  # as if it were not installed

    def write(script: str) -> None:
        file = tools / "cc"
        file.write_text(f"#!/bin/sh\nPATH=/bin:/usr/bin\n{script}\n")
        file.chmod(0o755)

    def left() -> list[str]:
        folders = (tmp_path / "cache", tmp_path / "tmp")
        return [str(f) for each in folders for f in each.rglob("*") if f.is_file()]

    return write, left


@unix
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'error: gcc 9 or newer is needed' >&2; exit 1", "gcc 9 or newer"),
        ("echo 'No space left on device' >&2; exit 1", "No space left on device"),
        ('echo half > "$3"; exit 1', "could not compile matmul.c"),
        ("echo 'not a library' > \"$3\"", "could not compile matmul.c"),
    ],
    ids=["old", "full", "half", "no library"],
)
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(alone, script, words):
    write, left = alone
    write(script)
    with pytest.raises(NoCompiler, match=words):
        run.compiled(programs.matmul(2, 2, 2), "c")
    assert left() == [] or "not a library" in script


@unix
def test_a_compile_that_hangs_is_stopped_with_its_children(alone, tmp_path):
    write, left = alone
    pid = tmp_path / "pid"
    write(f"sleep 60 & echo $! > {pid}; wait")
    started = time.monotonic()
    with pytest.raises(NoCompiler, match=r"took it more than 0.5 s"):
        run.compiled(programs.matmul(2, 2, 2), "c", seconds=0.5)
    assert time.monotonic() - started < 20
    assert left() == []
    child = Path("/proc") / pid.read_text().strip() / "stat"
    for _ in range(100):
        if not child.exists() or " Z " in child.read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the compiler's child still runs")


@unix
def test_without_a_c_compiler_llvm_does_it(alone):
    with pytest.raises(NoCompiler, match="install gcc or clang"):
        run.compiled(programs.matmul(2, 2, 2), "c")
    kernel = run.compiled(programs.matmul(2, 2, 2))
    assert "LLVM" in kernel.made_by
    assert kernel(torch.eye(2), torch.eye(2)).tolist() == torch.eye(2).tolist()


@unix
def test_without_another_one_the_compiler_of_ziglang_does_it(
    alone, monkeypatch, tmp_path
):
    """Its package is put in place by one that calls the system's compiler."""
    real = shutil.which("cc", path="/bin:/usr/bin")
    if real is None:
        pytest.skip("no C compiler")
    package = tmp_path / "site" / "ziglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import os, sys\n"
        "print('zig', sys.argv[1], flush=True)\n"
        f"environment = {{**os.environ, 'PATH': '/bin:/usr/bin'}}\n"
        f"os.execve({real!r}, [{real!r}, *sys.argv[2:]], environment)\n"
    )
    monkeypatch.delitem(sys.modules, "ziglang")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    assert compiler() == (sys.executable, "-m", "ziglang", "cc")
    kernel = run.compiled(programs.matmul(2, 2, 2), "c")
    assert kernel.made_by == "zig cc"
    assert kernel(torch.eye(2), torch.eye(2)).tolist() == torch.eye(2).tolist()


@unix
def test_a_disk_that_is_full(alone, monkeypatch):
    write, left = alone
    write("exit 0")

    def full(*arguments, **names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(NoCompiler, match="No space left on device"):
        run.compiled(programs.matmul(2, 2, 2), "c")
    assert left() == []
