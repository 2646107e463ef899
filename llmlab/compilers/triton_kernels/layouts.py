"""Which thread holds which number of a block: layouts as matrices over GF(2).

A block of 64 × 64 numbers lies in the registers of 128 threads. Triton describes it by
a linear layout (Zhou et al. 2025): number the registers of a thread, the lanes of a
warp and the warps, in binary. Each *bit* moves the element by a fixed step, its basis,
and the steps of all bits that are 1 are added without carry:

    (row, col) = ⊕ { basis of bit : bit of (register, lane, warp) is 1 }

    basis (0, 0)     the bit changes nothing: both threads hold the same element
    matrix           one column per bit, one row per bit of row and col; M over GF(2)
    owners           all solutions x of M x = e

`parse` reads the layouts that TTGIR prints; `linear` gives the bases of the blocked
layout and of the layouts of the tensor cores' results.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

Basis = tuple[int, ...]
PARTS = ("register", "lane", "warp")


@dataclass(frozen=True)
class Linear:
    """A linear layout of a block of `shape`: bases of registers, lanes and warps."""

    shape: tuple[int, ...]
    register: tuple[Basis, ...]
    lane: tuple[Basis, ...]
    warp: tuple[Basis, ...]

    def element(self, register: int, lane: int, warp: int) -> Basis:
        """The element in a register of a thread.

        Raises:
            ValueError: there is no such register, lane or warp.
        """
        place = [0] * len(self.shape)
        for part, index in zip(PARTS, (register, lane, warp), strict=True):
            bases = getattr(self, part)
            if not 0 <= index < 1 << len(bases):
                raise ValueError(
                    f"{part}={index} must be from 0 to {(1 << len(bases)) - 1}"
                )
            for bit, basis in enumerate(bases):
                if index >> bit & 1:
                    place = [a ^ b for a, b in zip(place, basis, strict=True)]
        return tuple(place)

    @property
    def bits(self) -> list[tuple[str, int]]:
        """The columns of the matrix: part and bit."""
        return [(p, i) for p in PARTS for i in range(len(getattr(self, p)))]

    def matrix(self) -> Int[Tensor, "out into"]:
        """M over GF(2): bits of the element from bits of register, lane, warp.

        Rows: the bits of the last dimension from the lowest, then the one before.
        """
        columns = [self._bits_of(getattr(self, part)[i]) for part, i in self.bits]
        rows = len(self._bits_of(self.shape))
        return torch.tensor(columns, dtype=torch.int8).reshape(len(columns), rows).T

    def owners(self, element: Sequence[int]) -> list[tuple[int, int, int]]:
        """(register, lane, warp) of every place that holds the element.

        One place solves M x = e; the others differ from it by what M maps to 0.

        Raises:
            ValueError: the element is not in the block, or nobody holds it.
        """
        inside = all(0 <= i < n for i, n in zip(element, self.shape, strict=True))
        if not inside:
            raise ValueError(f"element {tuple(element)} is not in a block {self.shape}")
        wanted = torch.tensor(self._bits_of(element), dtype=torch.int8)
        found = solve(self.matrix(), wanted)
        if found is None:
            raise ValueError(f"nobody holds element {tuple(element)}")
        first, free = found
        places = []
        for chosen in itertools.product((0, 1), repeat=len(free)):
            x = first.clone()
            for take, vector in zip(chosen, free, strict=True):
                if take:
                    x = x ^ vector
            places.append(self._place(x))
        return sorted(places, key=lambda place: place[::-1])

    def _bits_of(self, element: Sequence[int]) -> list[int]:
        """An element, or a step, in binary: in the order of the matrix's rows."""
        return [
            element[dim] >> bit & 1
            for dim in reversed(range(len(self.shape)))
            for bit in range(self.shape[dim].bit_length() - 1)
        ]

    def _place(self, x: Tensor) -> tuple[int, int, int]:
        index = dict.fromkeys(PARTS, 0)
        for (part, bit), value in zip(self.bits, x.tolist(), strict=True):
            index[part] |= value << bit
        return index["register"], index["lane"], index["warp"]


def solve(
    matrix: Int[Tensor, "out into"], wanted: Int[Tensor, "out"]
) -> tuple[Tensor, list[Tensor]] | None:
    """Gauss's elimination over GF(2): x with M x = e, and a basis of M x = 0.

    None where there is no solution. Addition is "exclusive or".
    """
    rows = torch.cat([matrix, wanted[:, None]], dim=1).clone()
    pivots: list[int] = []
    for column in range(matrix.shape[1]):
        top = len(pivots)
        ones = rows[top:, column].nonzero()
        if not len(ones):
            continue
        other = top + int(ones[0])
        rows[[top, other]] = rows[[other, top]]
        for row in range(len(rows)):
            if row != top and rows[row, column]:
                rows[row] ^= rows[top]
        pivots.append(column)
    if rows[len(pivots) :, -1].any():
        return None
    first = torch.zeros(matrix.shape[1], dtype=matrix.dtype)
    first[pivots] = rows[: len(pivots), -1]
    free = []
    for column in sorted(set(range(matrix.shape[1])) - set(pivots)):
        vector = torch.zeros_like(first)
        vector[column] = 1
        vector[pivots] = rows[: len(pivots), column]
        free.append(vector)
    return first, free


# what TTGIR prints --------------------------------------------------------------------


