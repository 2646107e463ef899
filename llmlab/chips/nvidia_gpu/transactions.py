"""What a warp's 32 addresses cost: sectors of global memory, cycles of shared memory.

CUDA C++ Best Practices Guide (NVIDIA), 10.2, and CUDA Programming Guide, 2.2.4.

**Global memory** moves sectors of 32 bytes, four to a cache line of 128. A warp's load
or store takes each sector that it touches once, and all of it:

    sectors = | { ⌊a / 32⌋ : a an address } |       moved = 32 · sectors

**Shared memory** has 32 banks of 4 bytes. In a cycle each bank gives one word to
whoever asked for that word. Accesses of 8 or 16 bytes go in phases, of 16 or 8 lanes:

    word = ⌊a / 4⌋,   bank = word mod 32
    cycles = Σ over phases of max over banks of | { words of the bank } |

    a       address in bytes, a multiple of the width, as a GPU demands
    width   bytes of one lane: 1, 2, 4, 8 or 16
    active  which lanes take part; the others were masked off

Simplified: no cache is asked (each request counts as if it were the first), and where
two phases ask for the same words a GPU may need fewer cycles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

SECTOR = 32  # bytes
LINE = 128  # bytes
BANKS = 32
WORD = 4  # bytes that a bank gives in a cycle
LANES = 32  # of a warp
WIDTHS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Transactions:
    """What requests of warps to global memory take.

    Attributes:
        requests: instructions, one per warp.
        sectors, lines: that they touch, each once per request.
        asked: bytes that lanes asked for, the same bytes once per request.
    """

    requests: int = 0
    sectors: int = 0
    lines: int = 0
    asked: int = 0

    @property
    def moved(self) -> int:
        """Bytes of the sectors."""
        return SECTOR * self.sectors

    @property
    def efficiency(self) -> float:
        """The part of what is moved that somebody asked for; 1 where nothing is."""
        return self.asked / self.moved if self.moved else 1.0

    def __add__(self, other: Transactions) -> Transactions:
        return Transactions(
            self.requests + other.requests,
            self.sectors + other.sectors,
            self.lines + other.lines,
            self.asked + other.asked,
        )


@dataclass(frozen=True)
class BankCycles:
    """What requests of warps to shared memory take.

    Attributes:
        requests: instructions, one per warp.
        cycles: in which the banks answer.
        least: cycles without any conflict, one per phase.
    """

    requests: int = 0
    cycles: int = 0
    least: int = 0

    @property
    def conflicts(self) -> int:
        """Cycles that would not be with other addresses."""
        return self.cycles - self.least

    def __add__(self, other: BankCycles) -> BankCycles:
        return BankCycles(
            self.requests + other.requests,
            self.cycles + other.cycles,
            self.least + other.least,
        )


def _warps(
    addresses: ArrayLike, width: int, active: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray]:
    """Addresses and masks as (warps, 32), checked."""
    if width not in WIDTHS:
        raise ValueError(f"width={width} must be one of {WIDTHS}")
    given = np.atleast_2d(np.asarray(addresses))
    if given.ndim != 2 or not 1 <= given.shape[1] <= LANES:
        raise ValueError(
            f"addresses of shape {np.shape(addresses)} must be (lanes,) or"
            f" (warps, lanes), with 1 to {LANES} lanes"
        )
    if not np.issubdtype(given.dtype, np.integer):
        raise ValueError(f"addresses are {given.dtype}: they must be whole bytes")
    mask = np.ones(given.shape, bool)
    if active is not None:
        mask = np.atleast_2d(np.asarray(active))
        if mask.shape != given.shape or mask.dtype != bool:
            raise ValueError(
                f"active is {mask.dtype} of shape {mask.shape}: it must be bool, of"
                f" shape {given.shape}"
            )
    for name, wrong in (
        ("is negative", given < 0),
        (f"is not a multiple of width={width}", given % width != 0),
    ):
        if (wrong & mask).any():
            raise ValueError(f"address {given[wrong & mask][0]} {name}")
    short = LANES - given.shape[1]
    pad = ((0, 0), (0, short))
    return np.pad(given.astype(np.int64), pad), np.pad(mask, pad)


def _firsts(values: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row sorted, and where a value stands there for the first time."""
    ordered = np.sort(np.where(mask, values, -1), axis=1)
    first = np.ones(ordered.shape, bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return ordered, first & (ordered >= 0)


def global_memory(
    addresses: ArrayLike, width: int = 4, active: ArrayLike | None = None
) -> Transactions:
    """Sectors and lines of one request of a warp, or of many, one per row.

    >>> global_memory([4 * lane for lane in range(32)]).sectors
    4

    Raises:
        ValueError: an address is negative, or no multiple of the width; no such width;
            more than 32 lanes; a mask of another shape.
    """
    bytes_, mask = _warps(addresses, width, active)
    distinct = [int(_firsts(bytes_ // size, mask)[1].sum()) for size in (SECTOR, LINE)]
    asked = width * int(_firsts(bytes_, mask)[1].sum())
    return Transactions(int(mask.any(1).sum()), *distinct, asked)


def shared_memory(
    addresses: ArrayLike, width: int = 4, active: ArrayLike | None = None
) -> BankCycles:
    """Cycles of the banks for one request of a warp, or for many, one per row.

    >>> shared_memory([2 * 4 * lane for lane in range(32)]).cycles
    2

    Raises:
        ValueError: as of `global_memory`.
    """
    bytes_, mask = _warps(addresses, width, active)
    words_each = max(1, width // WORD)
    lanes = LANES // words_each  # of a phase
    words = bytes_[..., None] // WORD + np.arange(words_each)
    # (warps, 32, words) → (warps · phases, lanes · words)
    words = words.reshape(-1, lanes * words_each)
    asked = np.repeat(mask, words_each, axis=1).reshape(words.shape)
    ordered, first = _firsts(words, asked)
    row, _ = np.nonzero(first)
    per_bank = np.zeros((len(words), BANKS), np.int64)
    np.add.at(per_bank, (row, ordered[first] % BANKS), 1)
    cycles = per_bank.max(1)
    return BankCycles(
        int(mask.any(1).sum()), int(cycles.sum()), int((cycles > 0).sum())
    )


def swizzle(address: ArrayLike, span: int = 128) -> np.ndarray:
    """Where TMA puts the byte at `address` of a tile in shared memory.

    Pieces of 16 bytes change places within a row of 128 bytes; which, depends on the
    row (PTX ISA, 5.5.7): ⌊a / 16⌋ ⊕ (⌊a / 128⌋ mod span / 16).

    Raises:
        ValueError: span is not 32, 64 or 128.
    """
    if span not in (32, 64, 128):
        raise ValueError(f"span={span} must be 32, 64 or 128 bytes")
    a = np.asarray(address)
    return a ^ (a // 128 % (span // 16) * 16)
