"""Which tile is best: what rules some out, and a model that ranks the others.

An autotuner runs every candidate and keeps the fastest. Most candidates need not run.
Compiled, each says what it needs; a processor of a GPU has so many registers, so much
shared memory and room for so many warps, and that decides how many tiles it holds at a
time (its occupancy). From that, a rough time:

    at once = processors · tiles per processor        waves = ⌈tiles / at once⌉
    time    = waves · max(products / peak, bytes / bandwidth, loads / cache)

of one full wave. Its bytes are those of its rows and columns of tiles, each once from
memory; its loads are those of all its tiles, and come from the second cache. So small
tiles wait for the cache, and large ones leave processors without work.

Simplified: the products run at the chip's peak, nothing else takes time, and the cache
holds a wave. So it ranks candidates; it does not say how long they take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from llmlab.models.chips import chip


@dataclass(frozen=True)
class Gpu:
    """A chip, per processor where not said otherwise.

    Attributes:
        shared: bytes of shared memory. One tile may have RESERVED less.
        registers, warps, tiles: there is room for so many.
        flops: of the chip in fp16, per second.
        bandwidth, cache: bytes per second of its memory and of its second cache.
    """

    name: str
    target: str
    processors: int
    shared: int
    flops: float
    bandwidth: float
    cache: float
    registers: int = 65536
    warps: int = 64
    tiles: int = 32


KB = 1024
RESERVED = 1 * KB  # shared memory that CUDA keeps of each tile
PARTS = 4  # of a processor's registers


def gpu_of(name: str, target: str, processors: int, shared: int, clock: float) -> Gpu:
    """With the course's figures for the chip.

    The A100's cache reads 5,120 bytes per clock (NVIDIA 2020). For the H100 none is
    published: the same per clock is taken.
    """
    known = chip(name)
    flops, bandwidth = known.speed("fp16"), known.bandwidth
    return Gpu(name, target, processors, shared, flops, bandwidth, 5120 * clock)


A100 = gpu_of("A100", "sm_80", 108, 164 * KB, 1.41e9)
H100 = gpu_of("H100", "sm_90", 132, 228 * KB, 1.755e9)


@dataclass(frozen=True)
class Problem:
    """Sizes of GELU(x w + b): x is (T, d), w is (d, f), in 16 bits."""

    T: int
    d: int
    f: int


def occupancy(needs: Mapping, gpu: Gpu) -> tuple[int, str]:
    """Tiles that a processor holds at a time, and what there is too little of.

    Args:
        needs: the facts of a compiled kernel: shared, registers, warps.
    """
    per_warp = 32 * 8 * math.ceil(needs["registers"] / 8)  # given away by eights
    warps = PARTS * (gpu.registers // PARTS // per_warp)  # each has all in one part
    room = {
        "shared memory": gpu.shared // (needs["shared"] + RESERVED),
        "registers": warps // needs["warps"],
        "warps": gpu.warps // needs["warps"],
        "tiles": gpu.tiles,
    }
    limit = min(room, key=room.get)
    return room[limit], limit


def refusal(needs: Mapping, gpu: Gpu, problem: Problem) -> str:
    """Why a candidate need not be tried, '' where it should be."""
    tiles, limit = occupancy(needs, gpu)
    if tiles == 0:
        return f"too little of {limit}"
    if needs["spilled"]:
        return f"{needs['spilled']} bytes of registers per thread went to memory"
    rows, cols = needs["constants"]["ROWS"], needs["constants"]["COLS"]
    for name, size, there in (("rows", rows, problem.T), ("columns", cols, problem.f)):
        if size >= 2 * there:
            return f"half of its {name} or more would be masked off"
    return ""


def seconds(needs: Mapping, gpu: Gpu, problem: Problem) -> float:
    """The model's time; ∞ where no tile fits."""
    held, _ = occupancy(needs, gpu)
    if held == 0:
        return math.inf
    constants = needs["constants"]
    rows, cols, group = constants["ROWS"], constants["COLS"], constants["GROUP"]
    down, across = math.ceil(problem.T / rows), math.ceil(problem.f / cols)
    at_once = gpu.processors * held
    waves = math.ceil(down * across / at_once)
    working = min(at_once, down * across)
    # a processor that holds several tiles shares its peak among them
    busiest = math.ceil(working / gpu.processors)
    product = busiest * 2 * rows * cols * problem.d / (gpu.flops / gpu.processors)
    high = min(group, down)
    wide = min(across, math.ceil(working / high))
    stored = working * rows * cols
    moved = 2 * (problem.d * (high * rows + wide * cols) + stored)
    loads = 2 * working * problem.d * (rows + cols)
    return waves * max(product, moved / gpu.bandwidth, loads / gpu.cache)
