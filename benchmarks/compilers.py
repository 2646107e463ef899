"""Generated code beside PyTorch's: a product, 4-bit weights, and the part's functions.

Both sides run on one thread. The 4-bit product has no rival in PyTorch: it stands
beside the time that PyTorch takes to read as many bytes and sum them up.
"""

from __future__ import annotations

import torch

from benchmarks.case import Case
from llmlab.compilers.back_end import apply, best_schedule
from llmlab.compilers.back_end import machine as machines
from llmlab.compilers.back_end.interpret import random_inputs
from llmlab.compilers.back_end.programs import from_graph, matmul, matvec_4bit
from llmlab.compilers.back_end.run import compiled
from llmlab.compilers.front_end import capture, optimise
from llmlab.compilers.program import FUNCTIONS, example_inputs

N = 512
ROWS, COLUMNS = 131072, 4096  # 256 MiB of codes: caches hold little of it


def alone(call):
    """A call on one thread, whatever the setting is."""

    def way():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return call()
        finally:
            torch.set_num_threads(threads)

    return way


def product(target: str) -> Case:
    """512³ in fp32."""
    program = matmul(N, N, N)
    kernel = compiled(apply(program, best_schedule()), target)
    a, b = random_inputs(program)
    out, other = torch.empty(N, N), torch.empty(N, N)
    return Case(
        f"product of 512³, by {kernel.made_by} (torch.mm), one thread",
        alone(lambda: kernel(a, b, out=[out])),
        alone(lambda: torch.mm(a, b, out=other)),
        rounds=60,
    )


def product_by_c() -> Case:
    """By the C compiler that is there."""
    return product("c")


def product_by_llvm() -> Case:
    """By LLVM."""
    return product("llvm")


def four_bits(target: str) -> Case:
    """Codes of 4 bits with a scale for each 128, against reading as many bytes."""
    program = matvec_4bit(ROWS, COLUMNS)
    kernel = compiled(apply(program, machines.matvec_schedule()), target)
    inputs = random_inputs(program)
    out = [torch.empty(program.buffer("y").shape)]
    size = (inputs[0].nbytes + inputs[1].nbytes) // 4
    x = torch.ones(size)
    return Case(
        f"4-bit product, {ROWS:,} × {COLUMNS:,}, by {kernel.made_by} (a sum over as"
        " many bytes), one thread",
        alone(lambda: kernel(*inputs, out=out)),
        alone(x.sum),
        rounds=15,
    )


def four_bits_by_c() -> Case:
    """By the C compiler that is there."""
    return four_bits("c")


def four_bits_by_llvm() -> Case:
    """By LLVM."""
    return four_bits("llvm")


def function(name: str, **sizes: int) -> Case:
    """One of the part's two functions."""
    call = FUNCTIONS[name]
    inputs = example_inputs(name, **sizes)
    program = from_graph(optimise(capture(call, *inputs)), name)
    steps = machines.attention_schedule()
    if name == "mlp":
        steps = machines.mlp_schedule(program)
    kernel = compiled(apply(program, steps))
    return Case(
        f"{name}, fused (torch), one thread",
        alone(lambda: kernel(*inputs)),
        alone(lambda: call(*inputs)),
        rounds=60,
    )


def fused_mlp() -> Case:
    """GELU(x w + b) of 512 × 768 × 1,024."""
    return function("mlp", T=512, d=768, f=1024)


def fused_row() -> Case:
    """One query over 8,192 keys of 64."""
    return function("attention_row", T=8192, d=64)


CASES = [
    product_by_c,
    product_by_llvm,
    four_bits_by_c,
    four_bits_by_llvm,
    fused_mlp,
    fused_row,
]
