"""From LLVM IR to machine code, by the real LLVM (llvmlite brings it along).

    better       LLVM IR after LLVM's own passes
    assembly     the instructions for a CPU, which need not be the one we run on
    hot_loop     the part of them that is run most
    compile_expression   a Python function as machine code that Python can call

No C compiler is needed: see `llmlab.compilers.llvm`.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmlab.compilers.llvm import binding, loaded, optimised
from llmlab.compilers.overview.expressions import loop, to_llvm, trace

if TYPE_CHECKING:
    from llvmlite.binding import TargetMachine

# name → (what the code is for, the CPU, what else the CPU may use)
TARGETS = {
    "x86-64, SSE2": ("x86_64-unknown-linux-gnu", "x86-64", ""),
    "x86-64, AVX2": ("x86_64-unknown-linux-gnu", "haswell", ""),
    "x86-64, AVX-512": (
        "x86_64-unknown-linux-gnu",
        "skylake-avx512",
        "-prefer-256-bit",
    ),
    "AArch64, NEON": ("aarch64-unknown-linux-gnu", "neoverse-n1", ""),
}
LEVELS = (0, 1, 2, 3)  # from this level on LLVM makes loops of vectors: 2


def machine(target: str, level: int) -> TargetMachine:
    """What LLVM knows of a target.

    Raises:
        ValueError: a target or a level that is not in the lists.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r} must be one of {', '.join(TARGETS)}")
    if level not in LEVELS:
        raise ValueError(f"level={level!r} must be one of 0, 1, 2, 3")
    triple, cpu, features = TARGETS[target]
    return (
        binding()
        .Target.from_triple(triple)
        .create_target_machine(
            cpu=cpu, features=features, opt=level, reloc="pic", codemodel="small"
        )
    )


def tuning(level: int) -> dict[str, bool]:
    """What LLVM's passes do at a level: loops stay short, so that they can be read."""
    return {
        "loop_vectorization": level > 1,
        "loop_interleaving": False,
        "loop_unrolling": False,
    }


def better(ir: str, target: str = "x86-64, AVX2", level: int = 3) -> str:
    """LLVM IR after the passes of a level."""
    return str(optimised(ir, machine(target, level), level, **tuning(level)))


def assembly(ir: str, target: str = "x86-64, AVX2", level: int = 3) -> str:
    """The instructions for a target, without remarks for the assembler."""
    its = machine(target, level)
    text = its.emit_assembly(optimised(ir, its, level, **tuning(level)))
    lines = text.split("\nf:\n")[1].split(".Lfunc_end0")[0].splitlines()
    # remarks: "# xmm0 = mem[0]" on x86, "// 16-byte spill" on Arm ("#4" is a number)
    kept = [re.sub(r"\s*(# |//).*", "", line) for line in lines]
    is_remark = re.compile(r"\s*(\.(p2align|cfi|file|size|type|section).*)?")
    return "\n".join(line for line in kept if not is_remark.fullmatch(line))


def hot_loop(text: str) -> list[str]:
    """The loop of an assembly that handles most numbers per trip.

    It stands between a label and a jump back to it. LLVM writes the loop over vectors
    before the one over what is left, so the first is taken.
    """
    lines = text.splitlines()
    places = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    for i, line in enumerate(lines):
        jumps_to = line.split()[-1]
        if i > places.get(jumps_to, i):
            return [each.strip() for each in lines[places[jumps_to] + 1 : i + 1]]
    return []


def loop_of(function: Callable, target: str = "x86-64, AVX2") -> str:
    """The hot loop of a Python function of two arrays, one instruction to a line.

    A function that is a stub still has none, and the text says so.
    """
    try:
        return "\n".join(hot_loop(assembly(to_llvm(function, 2), target)))
    except NotImplementedError:
        return "(write the function first)"


def floats_per_trip(loop: list[str]) -> int:
    """How many numbers one trip of a loop writes.

    The width of the register that is stored says it; a store through the stack
    pointer keeps a value for later and is none.
    """
    floats = 0
    for line in loop:
        if re.match(r"v?mov[au]ps\s+%[xyz]mm\d+, .*\(", line) and "(%rsp)" not in line:
            register = re.search(r"%([xyz])mm", line)
            floats += {"x": 4, "y": 8, "z": 16}[register[1]]
        elif re.match(r"v?movss\s+%xmm\d+, .*\(", line) and "(%rsp)" not in line:
            floats += 1
        elif re.match(r"str\s+q\d+, ", line) and "[sp" not in line:
            floats += 4
        elif re.match(r"str\s+s\d+, ", line) and "[sp" not in line:
            floats += 1
    return floats


@dataclass(frozen=True)
class Compiled:
    """Machine code that is called as a Python function of so many tensors."""

    arguments: int
    ir: str
    engine: Any  # owns the code: as long as it is there, the address is valid
    address: int

    def __call__(self, *tensors: Tensor) -> Tensor:
        """A new tensor with the result for each number.

        Raises:
            ValueError: tensors that machine code would misread.
        """
        if len(tensors) != self.arguments:
            raise ValueError(
                f"{len(tensors)} tensors were given, and the function was compiled for"
                f" {self.arguments}"
            )
        for i, tensor in enumerate(tensors):
            if tensor.dtype != torch.float32:
                raise ValueError(f"tensor {i} is {tensor.dtype}: it must be float32")
            if not tensor.is_contiguous() or tensor.device.type != "cpu":
                raise ValueError(f"tensor {i} must be contiguous, on the CPU")
            if tensor.shape != tensors[0].shape:
                raise ValueError(
                    f"tensor {i} has the shape {tuple(tensor.shape)}, and tensor 0 has"
                    f" {tuple(tensors[0].shape)}: they must be equal"
                )
        out = torch.empty(tensors[0].shape)
        given = [tensor.data_ptr() for tensor in (*tensors, out)]
        pointers = [ctypes.c_void_p] * len(given)
        code = ctypes.CFUNCTYPE(None, *pointers, ctypes.c_int64)(self.address)
        code(*given, out.numel())
        return out


def compile_ir(ir: str, arguments: int, level: int = 3) -> Compiled:
    """Machine code of a function `f`, for the CPU that we run on."""
    engine = loaded(ir, level, **tuning(level))
    return Compiled(arguments, ir, engine, engine.get_function_address("f"))


def run_with(
    linearise: Callable, lower: Callable, function: Callable, *tensors: Tensor
) -> Tensor | str:
    """What a function gives, compiled by somebody's own two steps.

    While one of the three is a stub there is nothing to run, and the text says so.
    """
    arguments = len(tensors)
    try:
        lines, result = lower(linearise(trace(function, arguments)))
    except NotImplementedError:
        return "(write the three functions first)"
    return compile_ir(loop(lines, result, arguments), arguments)(*tensors)


def compile_expression(function: Callable, arguments: int, level: int = 3) -> Compiled:
    """A Python function of so many arrays as machine code.

    An example:

        fast = compile_expression(lambda x, y: x * y + 1, 2)
        fast(torch.randn(1000), torch.randn(1000))
    """
    return compile_ir(to_llvm(function, arguments), arguments, level)
