"""A product of 512 × 512 in fp32, step by step from naive to packed, on one thread.

Stored in llmlab/compilers/data/back_end.csv.

    python scripts/back_end_sweep.py            continue, a line a run
    python scripts/back_end_sweep.py --check 2  make that many runs again

`seconds` are CPU seconds of the thread, the best of several calls, those of torch.mm
and ours in turn; `torch` are torch.mm's in the same run. "ladder": the steps of
`machine.ladder`. "tuner": the best after so many measured schedules, of 256 × 256, by
each strategy. "functions": the two of the part, eager PyTorch's seconds as `torch_mm`,
beside torch.compile's and ours; of the first, the C++ that Inductor wrote is stored as
inductor_mlp.cpp. What Dynamo makes of a function that prints is in dynamo.json.
"codes": the product with 4-bit weights, 256 MiB of them, also as part 06 does it ("as
floats"); `torch_mm` is the time in which a sum reads as many bytes. Numbers are of the
machine that is named.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from sweeping import sweep, versions
from torch._inductor.utils import run_and_get_code

from llmlab.compilers.back_end import interpret, machine, programs, run, tuner
from llmlab.compilers.back_end.programs import from_graph
from llmlab.compilers.back_end.schedule import apply
from llmlab.compilers.front_end import capture, optimise
from llmlab.compilers.program import FUNCTIONS, example_inputs
from llmlab.compression.kernels.compiling import library
from llmlab.course import cpu

FOLDER = Path(programs.__file__).parents[1] / "data"

N, RUNS, TUNED = 512, 3, 24
FIELDS = ["task", "name", "target", "run", "seconds", "torch_mm", "machine", "made_by"]
FIELDS += ["torch", "python"]
ALL = [
    ("ladder", name, target, r)
    for r in range(1, RUNS + 1)
    for target in run.TARGETS
    for name in machine.ladder(machine.SSE)
]
ALL += [
    ("tuner", f"{strategy} {count}", "llvm", seed)
    for seed in range(1, RUNS + 1)
    for strategy in tuner.STRATEGIES
    for count in (4, 8, 12, 16, 20, TUNED)
]
ALL += [
    ("functions", name, how, r)
    for r in range(1, RUNS + 1)
    for name in FUNCTIONS
    for how in ("torch.compile", "c", "llvm")
]
ALL += [
    ("codes", name, target, r)
    for r in range(1, RUNS + 1)
    for name, target in (("4 bits", "c"), ("4 bits", "llvm"), ("as floats", "c"))
]
SIZES = {"mlp": {}, "attention_row": {"T": 2048, "d": 64}}


def function_seconds(name: str, how: str) -> tuple[float, float, str]:
    """One of the part's functions: compiled, eager, and by whom."""
    function = FUNCTIONS[name]
    inputs = example_inputs(name, **SIZES[name])
    made_by = "Inductor"
    if how == "torch.compile":
        call = torch.compile(function)
        _, (text, *_) = run_and_get_code(call, *inputs)
        if name == "mlp":
            (FOLDER / "inductor_mlp.cpp").write_text(cpp_of(text))
    else:
        program = from_graph(optimise(capture(function, *inputs)), name)
        steps = machine.attention_schedule()
        if name == "mlp":
            steps = machine.mlp_schedule(program)
        call = run.compiled(apply(program, steps), how)
        made_by = call.made_by
    clock = time.thread_time
    both = (lambda: call(*inputs), lambda: function(*inputs))
    ours, theirs = run.seconds_of(*both, rounds=30, at_least=1e-3, clock=clock)
    torch.testing.assert_close(call(*inputs), function(*inputs), rtol=1e-3, atol=1e-3)
    return ours, theirs, made_by


