"""What a schedule must know of the processor, and the schedules that came out best."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from llmlab.compilers.back_end.ir import Loop, Program
from llmlab.compilers.back_end.schedule import Step
from llmlab.models.c_library import cpu_flags


@dataclass(frozen=True)
class Machine:
    """The registers of a core.

    Attributes:
        lanes: floats in a vector register.
        registers: how many of them there are.
    """

    name: str
    lanes: int
    registers: int

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of C that stay in registers while k runs.

        Two registers of columns; two more hold a row of B, and one is spare.
        """
        return (self.registers - 4) // 2, 2 * self.lanes


AVX512 = Machine("AVX-512", 16, 32)
AVX2 = Machine("AVX2", 8, 16)
NEON = Machine("NEON", 4, 32)
SSE = Machine("SSE", 4, 16)


def this() -> Machine:
    """The machine that runs this."""
    words = set(cpu_flags().lower().split())
    if "avx512f" in words:
        return AVX512
    if {"avx2", "fma"} <= words:
        return AVX2
    if platform.machine().lower() in ("arm64", "aarch64"):
        return NEON
    return SSE


def best_schedule(machine: Machine | None = None) -> list[Step]:
    """Of `programs.matmul`: a panel of B packed, a block of C in registers."""
    machine = machine or this()
    rows, columns = machine.block
    return [
        ("tile", "zj", machine.lanes),
        ("vectorise", "zj_i"),
        ("tile", "j", columns),
        ("tile", "j_i", machine.lanes),
        ("tile", "i", rows),
        ("reorder", "j_o", "i_o", "k", "i_i", "j_i_o", "j_i_i"),
        ("unroll", "i_i"),
        ("unroll", "j_i_o"),
        ("vectorise", "j_i_i"),
        ("pack", "B", "j_o"),
        ("cache", "C", "i_o"),
    ]


def matvec_schedule(group: int = 128, machine: Machine | None = None) -> list[Step]:
    """Of `programs.matvec_4bit`: no product is ever written.

    Words of a group are lanes; the loops over the codes in a word are written out. Rows
    of several streams share what is read of x, and their sums do not wait for each
    other.
    """
    lanes = min((machine or this()).lanes, group // 8)
    tiles: list[Step] = []
    for name in ("xm", "Zm", "Xm", "zm", "tm", "m", "am"):
        tiles += [("tile", name, lanes), ("vectorise", f"{name}_i")]
        tiles.append(("unroll", f"{name}_o"))
    nests = ("z", "t", "", "a", "y", "s")  # how the names of their loops begin
    order = [
        ("reorder", "zi", "zq", "zm"),
        ("reorder", "ti", "tg", "tq", "tm"),
        ("reorder", "i", "g", "b", "h", "q", "m"),
        ("reorder", "ai", "ag", "aq", "am"),
        ("reorder", "yi", "yq"),
        ("reorder", "si", "sq", "sm"),
    ]
    codes = [("unroll", name) for name in ("xb", "xh", "Xb", "Xh", "b", "h", "sm")]
    streams = [("unroll", f"{each}q") for each in nests]
    # a row of each stream: zeros, products, scales, the sum of the lanes
    rows = [("merge", "zi", f"{each}i") for each in nests[1:]]
    groups = [("merge", "tg", "g"), ("merge", "tg", "ag")]
    kept = [("cache", "t", "tg"), ("cache", "z", "zi"), ("prefetch", "w", 128)]
    return [*order, *tiles, *codes, *streams, *rows, *groups, *kept]


def mlp_schedule(program: Program, machine: Machine | None = None) -> list[Step]:
    """Of a product and elementwise operations after it, from the front end's graph.

    The block of the product is in registers when bias and GELU are done to it, so that
    nothing but the result is written.
    """
    machine = machine or this()
    rows, columns = machine.block
    lanes = machine.lanes
    last = [node.var for node in program.body if isinstance(node, Loop)][-1][1:]
    temporaries = [each.name for each in program.buffers if each.role == "temporary"]
    steps: list[Step] = [("inline", name) for name in temporaries if name != "t0"]
    for i, j, inner in (
        ("zi0", "zj0", ()),
        ("i0", "j0", ("k0",)),
        (f"i{last}", f"j{last}", ()),
    ):
        steps += [
            ("tile", j, columns),
            ("tile", f"{j}_i", lanes),
            ("tile", i, rows),
            ("reorder", f"{j}_o", f"{i}_o", *inner, f"{i}_i", f"{j}_i_o", f"{j}_i_i"),
            ("unroll", f"{i}_i"),
            ("unroll", f"{j}_i_o"),
            ("vectorise", f"{j}_i_i"),
        ]
    for other in ("0", last):
        steps.append(("merge", "zj0_o", f"j{other}_o"))
    for other in ("0", last):
        steps.append(("merge", "zi0_o", f"i{other}_o"))
    return [*steps, ("pack", "in1", "zj0_o"), ("cache", "t0", "zi0_o")]


def attention_schedule(machine: Machine | None = None) -> list[Step]:
    """Of the part's attention row, from the front end's graph.

    K and V are read once, row by row; what lies between is a row of scores.
    """
    lanes = (machine or this()).lanes
    return [
        # scores: lanes along a key, one sum each
        ("tile", "k0", lanes),
        ("partial_sums", "k0_i", "j0"),
        *[("vectorise", name) for name in ("k0_i", "t0_k0_i_zero")],
        ("unroll", "k0_o"),
        *[("merge", "zj0", name) for name in ("j0", "j1")],
        ("cache", "t0", "zj0"),
        # the largest score is found on the way
        ("move", "zj2", "zj0"),
        ("merge", "zj0", "k2"),
        # exponentials and their sum
        ("inline", "t3"),
        ("tile", "j4", lanes),
        ("vectorise", "j4_i"),
        # values: lanes along the width of the head
        ("inline", "t6"),
        ("reorder", "k7", "j7"),
        ("tile", "j7", lanes),
        ("tile", "zj7", lanes),
        *[("vectorise", name) for name in ("j7_i", "zj7_i")],
        *[("unroll", name) for name in ("j7_o", "zj7_o")],
        ("cache", "t7", ""),
    ]


def ladder(machine: Machine | None = None) -> dict[str, list[Step]]:
    """From the naive product to the best schedule, one idea at a time."""
    machine = machine or this()
    lanes = machine.lanes
    rows, columns = machine.block
    tiled: list[Step] = [
        ("tile", "j", 8 * columns),
        ("tile", "k", 64),
        ("reorder", "j_o", "k_o", "i", "k_i", "j_i"),
    ]
    block: list[Step] = [
        ("tile", "j", columns),
        ("tile", "j_i", lanes),
        ("tile", "i", rows),
        ("reorder", "j_o", "i_o", "k", "i_i", "j_i_o", "j_i_i"),
        ("unroll", "i_i"),
        ("unroll", "j_i_o"),
        ("vectorise", "j_i_i"),
        ("cache", "C", "i_o"),
    ]
    return {
        "naive": [],
        "reorder": [("reorder", "i", "k", "j")],
        "tile": tiled,
        "vectorise": [*tiled, ("tile", "j_i", lanes), ("vectorise", "j_i_i")],
        "register block": block,
        "pack": best_schedule(machine),
    }
