"""Kernels compiled for GPUs that are not here, in a process of their own.

Triton compiles for any target: the wheel has LLVM, NVIDIA's assembler and its
disassembler. A process of its own, for this one may have imported Triton to interpret.

    compile_jobs([Job("mlp_tile", "sm_90")])[0].texts["ptx"]
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

# name → backend, architecture, threads of a warp, as Triton's GPUTarget wants them
TARGETS = {
    "sm_75": ("cuda", 75, 32),  # T4
    "sm_80": ("cuda", 80, 32),  # A100
    "sm_90": ("cuda", 90, 32),  # H100, H200
    "sm_100": ("cuda", 100, 32),  # B200
    "sm_120": ("cuda", 120, 32),  # RTX 50
    "gfx942": ("hip", "gfx942", 64),  # MI300
}
# kernel → its arguments that are no pointers, and its usual constants
ARGUMENTS = {
    "softmax_rows": (("d", "stride"), {"COLS": 1024}),
    "mlp_tile": (
        ("T", "f", "d"),
        {"ROWS": 128, "COLS": 128, "DEPTH": 64, "GROUP": 8, "WIDE": False},
    ),
    "attention_tile": (
        ("T", "S", "scale"),
        {
            "D": 64,
            "G": 4,
            "ROWS": 128,
            "COLS": 64,
            "WIDTH": 64,
            "CAUSAL": True,
            "WIDE": False,
        },
    ),
    "one_dot": ((), {"M": 64, "N": 64, "DEPTH": 64}),
    "dots_by_descriptor": (("d",), {"M": 128, "N": 128, "DEPTH": 64}),
}
TIMEOUT = 300.0


class CannotCompile(RuntimeError):
    """Triton is not here, or it refused."""


@dataclass(frozen=True)
class Job:
    """One kernel for one target.

    Attributes:
        dtype: of the tensors, as Triton writes it: fp16, bf16, fp32, fp8e4nv.
        constants: instead of the usual ones of `ARGUMENTS`.
    Raises:
        ValueError: a kernel or a target that is not known.
    """

    kernel: str
    target: str
    dtype: str = "fp16"
    warps: int = 4
    stages: int = 3
    constants: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kernel", self.kernel, ARGUMENTS),
            ("target", self.target, TARGETS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")

    @property
    def all_constants(self) -> dict[str, int]:
        return ARGUMENTS[self.kernel][1] | self.constants

    @property
    def described(self) -> dict:
        """Its fields, with all constants: what is kept beside what it became."""
        return asdict(self) | {"constants": self.all_constants}


@dataclass(frozen=True)
class Compiled:
    """What came out.

    Attributes:
        texts: ttir, ttgir, llir, and ptx and sass, or amdgcn.
        shared, tensor: bytes of shared memory, columns of tensor memory.
        usage: for NVIDIA, what the assembler says of registers.
    """

    job: Job
    texts: dict[str, str]
    shared: int
    tensor: int
    usage: str


def compile_jobs(
    jobs: Sequence[Job], sass: bool = False, timeout: float = TIMEOUT
) -> list[Compiled]:
    """Compiles all of them in one process.

    Args:
        sass: NVIDIA's machine code is read as well.
    Raises:
        CannotCompile: Triton is not installed (it comes for Linux), it refuses a job,
            or it takes longer than `timeout` seconds.
    """
    if importlib.util.find_spec("triton") is None:
        raise CannotCompile("triton is not installed: it comes for Linux only")
    with tempfile.TemporaryDirectory(prefix="llmlab-triton-") as folder:
        env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": folder}
        # this file as a script: it and the kernels need no PyTorch, which takes seconds
        command = [sys.executable, "-P", __file__]
        asked = {"jobs": [asdict(job) for job in jobs], "sass": sass}
        try:
            done = subprocess.run(
                command,
                input=json.dumps(asked),
                capture_output=True,
                text=True,
                env=env,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            raise CannotCompile(
                f"{len(jobs)} kernels took longer than {timeout:g} s"
            ) from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise CannotCompile(f"Triton's compiler ended early: {last[0]}")
    return [
        Compiled(job, **found)
        for job, found in zip(jobs, json.loads(done.stdout), strict=True)
    ]


# in the other process -----------------------------------------------------------------


def kernels() -> ModuleType:
    """The file beside this one, without the rest of the room."""
    path = Path(__file__).with_name("kernels.py")
    spec = importlib.util.spec_from_file_location("kernels", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels"] = module
    spec.loader.exec_module(module)
    return module


def compiled(job: Job, kernel: Any, folder: Path, sass: bool) -> dict:
    """The fields of `Compiled`, in the process that compiles."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = job.all_constants
    scalars = ARGUMENTS[job.kernel][0]
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in scalars:
            signature[name] = "fp32" if name == "scale" else "i32"
        else:
            # a product of fp8 is stored wider
            wide = job.dtype == "fp8e4nv" and name == "c_ptr"
            signature[name] = "*fp32" if wide else f"*{job.dtype}"
    # as at a launch with tensors from PyTorch and sizes that are multiples of 16
    whole = [i for i, n in enumerate(signature) if signature[n][0] in "*i"]
    aligned = {(i,): [["tt.divisibility", 16]] for i in whole}
    made = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget(*TARGETS[job.target]),
        options={"num_warps": job.warps, "num_stages": job.stages},
    )
    texts = {k: made.asm[k] for k in ("ttir", "ttgir", "llir")}
    usage = ""
    if "ptx" in made.asm:
        texts["ptx"] = made.asm["ptx"]
        binary = folder / "kernel.cubin"
        binary.write_bytes(made.asm["cubin"])
        usage = tool("cuobjdump", "-res-usage", binary)
        if sass:
            texts["sass"] = tool("nvdisasm", "-c", binary)
    else:
        texts["amdgcn"] = made.asm["amdgcn"]
    return {
        "texts": texts,
        "shared": made.metadata.shared,
        "tensor": getattr(made.metadata, "tmem_size", 0) or 0,
        "usage": usage,
    }


def tool(name: str, *arguments: object) -> str:
    """What one of NVIDIA's tools in Triton's wheel writes; '' where it is not there."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not program.exists():
        return ""
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout


def main() -> None:
    """Jobs from the input, what they became to the output, both as JSON."""
    asked = json.load(sys.stdin)
    jobs = [Job(**job) for job in asked["jobs"]]
    known = kernels()
    with tempfile.TemporaryDirectory() as folder:
        found = [
            compiled(job, getattr(known, job.kernel), Path(folder), asked["sass"])
            for job in jobs
        ]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
