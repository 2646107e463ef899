"""The functions of the compilers' part by each tool: seconds to compile, time, error.

`nine` is GELU in nine operations of torch on 2 MB, as lesson 08/02 has it: there, a
compiler has something to fuse. One thread, the tool and PyTorch in turn, the minimum of
many calls, compiled for this CPU. The first call counts import for nobody and caches of
compilers for nobody. Errors are against float64. On a quiet machine:

    python scripts/overview_sweep.py             the runs that are missing
    python scripts/overview_sweep.py --check 3   the first three again
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import torch
from torch import Tensor

from llmlab.compilers.overview import (
    FUNCTIONS,
    TOOLS,
    compile_expression,
    compile_with,
    gelu,
    languages,
)
from llmlab.compilers.program import example_inputs
from scripts.sweeping import sweep, versions

DATA = Path(__file__).parents[1] / "llmlab" / "compilers" / "overview" / "data"
FIELDS = ["function", "tool", "first_call_s", "us", "eager_us", "error"]
FIELDS += ["torch", "python"]
RUNS = [
    (function, tool)
    for function in FUNCTIONS
    for tool in TOOLS
    if (function, tool) != ("attention_row", "ours")
]
RUNS += [("nine", tool) for tool in ("PyTorch", "torch.compile", "ours")]
ROUNDS = 12  # of 10 calls each


def nine(x: Tensor) -> Tensor:
    """GELU, one operation of torch at a time."""
    return 0.5 * x * (1 + torch.tanh(0.7978846 * (x + 0.044715 * x * x * x)))


def made(function: str, tool: str) -> Callable[..., Tensor]:
    """A function by a tool."""
    if function != "nine":
        return compile_with(tool, function, cpu="host")
    ways = {
        "PyTorch": lambda: nine,
        "torch.compile": lambda: torch.compile(nine),
        "ours": lambda: compile_expression(gelu, 1),
    }
    return ways[tool]()


def inputs_of(function: str) -> tuple[Tensor, ...]:
    """What it is called with."""
    if function == "nine":
        return (torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)),)
    return example_inputs(function)


def warm(function: str, tool: str) -> None:
    """Import all that a tool needs, by compiling another function; then forget it."""
    other = "attention_row" if function == "mlp" else "mlp"
    made(other, tool)(*inputs_of(other))
    for cached in (languages.exported, languages.onnx_model, languages.relax_module):
        cached.cache_clear()
    torch.compiler.reset()


def measure(function: str, tool: str) -> list:
    """Beside PyTorch as it stands, which runs in turn with the tool."""
    inputs = inputs_of(function)
    eager = made(function, "PyTorch")
    wanted = eager(*[tensor.double() for tensor in inputs])
    eager(*inputs)
    warm(function, tool if tool != "ours" or function == "nine" else "PyTorch")
    started = time.perf_counter()
    compiled = made(function, tool)
    found = compiled(*inputs)
    first = time.perf_counter() - started
    best = {"tool": float("inf"), "eager": float("inf")}
    for _ in range(ROUNDS):
        for name, each in (("tool", compiled), ("eager", eager)):
            for _ in range(10):
                started = time.perf_counter()
                each(*inputs)
                best[name] = min(best[name], time.perf_counter() - started)
    error = float((found - wanted).abs().max())
    times = [f"{1e6 * best[name]:.0f}" for name in best]
    return [function, tool, f"{first:.2f}", *times, f"{error:.1e}", *versions()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    sweep(__doc__, DATA / "times.csv", FIELDS, RUNS, lambda: measure, shown="us")
