"""Compiled texts read: what each line of a kernel became, and what it needs.

Triton's texts say where they come from. In its MLIR (TTIR, TTGIR) each operation ends
with `loc(#loc7)`, and a table at the end says which line that is; in assembly `.loc`
stands before the instructions of a line. So lines of all levels can be put side by side
without a guess.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from llmlab.compilers.triton_kernels.compiling import Compiled

# Kinds of instructions, the first pattern that matches: PTX and AMD's assembly.
KINDS = (
    ("tensor core", r"mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_s?mfma"),
    ("copy engine", r"cp\.async\.bulk\.tensor"),
    ("background copy", r"cp\.async\.c[ag]|(buffer|global)_load_lds"),
    ("load", r"ld\.global|(global|buffer|flat)_load"),
    ("store", r"st\.global|(global|buffer|flat)_store"),
    ("tensor memory", r"tcgen05\.(ld|st|alloc|dealloc|cp)"),
    ("shared memory", r"(ld|st)\.shared|(ld|st)matrix|ds_"),
    (
        "wait",
        r"bar|mbarrier|cp\.async|wgmma|tcgen05|fence|membar|s_waitcnt|s_barrier"
        r"|nanosleep|griddepcontrol",
    ),
    (
        "arithmetic",
        r"(add|sub|mul|fma|div|max|min|neg|abs|ex2|rcp|lg2|sqrt|cvt|tanh)"
        r"\.(rn|full|approx|ftz|rz|[a-z.]*)*\.?(f32|f16|bf16|f16x2|bf16x2)"
        r"|v_(pk_)?(add|sub|mul|fma|fmac|mac|div|max|min|exp|rcp|log|cvt|ldexp|fract)"
        r"_.*f(32|16)|v_.*bf16",
    ),
    ("control", r"bra|ret|exit|s_cbranch|s_branch|s_endpgm|s_nop|s_setprio"),
    ("addresses and moves", r"."),
)
PRODUCT = re.compile(KINDS[0][1])


@dataclass(frozen=True)
class Word:
    """An operation or an instruction, and the line of the kernel's file.

    The line is 0 where the text does not say.
    """

    name: str
    line: int


def operations(mlir: str) -> list[Word]:
    """The operations of TTIR or TTGIR, in their order."""
    lines_of = locations(mlir)
    found: list[Word] = []
    opened: list[int | None] = []  # places in `found` that still lack their line
    for text in mlir.splitlines():
        stripped = text.strip()
        if stripped.startswith("#") or not stripped:
            continue
        where = re.findall(r"loc\(#(loc\d*)\)", stripped)
        line = lines_of.get(where[-1], 0) if where else 0
        if stripped.startswith("}") and opened:
            place = opened.pop()
            if place is not None and line:
                found[place] = Word(found[place].name, line)
            if stripped.endswith("{"):
                opened.append(None)
            continue
        named = re.match(r'(?:[%\w:#, ]+ = )?"?([a-z_]+\.[a-z_.0-9]+)"?', stripped)
        counted = named is not None and named[1] != "tt.func"
        if counted:
            found.append(Word(named[1], line))
        if stripped.endswith("{"):
            opened.append(len(found) - 1 if counted else None)
    return [word for word in found if not word.name.endswith((".yield", ".return"))]


def locations(mlir: str) -> dict[str, int]:
    """Name of a location → its line; of what was called, the line of the call."""
    raw = dict(re.findall(r"^#(loc\d*) = loc\((.*)\)$", mlir, flags=re.MULTILINE))

    def line(name: str) -> int:
        text = raw.get(name, "")
        call = re.match(r"callsite\(#\w+ at #(\w+)\)", text)
        if call:
            return line(call[1])
        inner = re.search(r"\(#(loc\d*)\)", text)
        if inner:
            return line(inner[1])
        place = re.match(r'".*":(\d+):\d+', text)
        return int(place[1]) if place else 0

    return {name: line(name) for name in raw}


def instructions(assembly: str) -> Iterator[Word]:
    """The instructions of PTX or of AMD's assembly, in their order."""
    line = 0
    for text in assembly.splitlines():
        stripped = text.strip()
        if stripped.startswith(".loc"):
            # "kernels.py:12:8", or "standard.py:43:17 @[ kernels.py:12:8 ]": the call
            places = re.findall(r"\w+\.py:(\d+):\d+", stripped)
            line = int(places[-1]) if places else 0
            continue
        if stripped.startswith((".section", ".amdgpu_metadata")):
            return
        word = re.match(
            r"(?:@!?%\w+\s+)?([a-z][a-z0-9_]*(?:[.:]+[a-z0-9_]+)*)[\s;]", stripped + " "
        )
        if word and not stripped.endswith(":") and not stripped.startswith("//"):
            yield Word(word[1], line)


