"""Occupancy: how many blocks a processor of a GPU (an SM) holds at a time.

NVIDIA's rules, from the text of its guides and from what its occupancy calculator does.
A block of `threads` is held if there is room for all of it:

    W        = ⌈threads / 32⌉                       warps of a block
    R        = registers · 32, rounded up to 256    registers of a warp
    S        = shared + 1 KB, rounded up to 128     bytes of a block (from 8.0 on)

    by warps       ⌊warps of the SM / W⌋
    by registers   ⌊ 4 ⌊16,384 / R⌋ / W ⌋           a warp lives in one of four parts
    by shared      ⌊shared memory of the SM / S⌋
    by blocks      a number of its own

    occupancy = blocks held · W / warps of the SM

Simplified: the SM gives as much as it can to shared memory, and a block may use all of
it (what a program has to ask for beyond 48 KB). Clusters, and the 1 KB that a CUDA
program may give back, are left out.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).parent / "data" / "capabilities.csv"
KB = 1024
WARP = 32  # threads
THREADS = 1024  # of a block, at most
REGISTERS = 64 * 1024  # of an SM, of 32 bits
REGISTER_UNIT = 256  # a warp gets multiples of it
REGISTERS_OF_A_THREAD = 255
PARTS = 4  # of an SM: each has a quarter of its registers


@dataclass(frozen=True)
class Limits:
    """What an SM of one compute capability has room for.

    Attributes:
        chips: some that have it.
        warps, blocks: at a time.
        shared: bytes of shared memory.
        shared_unit: a block gets multiples of it.
        reserved: bytes of a block's shared memory that CUDA keeps.
        source: bibtex key.
    """

    capability: str
    chips: str
    warps: int
    blocks: int
    shared: int
    shared_unit: int
    reserved: int
    source: str

    @property
    def shared_block(self) -> int:
        """Bytes that a block can ask for at most."""
        return self.shared - self.reserved


@cache
def capabilities() -> dict[str, Limits]:
    """Compute capability → limits, the oldest first."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return {
            line["capability"]: Limits(
                capability=line["capability"],
                chips=line["chips"],
                warps=int(line["warps"]),
                blocks=int(line["blocks"]),
                shared=int(line["shared_kb"]) * KB,
                shared_unit=int(line["shared_unit"]),
                reserved=int(line["reserved"]),
                source=line["source"],
            )
            for line in csv.DictReader(file)
        }


def limits(capability: str) -> Limits:
    """Of a compute capability, as "9.0".

    Raises:
        ValueError: it is not in the table.
    """
    if capability not in capabilities():
        known = ", ".join(capabilities())
        raise ValueError(f"capability={capability!r} must be one of {known}")
    return capabilities()[capability]


@dataclass(frozen=True)
class Occupancy:
    """What an SM holds.

    Attributes:
        of_a_block: warps.
        most: warps that the SM has room for.
        room: what limits → how many blocks it allows.
    """

    of_a_block: int
    most: int
    room: dict[str, int]

    @property
    def blocks(self) -> int:
        """That the SM holds at a time."""
        return min(self.room.values())

    @property
    def warps(self) -> int:
        """That the SM holds at a time."""
        return self.blocks * self.of_a_block

    @property
    def share(self) -> float:
        """Warps held, of those that there is room for."""
        return self.warps / self.most

    @property
    def limit(self) -> str:
        """What there is too little of; several, if they allow the same."""
        return ", ".join(name for name, n in self.room.items() if n == self.blocks)


def rounded_up(value: int, unit: int) -> int:
    """To the next multiple of `unit`."""
    return -(-value // unit) * unit


def occupancy(threads: int, registers: int, shared: int, sm: Limits) -> Occupancy:
    """Blocks of a kernel that an SM holds; 0 blocks: it cannot be launched there.

    Args:
        threads: of a block.
        registers: of a thread.
        shared: bytes of a block that the kernel asks for.

    Raises:
        ValueError: no GPU knows such a block or thread.
    """
    if not 1 <= threads <= THREADS:
        raise ValueError(f"threads={threads} must be from 1 to {THREADS}")
    if not 1 <= registers <= REGISTERS_OF_A_THREAD:
        raise ValueError(
            f"registers={registers} must be from 1 to {REGISTERS_OF_A_THREAD}"
        )
    if shared < 0:
        raise ValueError(f"shared={shared} must not be negative")
    warps = -(-threads // WARP)
    room = {
        "warps": sm.warps // warps,
        "registers": by_registers(warps, registers),
        "shared memory": by_shared(shared, sm),
        "blocks": sm.blocks,
    }
    return Occupancy(warps, sm.warps, room)


def by_registers(warps: int, registers: int) -> int:
    """Blocks for which there are registers: a warp has all of its in one part."""
    of_a_warp = rounded_up(registers * WARP, REGISTER_UNIT)
    in_a_part = REGISTERS // PARTS // of_a_warp
    return in_a_part * PARTS // warps


def by_shared(shared: int, sm: Limits) -> int:
    """Blocks for which there is shared memory."""
    of_a_block = rounded_up(shared + sm.reserved, sm.shared_unit)
    return sm.shared // of_a_block if of_a_block else sm.blocks
