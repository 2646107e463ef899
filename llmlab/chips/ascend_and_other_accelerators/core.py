"""A core of Huawei's Ascend: what its units do in a cycle, and what its buffers hold.

Liao et al. 2021, "Ascend: a scalable and unified architecture for ubiquitous deep
neural network computing", https://doi.org/10.1109/HPCA51647.2021.00071; the figures are
those of the files `platform_config/*.ini` that Huawei's toolkit CANN reads.

    cube     C += A B for A (m₀, k₀) and B (k₀, n₀), one such step in a cycle
    vector   one instruction on 128 numbers of 16 bits in a cycle
    MTE2     global memory → L1        MTE1   L1 → L0A, L0B
    MTE3     unified buffer → global memory

    M, K, N     a product: (M, K) by (K, N)
    m, k, n     one tile of it: (m, k) of A in L0A, (k, n) of B in L0B, (m, n) in L0C
    tiles       ⌈M/m⌉ ⌈K/k⌉ ⌈N/n⌉
    A is read   ⌈N/n⌉ times, B ⌈M/m⌉ times, C is written once: it stays in L0C for all
                of k

Simplified: each unit works at its full rate, instructions cost nothing to issue, and an
instruction of the vector unit takes one cycle for 128 numbers, an exponential as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

# format → (m₀, k₀, n₀) of one cycle of the cube, and bytes of a number
FORMATS = {
    "fp16": ((16, 16, 16), 2.0),
    "int8": ((16, 32, 16), 1.0),
    "int4": ((16, 64, 16), 0.5),
}
SUM_BYTES = 4  # of a number in L0C: sums are in 32 bits


@dataclass(frozen=True)
class Core:
    """One core, how many of them a chip has, and the clock.

    Sizes are in bytes; the rates of the roads between buffers in bytes per cycle.

    Raises:
        ValueError: a figure is not above 0.
    """

    name: str
    cores: int
    hertz: float
    lanes: int = 128  # numbers of 16 bits in one vector instruction
    vectors: int = 1  # vector units per cube
    l0a: int = 64 * 1024
    l0b: int = 64 * 1024
    l0c: int = 256 * 1024
    l1: int = 1024 * 1024
    ub: int = 256 * 1024
    memory_rate: float = 32  # from the chip's memory to one core
    l2_rate: float = 110  # from the cache that all cores share
    l0a_rate: float = 512  # from L1
    l0b_rate: float = 256
    result_rate: float = 256  # from L0C to the unified buffer
    out_rate: float = 64  # from the unified buffer to memory

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "name" and not value > 0:
                raise ValueError(f"{field.name}={value} must be above 0")

    def buffers(self) -> dict[str, int]:
        """Bytes of the three buffers beside the cube."""
        return {"l0a": self.l0a, "l0b": self.l0b, "l0c": self.l0c}


# Ascend910A.ini and Ascend910B2C.ini of CANN
CORES = {
    "Ascend 910": Core("Ascend 910", cores=32, hertz=1.0e9),
    "Ascend 910B": Core(
        "Ascend 910B",
        cores=24,
        hertz=1.8e9,
        vectors=2,
        l0c=128 * 1024,
        l1=512 * 1024,
        ub=192 * 1024,
    ),
}


def core(name: str) -> Core:
    """The core of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in CORES:
        raise ValueError(f"name={name!r} is not known: use one of {', '.join(CORES)}")
    return CORES[name]


def step(format: str) -> tuple[int, int, int]:
    """(m₀, k₀, n₀): what the cube multiplies in one cycle.

    Raises:
        ValueError: the cube does not know the format.
    """
    if format not in FORMATS:
        raise ValueError(
            f"format={format!r} is not one of the cube's: {', '.join(FORMATS)}"
        )
    return FORMATS[format][0]


def number_bytes(format: str) -> float:
    """Bytes of one number."""
    step(format)
    return FORMATS[format][1]


def peak(core: Core, format: str = "fp16") -> float:
    """FLOP/s of the whole chip: cores · 2 m₀ k₀ n₀ · clock."""
    return core.cores * 2 * math.prod(step(format)) * core.hertz


def vector_peak(core: Core) -> float:
    """Numbers per second of the vector units of the whole chip."""
    return core.cores * core.vectors * core.lanes * core.hertz