def kind_of(instruction: str) -> str:
    """The kind, by its first letters."""
    return next(kind for kind, pattern in KINDS if re.match(pattern, instruction))


def assembly(compiled: Compiled) -> str:
    """The last text that a person can read."""
    return compiled.texts.get("ptx") or compiled.texts["amdgcn"]


def layouts(ttgir: str) -> dict[str, str]:
    """Name → layout, as the text has them."""
    pattern = r"^(#\w+) = (#tt\w+\.\w+<.*>)$"
    return dict(re.findall(pattern, ttgir, flags=re.MULTILINE))


def registers(compiled: Compiled) -> int:
    """32-bit registers per thread."""
    found = re.search(r"REG:(\d+)", compiled.usage)
    if not found:
        found = re.search(r"\.vgpr_count:\s+(\d+)", assembly(compiled))
    return int(found[1]) if found else 0


def spilled(compiled: Compiled) -> int:
    """Bytes per thread of registers that went to memory instead."""
    found = re.search(r"STACK:(\d+)", compiled.usage)
    if found:
        return int(found[1])
    found = re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly(compiled))
    return 4 * int(found[1]) if found else 0


def product(instruction: str, ttgir: str, itemsize: int) -> dict:
    """What one instruction of a tensor core does.

    `shape` is (m, n, k) of the block that it multiplies; `threads` issue it together.

    Args:
        ttgir: where the shape of tcgen05 stands: its text has it in a register.
        itemsize: bytes of an operand's number.
    Raises:
        ValueError: no such instruction.
    """
    found = re.search(r"m(\d+)n(\d+)k(\d+)", instruction)
    found = found or re.search(r"_(\d+)x(\d+)x(\d+)_?", instruction)
    if instruction.startswith("tcgen05.mma"):
        tile = re.search(r"blockM = (\d+), blockN = (\d+)", ttgir)
        shape = [int(tile[1]), int(tile[2]), 32 // itemsize]  # k is 32 bytes
        return {"shape": shape, "threads": 1}
    if not found:
        raise ValueError(f"{instruction!r} is no product of a tensor core")
    threads = 32
    if instruction.startswith("wgmma"):
        threads = 128
    elif instruction.startswith("v_"):
        threads = 64
    return {"shape": [*map(int, found.groups())], "threads": threads}


ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8e4nv": 1}


def facts(compiled: Compiled, by_line: bool = False) -> dict:
    """What is kept of a compiled kernel: numbers and names, no text.

    Args:
        by_line: also, for each line of the kernel, the names at all levels. Lines are
            counted from the kernel's `def`.
    """
    words = list(instructions(assembly(compiled)))
    ttgir = compiled.texts["ttgir"]
    job = compiled.job
    names = Counter(word.name for word in words if PRODUCT.match(word.name))
    found = {
        **job.described,
        "shared": compiled.shared,
        "tensor": compiled.tensor,
        "registers": registers(compiled),
        "spilled": spilled(compiled),
        "products": {
            name: {"count": n, **product(name, ttgir, ITEMSIZE[job.dtype])}
            for name, n in sorted(names.items())
        },
        "kinds": dict(Counter(kind_of(word.name) for word in words).most_common()),
        "layouts": layouts(ttgir),
    }
    if "sass" in compiled.texts:
        found["sass"] = machine_words(compiled.texts["sass"])
    if by_line:
        found["lines"] = lines(compiled, words)
    return found


def machine_words(sass: str) -> dict[str, int]:
    """Products and copies in NVIDIA's machine code."""
    pattern = r"\b(?:[HIQ]G?MMA|UTC\w*MMA|LDGSTS|LDSM|UTMALDG)\b[.A-Zx0-9]*"
    return dict(sorted(Counter(re.findall(pattern, sass)).items()))


def lines(compiled: Compiled, words: list[Word]) -> dict[str, dict]:
    """Line from the kernel's `def` on → level → name → how often."""
    start = first_line(compiled.texts["ttgir"])
    levels = {level: operations(compiled.texts[level]) for level in ("ttir", "ttgir")}
    levels["assembly"] = words
    found: dict[int, dict[str, Counter]] = {}
    for level, each in levels.items():
        for word in each:
            if word.line > start:
                at = found.setdefault(word.line - start, {})
                at.setdefault(level, Counter())[word.name] += 1
    return {
        str(line): {level: dict(n.most_common()) for level, n in found[line].items()}
        for line in sorted(found)
    }


def first_line(ttgir: str) -> int:
    """The line of the kernel's `def`."""
    return int(re.search(r'^#loc = loc\("[^"]*":(\d+):', ttgir, re.MULTILINE)[1])
