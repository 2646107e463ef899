"""Tensor cores: who holds which number, how fast they go, and what feeds them.

**Fragments.** The operands of `mma.m16n8k16` lie in registers of a warp's 32 lanes.
With g = ⌊lane / 4⌋ and t = lane mod 4 (PTX ISA, 9.7.14.5.8), number i of a lane is

    A (16 × 16)   row g + 8 [i mod 4 ≥ 2]      col 2 t + (i mod 2) + 8 [i ≥ 4]
    B (16 × 8)    row 2 t + (i mod 2) + 8 [i ≥ 2]      col g
    C (16 × 8)    row g + 8 [i ≥ 2]            col 2 t + (i mod 2)

and in the result of `wgmma.m64nN`, of 128 threads, number i of a lane of warp w is

    D (64 × N)    row 16 w + g + 8 [i mod 4 ≥ 2]   col 8 ⌊i / 4⌋ + 2 t + (i mod 2)

**Speed.** peak = SMs · FLOPs per SM and clock · clock.

**Feeding.** An instruction of m × n × k reads (m + n) k numbers for 2 m n k FLOPs.
Where they come from shared memory, its 128 bytes per clock must be enough for the FLOPs
per clock.

Simplified: one instruction after another, none shares operands with the next.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from llmlab.chips.nvidia_gpu.transactions import BANKS, LANES, WORD

FILE = Path(__file__).parent / "data" / "generations.csv"
SHAPES = {"A": (16, 16), "B": (16, 8), "C": (16, 8)}  # of mma.m16n8k16
HELD = {"A": 8, "B": 4, "C": 4}  # numbers in each lane
SHARED_PER_CLOCK = BANKS * WORD  # bytes that an SM's shared memory gives


def element(matrix: str, lane: int, i: int) -> tuple[int, int]:
    """Row and column of number i in a lane's fragment of mma.m16n8k16.

    >>> element("A", 5, 2)
    (9, 2)

    Raises:
        ValueError: no such matrix, lane or number.
    """
    if matrix not in SHAPES:
        raise ValueError(f"matrix={matrix!r} must be A, B or C")
    if not 0 <= lane < LANES:
        raise ValueError(f"lane={lane} must be from 0 to {LANES - 1}")
    if not 0 <= i < HELD[matrix]:
        raise ValueError(f"i={i} must be from 0 to {HELD[matrix] - 1} for {matrix}")
    group, t = divmod(lane, 4)
    pair = 2 * t + i % 2
    if matrix == "A":
        return group + 8 * (i % 4 >= 2), pair + 8 * (i >= 4)
    if matrix == "B":
        return pair + 8 * (i >= 2), group
    return group + 8 * (i >= 2), pair


def owner(matrix: str, row: int, col: int) -> tuple[int, int]:
    """Lane and number that hold an element: `element` the other way round.

    Raises:
        ValueError: no such matrix, or the element is outside of it.
    """
    if matrix not in SHAPES:
        raise ValueError(f"matrix={matrix!r} must be A, B or C")
    rows, cols = SHAPES[matrix]
    if not (0 <= row < rows and 0 <= col < cols):
        raise ValueError(f"element ({row}, {col}) is outside of {rows} × {cols}")
    if matrix == "B":
        return 4 * col + row % 8 // 2, row % 2 + 2 * (row // 8)
    lane = 4 * (row % 8) + col % 8 // 2
    return lane, col % 2 + 2 * (row // 8) + 4 * (col // 8)


def wgmma_element(thread: int, i: int, n: int) -> tuple[int, int]:
    """Row and column of number i of a thread, in the 64 × n result of wgmma.

    Raises:
        ValueError: n is not 8, 16, … 256, or there is no such thread or number.
    """
    if n not in range(8, 257, 8):
        raise ValueError(f"n={n} must be a multiple of 8 from 8 to 256")
    if not 0 <= thread < 128:
        raise ValueError(f"thread={thread} must be from 0 to 127")
    if not 0 <= i < n // 2:
        raise ValueError(f"i={i} must be from 0 to {n // 2 - 1}")
    warp, lane = divmod(thread, LANES)
    group, t = divmod(lane, 4)
    return 16 * warp + group + 8 * (i % 4 >= 2), 8 * (i // 4) + 2 * t + i % 2


def fragments(matrix: str, values: np.ndarray) -> np.ndarray:
    """(lanes, numbers): what each lane holds of a matrix."""
    held = [
        [values[element(matrix, lane, i)] for i in range(HELD[matrix])]
        for lane in range(LANES)
    ]
    return np.array(held)


def gathered(matrix: str, held: np.ndarray) -> np.ndarray:
    """The matrix again, from what the lanes hold."""
    values = np.empty(SHAPES[matrix], held.dtype)
    for lane in range(LANES):
        for i in range(HELD[matrix]):
            values[element(matrix, lane, i)] = held[lane, i]
    return values


def mma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The instruction: fragments of A, B and C in, those of A B + C out."""
    full = gathered("A", a).astype(c.dtype) @ gathered("B", b).astype(c.dtype)
    return fragments("C", full + gathered("C", c))


@dataclass(frozen=True)
class Generation:
    """A chip, and what it is built of.

    Attributes:
        per_clock: dense FLOPs per SM and clock in 16 bits.
        clock: Hz, at which the peak is printed.
        latency: seconds until a number comes from memory; None: not measured by this
            source. Of the chip `latency_of`.
        sources: bibtex keys.
    """

    chip: str
    generation: str
    capability: str
    year: int
    sms: int
    per_clock: int
    clock: float
    format: str
    latency: float | None
    latency_of: str
    sources: tuple[str, ...]

    @property
    def peak(self) -> float:
        """Dense FLOP/s of all its SMs."""
        return self.sms * self.per_clock * self.clock


@cache
def generations() -> dict[str, Generation]:
    """Chip → what it is built of, the oldest first."""
    found = {}
    with FILE.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            clock = float(line["clock_ghz"]) * 1e9
            cycles = line["latency"]
            found[line["chip"]] = Generation(
                chip=line["chip"],
                generation=line["generation"],
                capability=line["capability"],
                year=int(line["year"]),
                sms=int(line["sms"]),
                per_clock=int(line["per_clock"]),
                clock=clock,
                format=line["format"],
                latency=float(cycles) / clock if cycles else None,
                latency_of=line["latency_of"],
                sources=tuple(line["sources"].split()),
            )
    return found


def fed(m: int, n: int, k: int, per_clock: float, width: float = 2) -> float:
    """Bytes per clock of A and B that an SM needs to go at `per_clock` FLOPs.

    Raises:
        ValueError: a size is not positive.
    """
    for name, value in {"m": m, "n": n, "k": k, "per_clock": per_clock}.items():
        if not value > 0:
            raise ValueError(f"{name}={value} must be above 0")
    if not width > 0:
        raise ValueError(f"width={width} must be above 0")
    return (m + n) * k * width / (2 * m * n * k) * per_clock


def in_flight(bandwidth: float, latency: float) -> float:
    """Bytes that must be under way at any time to reach the bandwidth: Little's law.

    Raises:
        ValueError: one of them is not positive.
    """
    if not (bandwidth > 0 and latency > 0):
        raise ValueError(f"bandwidth={bandwidth} and latency={latency} must be above 0")
    return bandwidth * latency