@dataclass(frozen=True)
class Blocked:
    """#ttg.blocked: each thread holds a small block, threads and warps stand beside.

    `order` names the dimensions, the fastest first.
    """

    size_per_thread: tuple[int, ...]
    threads_per_warp: tuple[int, ...]
    warps: tuple[int, ...]
    order: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.size_per_thread))):
            raise ValueError(f"order={self.order} must name each dimension once")
        for name in ("size_per_thread", "threads_per_warp", "warps"):
            sizes = getattr(self, name)
            if any(n < 1 or n & (n - 1) for n in sizes):
                raise ValueError(f"{name}={sizes} must be powers of 2")


@dataclass(frozen=True)
class TensorCore:
    """A result of mma.sync (version 2), wgmma (3) or a transposed mfma ("mfma")."""

    version: int | str
    warps: tuple[int, int]
    instruction: tuple[int, ...]


def parse(text: str) -> Blocked | TensorCore | Linear | None:
    """A layout as TTGIR prints it; None for a kind that is not known here.

    A #ttg.linear has no shape of its own: it gets the smallest that holds its bases.
    """
    numbers = {
        name: tuple(int(n) for n in re.findall(r"\d+", values))
        for name, values in re.findall(r"(\w+) = \[([\d, ]*)\]", text)
    }
    if text.startswith("#ttg.blocked"):
        return Blocked(
            numbers["sizePerThread"],
            numbers["threadsPerWarp"],
            numbers["warpsPerCTA"],
            numbers["order"],
        )
    if text.startswith("#ttg.nvidia_mma"):
        version = int(re.search(r"versionMajor = (\d+)", text)[1])
        return TensorCore(version, numbers["warpsPerCTA"], numbers["instrShape"])
    if text.startswith("#ttg.amd_mfma") and "isTransposed = true" in text:
        return TensorCore("mfma", numbers["warpsPerCTA"], numbers["instrShape"])
    if text.startswith("#ttg.linear"):
        return parse_linear(text)
    return None


def parse_linear(text: str) -> Linear:
    """#ttg.linear<{register = [[0, 1], …], lane = …, warp = …, block = []}>."""
    bases = {}
    for part in PARTS:
        listed = re.search(rf"{part} = (\[(?:\[[\d, ]*\](?:, )?)*\])", text)[1]
        found = re.findall(r"\[([\d, ]+)\]", listed)
        bases[part] = tuple(tuple(map(int, f.split(", "))) for f in found)
    together = [basis for part in bases.values() for basis in part]
    largest = [max(column) for column in zip(*together, strict=True)]
    return Linear(tuple(1 << n.bit_length() for n in largest), **bases)


def linear(layout: Blocked | TensorCore, shape: Sequence[int]) -> Linear:
    """The bases of a layout that covers a block of `shape`.

    Where the layout is smaller than the block, threads get more registers; where it is
    larger, several threads hold the same elements.

    Raises:
        ValueError: another number of dimensions, or sizes that are no powers of 2.
    """
    shape = tuple(shape)
    if any(n < 1 or n & (n - 1) for n in shape):
        raise ValueError(f"shape={shape} must be powers of 2")
    if isinstance(layout, TensorCore):
        tile, order = tensor_core_tile(layout)
    else:
        tile = [
            ("register", layout.size_per_thread, layout.order),
            ("lane", layout.threads_per_warp, layout.order),
            ("warp", layout.warps, layout.order),
        ]
        order = layout.order
    if len(order) != len(shape):
        raise ValueError(f"shape={shape} must have {len(order)} dimensions")
    bases: dict[str, list[Basis]] = {part: [] for part in PARTS}
    covered = [1] * len(shape)
    for part, sizes, its_order in tile:
        for dim in its_order:
            for _ in range(sizes[dim].bit_length() - 1):
                bases[part].append(step(len(shape), dim, covered[dim]))
                covered[dim] *= 2
    # what lies outside of the block is held again by others
    inside = {
        part: [b if all(map(int.__lt__, b, shape)) else (0,) * len(shape) for b in each]
        for part, each in bases.items()
    }
    for dim in order:
        while covered[dim] < shape[dim]:
            inside["register"].append(step(len(shape), dim, covered[dim]))
            covered[dim] *= 2
    return Linear(shape, **{part: tuple(each) for part, each in inside.items()})


def step(dims: int, dim: int, size: int) -> Basis:
    """The basis that moves by `size` along one dimension."""
    return tuple(size if i == dim else 0 for i in range(dims))


def tensor_core_tile(layout: TensorCore) -> tuple[list[tuple], tuple[int, int]]:
    """Steps that build a tensor core's result, from the smallest to the warps.

    Of m16n8 each group of four lanes holds a row, two numbers a lane; the second pair
    of a lane stands eight rows lower. wgmma repeats that to the right. mfma (32 × 32)
    gives a lane four numbers side by side, and half of a wave the next four.
    """
    columns = (1, 0)
    if layout.version == "mfma":
        rows = layout.instruction[0]
        lanes_right = 64 // rows
        groups = layout.instruction[1] // (4 * lanes_right)
        return [
            ("register", (1, 4), columns),
            ("lane", (rows, 1), columns),
            ("lane", (1, lanes_right), columns),
            ("register", (1, groups), columns),
            ("warp", layout.warps, columns),
        ], columns
    right = layout.instruction[1] // 8
    # the warps of wgmma stand below each other first
    order = (0, 1) if layout.version == 3 else columns
    return [
        ("register", (1, 2), columns),
        ("lane", (8, 4), columns),
        ("register", (2, 1), columns),
        ("register", (1, right), columns),
        ("warp", layout.warps, order),
    ], columns