def codes_seconds(name: str, target: str) -> tuple[float, float, str]:
    """The 4-bit product, and a sum over as many bytes: more than caches hold."""
    rows, columns = 131072, 4096
    program = programs.matvec_4bit(rows, columns)
    kernel = run.compiled(apply(program, machine.matvec_schedule()), target)
    w, s, x = interpret.random_inputs(program)
    y, other = torch.empty(program.buffer("y").shape), torch.empty(rows)
    tensors = [w, s, None, x, other]
    pointers = [None if each is None else each.data_ptr() for each in tensors]
    sizes = (rows, columns, 128, 1)  # columns of a group; scales are float32

    def integers() -> None:
        kernel(w, s, x, out=[y])

    def floats() -> None:
        library().matvec_4bit(*pointers, *sizes)

    integers(), floats()
    torch.testing.assert_close(y.flatten(), other, rtol=1e-3, atol=0.1)
    numbers = torch.ones((w.nbytes + s.nbytes) // 4)
    both = (integers if name == "4 bits" else floats, numbers.sum)
    ours, theirs = run.seconds_of(*both, rounds=15, clock=time.thread_time)
    return ours, theirs, kernel.made_by


def cpp_of(text: str) -> str:
    """The C++ kernel in the Python that Inductor writes."""
    start = text.index("#include")
    return text[start : text.index("'''", start)]


def with_a_print(x: torch.Tensor) -> torch.Tensor:
    """Something that Dynamo cannot put into a graph stands in the middle."""
    y = x * 2
    print(end="")
    return y + 1


def explain() -> None:
    """What Dynamo makes of it, stored as dynamo.json."""
    found = torch._dynamo.explain(with_a_print)(torch.ones(3))
    guards = sorted({guard.create_fn_name() for guard in found.out_guards})
    guards.sort(key=lambda name: name not in ("TENSOR_MATCH", "GRAD_MODE"))
    stored = {"graphs": found.graph_count, "breaks": found.graph_break_count}
    text = json.dumps({**stored, "guards": guards, "torch": torch.__version__})
    (FOLDER / "dynamo.json").write_text(text + "\n")


def line_of() -> object:
    """What makes the line of a run."""
    torch.set_num_threads(1)
    kind = f"{cpu.identify()[0]}, {machine.this().name}"
    curves: dict[tuple[str, int], list[float]] = {}

    def ladder(name: str, target: str) -> tuple[float, float, str]:
        steps = machine.ladder()[name]
        kernel = run.compiled(apply(programs.matmul(N, N, N), steps), target)
        a, b = torch.randn(N, N), torch.randn(N, N)
        out, other = torch.empty(N, N), torch.empty(N, N)
        ours, theirs = run.seconds_of(
            lambda: kernel(a, b, out=[out]),
            lambda: torch.mm(a, b, out=other),
            rounds=8,
            clock=time.thread_time,
        )
        torch.testing.assert_close(out, other, rtol=1e-3, atol=1e-3)
        return ours, theirs, kernel.made_by

    def tuned(strategy: str, count: int, seed: int) -> tuple[float, float, str]:
        key = (strategy, seed)
        if key not in curves:
            curves[key] = tuner.search(
                strategy,
                TUNED,
                tuner.Log(),
                lambda choice: tuner.measure(choice, machine.this(), target="llvm"),
                seed=seed,
            )
        a, b = torch.ones(256, 256), torch.ones(256, 256)
        out = torch.empty(256, 256)
        clock = time.thread_time
        (theirs,) = run.seconds_of(
            lambda: torch.mm(a, b, out=out), rounds=20, clock=clock
        )
        return curves[key][count - 1], theirs, "LLVM"

    def line(task: str, name: str, target: str, number: int) -> list:
        if task == "functions":
            with torch.no_grad():
                ours, theirs, made_by = function_seconds(name, target)
        elif task == "codes":
            ours, theirs, made_by = codes_seconds(name, target)
        elif task == "ladder":
            ours, theirs, made_by = ladder(name, target)
        else:
            strategy, count = name.split()
            ours, theirs, made_by = tuned(strategy, int(count), number)
        found = [f"{ours:.6f}", f"{theirs:.6f}", kind, made_by]
        return [task, name, target, number, *found, *versions()]

    return line


if __name__ == "__main__":
    explain()
    sweep(__doc__, FOLDER / "back_end.csv", FIELDS, ALL, line_of, shown="seconds")
