"""From LLVM's text to machine code, by llvmlite: run here, or read for another chip.

The text is the same for all; the target says which instructions there are. To run, one
needs the machine. To read, one needs nothing: `assembly` writes the code of any target
that LLVM was built with. (A GPU's function there is one thread's work: nobody has
divided the loops among threads. That is decided far above, as IREE does.)
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from xdsl.dialects.builtin import ModuleOp

from llmlab.compilers.llvm import binding, loaded, optimised
from llmlab.compilers.mlir import dialect as lab
from llmlab.compilers.mlir.bufferise import Buffers, bufferise
from llmlab.compilers.mlir.to_linalg import to_linalg
from llmlab.compilers.mlir.to_llvm import (
    llvm_text,
    nests,
    to_jumps,
    to_llvm,
    to_loops,
)

TARGETS = {
    "x86-64": ("x86_64-unknown-linux-gnu", "x86-64"),
    "x86-64 with AVX2": ("x86_64-unknown-linux-gnu", "haswell"),
    "AArch64": ("aarch64-unknown-linux-gnu", "neoverse-n1"),
    "RISC-V": ("riscv64-unknown-linux-gnu", "sifive-u74"),
    "NVIDIA sm_80": ("nvptx64-nvidia-cuda", "sm_80"),
    "AMD gfx942": ("amdgcn-amd-amdhsa", "gfx942"),
}


@dataclass
class Stage:
    """A program on one level.

    Attributes:
        text: the program.
        operations: how many stand in it.
    """

    name: str
    text: str
    operations: int


@dataclass
class Compiled:
    """Machine code that is called with tensors.

    Attributes:
        stages: the program on each level, from the top down.
        buffers: what lies between its operations.
        passes: loops over tensors that are outermost.
    """

    stages: list[Stage]
    inputs: list[lab.Shape]
    outputs: list[lab.Shape]
    buffers: Buffers
    passes: int
    address: int = 0
    keep: Any = field(default=None, repr=False)

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        """Run it.

        Raises:
            ValueError: arguments of other shapes or dtypes than it was compiled for.
        """
        found = [(tuple(x.shape), x.dtype) for x in arguments]
        if found != [(shape, torch.float32) for shape in self.inputs]:
            raise ValueError(
                f"called with {found}; compiled for fp32 of the shapes {self.inputs}"
            )
        given = [x.contiguous() for x in arguments]
        results = [torch.empty(shape) for shape in self.outputs]
        room = torch.empty(max(1, self.buffers.arena), dtype=torch.uint8)
        pointers = [x.data_ptr() for x in (*given, *results, room)]
        kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(pointers))
        kind(self.address)(*pointers)
        return results

    def stage(self, name: str) -> Stage:
        """The program on one level."""
        return next(stage for stage in self.stages if stage.name == name)


def lower(
    module: ModuleOp, more: Sequence = (), reorder: bool = True, apart: bool = False
) -> Compiled:
    """All the way down to LLVM's text; a stage is kept for each level.

    Args:
        more, apart: see `to_linalg`.
        reorder: whether products run in the order i, k, j.
    """
    main = lab.function(module)
    inputs = [kind.get_shape() for kind in main.function_type.inputs]
    outputs = [kind.get_shape() for kind in main.function_type.outputs]
    stages = [staged("lab", module)]
    stages.append(staged("linalg", to_linalg(module, *more, apart=apart)))
    buffers = bufferise(module)
    stages.append(staged("memref", module))
    to_loops(module, reorder)
    passes = nests(module)
    stages.append(staged("scf", module))
    stages.append(staged("cf", to_jumps(module)))
    last = to_llvm(module)
    stages.append(staged("llvm", last))
    text = llvm_text(last)
    stages.append(Stage("LLVM IR", text, text.count("\n  ")))
    return Compiled(stages, inputs, outputs, buffers, passes)


def staged(name: str, module: ModuleOp) -> Stage:
    """A module as it is now."""
    skipped = ("builtin.module", "func.func", "llvm.func", "func.return")
    count = sum(op.name not in skipped for op in module.walk())
    return Stage(name, str(module), count)


def compile_module(
    module: ModuleOp, more: Sequence = (), reorder: bool = True, apart: bool = False
) -> Compiled:
    """Down to machine code for the CPU that it runs on."""
    compiled = lower(module, more, reorder, apart)
    load(compiled)
    return compiled


def load(compiled: Compiled) -> None:
    """Make machine code of LLVM's text, and keep its address."""
    engine = loaded(compiled.stages[-1].text, slp_vectorization=True)
    compiled.address = engine.get_function_address("main")
    compiled.keep = engine  # the code lives as long as it does


def assembly(text: str, target: str) -> str:
    """The code of one of TARGETS, to be read.

    Raises:
        ValueError: another target.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r} must be one of {', '.join(TARGETS)}")
    triple, cpu = TARGETS[target]
    machine = binding().Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    return machine.emit_assembly(optimised(text, machine, slp_vectorization=True))


def instructions(code: str) -> list[str]:
    """The instructions of an assembly text: no labels, comments or directives."""
    found = []
    for line in code.splitlines():
        line = line.split(";")[0].split("#")[0].strip()
        if line and not line.startswith((".", "//")) and not line.endswith(":"):
            found.append(line)
    return found
