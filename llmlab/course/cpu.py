"""The CPU that the course runs on: its name and the vector instructions that matter.

Numbers in their last digits, and the code that bitsandbytes takes, depend on them.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# Flags as Linux writes them, and what they are called here; sysctl's names on a Mac.
FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512-BF16",
    "avx512_vnni": "AVX-512-VNNI",
    "amx_bf16": "AMX-BF16",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "BF16",
    "i8mm": "I8MM",
}
SYSCTL = {
    "hw.optional.avx2_0": "AVX2",
    "hw.optional.avx512f": "AVX-512",
    "hw.optional.neon": "NEON",
    "hw.optional.arm.FEAT_BF16": "BF16",
    "hw.optional.arm.FEAT_I8MM": "I8MM",
}


@dataclass(frozen=True)
class Cpu:
    """A CPU as far as it matters here.

    Attributes:
        name: as its maker or the system calls it.
        instructions: vector instructions, by the names above.
        capability: the kernels that torch chose, such as "AVX2".
    """

    name: str
    instructions: tuple[str, ...]
    capability: str

    def __str__(self) -> str:
        has = ", ".join(self.instructions) or "vector instructions not known"
        return f"{self.name}: {has}; torch uses {self.capability}"


def describe() -> Cpu:
    """This machine's CPU, and what torch uses of it."""
    import torch

    return Cpu(*identify(), torch.backends.cpu.get_cpu_capability())


def identify() -> tuple[str, tuple[str, ...]]:
    """The CPU's name and vector instructions, without torch.

    Where the system says nothing, the name is the machine's kind and the rest is empty.
    """
    if sys.platform == "darwin":
        name, instructions = from_sysctl(_sysctl())
    else:
        name, instructions = from_cpuinfo(_cpuinfo())
    return name or platform.processor() or platform.machine(), instructions


def _cpuinfo() -> str:
    return CPUINFO.read_text(encoding="utf-8") if CPUINFO.is_file() else ""


def from_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Name and instructions from the text of /proc/cpuinfo, of x86 or ARM."""
    name = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M)
    has = set(flags[1].split()) if flags else set()
    instructions = tuple(label for flag, label in FLAGS.items() if flag in has)
    return (name[1].strip() if name else "", instructions)


def _sysctl() -> str:
    command = ["sysctl", "machdep.cpu.brand_string", "hw.optional"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def from_sysctl(text: str) -> tuple[str, tuple[str, ...]]:
    """Name and instructions from what `sysctl` prints on a Mac: 'key: value' lines."""
    values = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    instructions = tuple(
        label for key, label in SYSCTL.items() if values.get(key, "0").strip() == "1"
    )
    return values.get("machdep.cpu.brand_string", ""), instructions


def what_it_changes(cpu: Cpu) -> str:
    """What the CPU changes for the course, in a sentence or two; '' for nothing."""
    said = []
    if "AVX-512" in cpu.instructions:
        said.append(
            "bitsandbytes 0.50 decodes 4-bit weights wrongly with AVX-512 where the "
            "block size does not divide the length of a row."
        )
    if "AVX-512-BF16" in cpu.instructions:
        said.append(
            "It repacks a Linear4bit at its first forward in eval mode, computes in "
            "bf16, and passes no gradient from then on: call model.train() before the "
            "first forward when you will train (lesson 04-peft/07)."
        )
    if "NEON" in cpu.instructions:
        said.append("The course was not run on ARM: last digits may differ.")
    return " ".join(said)