def _whole(**sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


def up(size: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-size // unit) * unit


def cube_cycles(m: int, k: int, n: int, format: str = "fp16") -> int:
    """Cycles of a product (m, k) by (k, n): what does not fill a step costs a whole."""
    _whole(m=m, k=k, n=n)
    m0, k0, n0 = step(format)
    return math.ceil(m / m0) * math.ceil(k / k0) * math.ceil(n / n0)


def used(m: int, k: int, n: int, format: str = "fp16") -> float:
    """Which part of the cube's products is of the matrices, and not of padding."""
    return m * k * n / (cube_cycles(m, k, n, format) * math.prod(step(format)))


# Tiles --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """What lies beside the cube at once: (m, k) of A, (k, n) of B, (m, n) of C.

    Raises:
        ValueError: a size is not a whole number of at least 1.
    """

    m: int
    k: int
    n: int

    def __post_init__(self) -> None:
        _whole(m=self.m, k=self.k, n=self.n)


def tile_bytes(tile: Tile, format: str = "fp16", double: bool = True) -> dict[str, int]:
    """Bytes in L0A, L0B and L0C, padded to whole fractals.

    Args:
        double: two of each, so that one is filled while the other is used.
    """
    m0, k0, n0 = step(format)
    m, k, n = up(tile.m, m0), up(tile.k, k0), up(tile.n, n0)
    copies = 2 if double else 1
    size = number_bytes(format)
    return {
        "l0a": int(copies * m * k * size),
        "l0b": int(copies * k * n * size),
        "l0c": copies * m * n * SUM_BYTES,
    }


def overflows(
    core: Core, tile: Tile, format: str = "fp16", double: bool = True
) -> list[str]:
    """The buffers that are too small for the tile; [] if it fits."""
    needed = tile_bytes(tile, format, double)
    return [name for name, has in core.buffers().items() if needed[name] > has]


def product_bytes(
    m: int, k: int, n: int, tile: Tile, format: str = "fp16"
) -> dict[str, float]:
    """Bytes of A, B and C that a tiled product moves towards the cube and away."""
    _whole(m=m, k=k, n=n)
    size = number_bytes(format)
    return {
        "a": math.ceil(n / tile.n) * m * k * size,
        "b": math.ceil(m / tile.m) * k * n * size,
        "c": m * n * 2.0,  # leaves as 16 bits
    }


def product_cycles(
    core: Core,
    m: int,
    k: int,
    n: int,
    tile: Tile,
    format: str = "fp16",
    feed: str = "l2",
) -> dict[str, float]:
    """Cycles of each unit for a product on one core; the largest is the bound.

    Args:
        feed: where A and B come from: "l2", the cache of all cores, or "memory".

    Raises:
        ValueError: the tile does not fit twice, or feed is unknown.
    """
    if feed not in ("l2", "memory"):
        raise ValueError(f"feed={feed!r} must be 'l2' or 'memory'")
    over = overflows(core, tile, format)
    if over:
        raise ValueError(f"tile={tile} does not fit twice into {', '.join(over)}")
    moved = product_bytes(m, k, n, tile, format)
    rate = core.l2_rate if feed == "l2" else core.memory_rate
    return {
        "MTE2": (moved["a"] + moved["b"]) / rate,
        "MTE1": moved["a"] / core.l0a_rate + moved["b"] / core.l0b_rate,
        "M": _tiled_cube_cycles(m, k, n, tile, format),
        "V": m * n * SUM_BYTES / core.result_rate,
        "MTE3": moved["c"] / core.out_rate,
    }


def _tiled_cube_cycles(m: int, k: int, n: int, tile: Tile, format: str) -> int:
    """Steps of the cube, when each tile is padded on its own."""
    steps = 1
    for size, part, unit in zip(
        (m, k, n), (tile.m, tile.k, tile.n), step(format), strict=True
    ):
        whole, rest = divmod(size, part)
        steps *= whole * math.ceil(part / unit) + math.ceil(rest / unit)
    return steps


def tiles(core: Core, format: str = "fp16") -> list[Tile]:
    """All tiles of powers of two that fit twice."""
    sizes = [2**e for e in range(4, 11)]
    m0, k0, n0 = step(format)
    found = [
        Tile(m, k, n)
        for m in sizes
        for k in sizes
        for n in sizes
        if m >= m0 and k >= k0 and n >= n0
    ]
    return [tile for tile in found if not overflows(core, tile, format)]


def best_tile(
    core: Core, m: int, k: int, n: int, format: str = "fp16", feed: str = "l2"
) -> tuple[Tile, dict[str, float]]:
    """The tile whose slowest unit is the fastest, and the cycles of its units."""
    found = [
        (tile, product_cycles(core, m, k, n, tile, format, feed))
        for tile in tiles(core, format)
    ]
    return min(found, key=lambda pair: (max(pair[1].values()), sum(pair[1].values())))
