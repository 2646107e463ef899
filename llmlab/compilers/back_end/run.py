"""Compiled programs: built by the compiler that is there, called with tensors.

    compiled(program)            by the C compiler, or by LLVM where there is none
    compiled(program, "llvm")    by LLVM's JIT (llvmlite)

A kernel checks every tensor before its code sees an address.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmlab.compilers.back_end.interpret import check_input
from llmlab.compilers.back_end.ir import Program
from llmlab.compilers.back_end.lower import parameters
from llmlab.compilers.back_end.to_c import to_c, uses_threads
from llmlab.compilers.back_end.to_llvm import to_llvm
from llmlab.compilers.llvm import binding, loaded
from llmlab.models.c_library import POINTER, NoCompiler, build, compiler

SECONDS = 60.0  # that a compiler may take
TARGETS = ("c", "llvm")


class Kernel:
    """A compiled program.

    Attributes:
        made_by: which compiler made it.
        keep: what must live as long as its code.
    """

    def __init__(
        self, program: Program, function: Callable, made_by: str, keep: Any = None
    ) -> None:
        self.program, self.function = program, function
        self.made_by, self.keep = made_by, keep
        brought = parameters(program)[len(program.arguments) :]
        self.workspace = [torch.zeros(each.size) for each in brought]

    def __call__(self, *inputs: Tensor, out: list[Tensor] | None = None) -> Any:
        """The output, or a list of them.

        Args:
            out: tensors to write them to.
        Raises:
            ValueError: a tensor is not what the program says.
        """
        arguments = self.program.arguments
        given = [each for each in arguments if each.role == "input"]
        made = [each for each in arguments if each.role == "output"]
        if len(inputs) != len(given):
            names = [each.name for each in given]
            raise ValueError(f"{len(inputs)} inputs were given, and {names} are needed")
        out = [torch.empty(each.shape) for each in made] if out is None else out
        for buffer, tensor in zip(arguments, [*inputs, *out], strict=True):
            check_input(buffer, tensor)
        everything = [*inputs, *out, *self.workspace]
        self.function(*[tensor.data_ptr() for tensor in everything])
        return out[0] if len(out) == 1 else out


def compiled(
    program: Program, target: str | None = None, seconds: float = SECONDS
) -> Kernel:
    """A program as machine code of this processor.

    Args:
        target: "c" or "llvm"; the first that is there, if not said.
        seconds: that a C compiler may take.
    Raises:
        NoCompiler: there is none, or it failed, or took too long.
    """
    if target is None:
        target = "c" if compiler() else "llvm"
    if target not in TARGETS:
        raise ValueError(f"target={target!r} must be one of {TARGETS}")
    return by_c(program, seconds) if target == "c" else by_llvm(program)


def by_c(program: Program, seconds: float) -> Kernel:
    """By the C compiler."""
    types = [POINTER] * len(parameters(program))
    text = to_c(program)
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / f"{program.name}.c"
            source.write_text(text)
            threads = uses_threads(program)
            library = build(source, {program.name: types}, seconds, openmp=threads)
    except OSError as problem:
        raise NoCompiler(f"{program.name} could not be written: {problem}") from None
    made_by = version(compiler())
    return Kernel(program, getattr(library, program.name), made_by, library)


def by_llvm(program: Program) -> Kernel:
    """By LLVM's JIT, for the processor that is here."""
    try:
        engine = loaded(to_llvm(program))
    except ImportError:
        raise NoCompiler("llvmlite is not installed") from None
    address = engine.get_function_address(program.name)
    types = [POINTER] * len(parameters(program))
    function = ctypes.CFUNCTYPE(None, *types)(address)
    major = binding().llvm_version_info[0]
    return Kernel(program, function, f"LLVM {major} (llvmlite)", engine)


@cache
def version(words: tuple[str, ...]) -> str:
    """What a C compiler says of itself, in a few words. It is asked once."""
    try:
        said = subprocess.run(
            [*words, "--version"], capture_output=True, text=True, timeout=10
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    return said.splitlines()[0] if said else " ".join(words)


def seconds_of(
    *calls: Callable[[], object],
    rounds: int = 5,
    at_least: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """The fastest call of each, called in turn.

    Args:
        at_least: seconds that one measurement takes: short calls are repeated.
        clock: `time.thread_time` counts this thread alone, on a machine that is busy.
    """
    best = [float("inf")] * len(calls)
    repeat = []
    for call in calls:
        started = clock()
        call()
        took = max(clock() - started, 1e-9)
        repeat.append(max(1, int(at_least / took)))
    for _ in range(rounds):
        for place, call in enumerate(calls):
            started = clock()
            for _ in range(repeat[place]):
                call()
            took = (clock() - started) / repeat[place]
            best[place] = min(best[place], took)
    return best
