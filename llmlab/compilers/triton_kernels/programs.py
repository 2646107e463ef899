"""A small interpreter of block programs: it counts, and refuses what a GPU would not.

A kernel is written once and runs as many programs as its grid has places. A program
works on blocks: it computes addresses, loads a block, computes with it, stores a block.

    launch(kernel, grid, x, y, n, BLOCK=64)   runs all programs, and reports

A tensor becomes a `Pointer` to its first number; a pointer plus a block of offsets is a
block of pointers. The kernel's name `tl` is bound to a `Language` that knows which
program is running, so the very functions that Triton compiles run here unchanged.

A GPU runs the programs in no order, says nothing about an address that is not yours,
and leaves what a mask switches off undefined. So here

    an address outside of the tensor         is an `OutOfRange`, by the tensor's name
    two programs at one place, one stores    is a `Race`
    a number that a mask switched off        is NaN, unless `other` says what it is

Simplified: whole numbers outside of blocks are Python's (// rounds down, where Triton
cuts off; the same from 0 on), and blocks compute in torch's arithmetic.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

SECTOR = 32  # bytes that memory delivers at least, NVIDIA's unit
NOBODY, SEVERAL = -1, -2


class OutOfRange(IndexError):
    """A program reads or stores outside of a tensor."""


class Race(RuntimeError):
    """What comes out depends on the order of the programs, and they have none."""


class Buffer:
    """A tensor's memory, with who touched which place."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name = name
        numbers = tensor.untyped_storage().nbytes() // tensor.itemsize
        size = numbers - tensor.storage_offset()
        self.data = tensor.as_strided((size,), (1,))
        # of a view with gaps, only the view's own places
        self.own = torch.zeros(size, dtype=torch.bool)
        self.own.as_strided(tensor.shape, tensor.stride()).fill_(True)
        self.count = tensor.numel()
        self.writer = torch.full((size,), NOBODY, dtype=torch.int32)
        self.reader = torch.full((size,), NOBODY, dtype=torch.int32)


@dataclass(frozen=True)
class Pointer:
    """A place in a buffer, or a block of places."""

    buffer: Buffer
    offsets: Tensor | int = 0

    def __add__(self, more: Tensor | int) -> Pointer:
        return Pointer(self.buffer, self.offsets + more)

    __radd__ = __add__

    def __sub__(self, less: Tensor | int) -> Pointer:
        return self + -less

    @property
    def dtype(self) -> PointerType:
        return PointerType(self.buffer.data.dtype)


@dataclass(frozen=True)
class PointerType:
    """What Triton calls the type of a pointer; `element_ty` is that of its numbers."""

    element_ty: torch.dtype


@dataclass
class Report:
    """What a launch did.

    Attributes:
        loaded, stored: name of a tensor → bytes that loads and stores moved.
        calls: how often each operation ran.
        flops: in `tl.dot`.
        sectors: program → name → the sectors of 32 bytes that it loaded.
        written: name → which places were stored to.
    """

    programs: int = 0
    loaded: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    flops: int = 0
    sectors: list[dict[str, set[int]]] = field(default_factory=list)
    written: dict[str, Tensor] = field(default_factory=dict)

    def wave_bytes(self, wave: int) -> int:
        """Bytes that come from memory if `wave` programs run at a time.

        Programs of one wave find in the cache what another of them has loaded; the
        next wave begins with an empty one.
        """
        total = 0
        for first in range(0, self.programs, wave):
            touched: dict[str, set[int]] = {}
            for program in self.sectors[first : first + wave]:
                for name, sectors in program.items():
                    touched.setdefault(name, set()).update(sectors)
            total += SECTOR * sum(map(len, touched.values()))
        return total


def launch(kernel: Callable, grid: Sequence[int], *args: Any, **named: Any) -> Report:
    """Runs `kernel` once for each place of the grid, the first axis fastest.

    Args:
        kernel: a Python function, or one under @triton.jit.
        grid: programs along each of up to three axes.
        args, named: its arguments; tensors are handed on as pointers.
    Raises:
        ValueError: the grid is empty, or has more than three axes.
        TypeError: the arguments do not fit the kernel.
        OutOfRange, Race: see there.
    """
    if not 1 <= len(grid) <= 3 or min(grid) < 1:
        raise ValueError(f"grid={tuple(grid)} must have 1 to 3 axes, each 1 at least")
    function = python_of(kernel)
    given = inspect.signature(function).bind(*args, **named)
    given.apply_defaults()
    buffers = {}
    for name, value in given.arguments.items():
        if isinstance(value, Tensor):
            buffers[name] = Buffer(name.removesuffix("_ptr"), value)
            given.arguments[name] = Pointer(buffers[name])
    language = Language(tuple(grid), function.__code__)
    bound = rebound(function, language)
    places = itertools.product(*(range(n) for n in reversed(grid)))
    for number, place in enumerate(places):
        language.begin(number, place[::-1])
        bound(*given.args, **given.kwargs)
    report = language.report
    for buffer in buffers.values():
        report.written[buffer.name] = buffer.writer != NOBODY
    return report


def python_of(kernel: Callable) -> FunctionType:
    """The Python function under @triton.jit and other wrappers.

    Raises:
        TypeError: there is none.
    """
    kernel = inspect.unwrap(getattr(kernel, "fn", kernel))
    if not isinstance(kernel, FunctionType):
        raise TypeError(f"a kernel is a function, not a {type(kernel).__name__}")
    return kernel


def rebound(function: FunctionType, language: Language) -> FunctionType:
    """The same function, whose `tl` is `language`; so are functions that it calls."""
    names = dict(function.__globals__, tl=language)
    for name in function.__code__.co_names:
        other = names.get(name)
        inner = inspect.unwrap(getattr(other, "fn", other))
        own = isinstance(inner, FunctionType) and inner is not function
        if own and "tl" in inner.__code__.co_names:
            names[name] = rebound(inner, language)
    return FunctionType(
        function.__code__,
        names,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


class Language:
    """What a kernel calls `tl`: Triton's names, for the program that is running.

    The one that modules import is not bound to a launch: it has the names only.
    """

    constexpr = int
    float16, bfloat16, float32 = torch.float16, torch.bfloat16, torch.float32
    int32, int64 = torch.int32, torch.int64
    range = static_range = range

    def __init__(
        self, grid: tuple[int, ...] = (), code: CodeType | None = None
    ) -> None:
        self.grid = grid
        self.code = code
        self.report = Report()
        self.number = 0
        self.place: tuple[int, ...] = ()

    def begin(self, number: int, place: tuple[int, ...]) -> None:
        """The next program."""
        self.number = number
        self.place = place
        self.report.programs += 1
        self.report.sectors.append({})

    def used(self, name: str) -> None:
        """Counts an operation.

        Raises:
            RuntimeError: no program is running.
        """
        if not self.grid:
            raise RuntimeError(
                f"tl.{name} belongs into a kernel: launch(kernel, grid, …) runs it"
            )
        self.report.calls[name] += 1

    # where a program is

    def program_id(self, axis: int) -> int:
        self.used("program_id")
        return (*self.place, 0, 0)[axis]

    def num_programs(self, axis: int) -> int:
        self.used("num_programs")
        return (*self.grid, 1, 1)[axis]

    # blocks

    def arange(self, start: int, end: int) -> Tensor:
        self.used("arange")
        self.check_size("tl.arange", end - start)
        return torch.arange(start, end)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self.full(shape, 0, dtype)

    def full(self, shape: Sequence[int], value: float, dtype: torch.dtype) -> Tensor:
        self.used("full")
        for size in shape:
            self.check_size("a block", size)
        return torch.full(tuple(shape), value, dtype=dtype)

    def check_size(self, what: str, size: int) -> None:
        """Blocks have powers of 2 along each axis, so that threads can share them.

        Raises:
            ValueError: this one has not.
        """
        if size < 1 or size & (size - 1):
            raise ValueError(f"{what} of {size}: the size must be a power of 2")

    # memory

    def load(self, pointer: Pointer, mask: Any = None, other: Any = None) -> Tensor:
        self.used("load")
        places, on = self.places("load", pointer, mask)
        buffer = pointer.buffer
        wanted = places[on]
        self.check_range("reads", buffer, wanted)
        self.check_race("reads", buffer, wanted, buffer.writer[wanted], "stores")
        readers = buffer.reader[wanted]
        first = (readers == NOBODY) | (readers == self.number)
        buffer.reader[wanted] = torch.where(first, self.number, SEVERAL).int()
        item = buffer.data.itemsize
        self.report.loaded[buffer.name] += item * wanted.numel()
        sectors = (wanted * item // SECTOR).unique().tolist()
        self.report.sectors[-1].setdefault(buffer.name, set()).update(sectors)
        if other is None:
            other = math.nan if buffer.data.is_floating_point() else 0
        block = torch.full(places.shape, 0, dtype=buffer.data.dtype)
        block = block + torch.as_tensor(other).to(block.dtype)
        block[on] = buffer.data[wanted]
        return block

    def store(self, pointer: Pointer, value: Any, mask: Any = None) -> None:
        self.used("store")
        places, on = self.places("store", pointer, mask)
        buffer = pointer.buffer
        wanted = places[on]
        self.check_range("stores", buffer, wanted)
        self.check_race("stores", buffer, wanted, buffer.writer[wanted], "stores")
        self.check_race("stores", buffer, wanted, buffer.reader[wanted], "reads")
        if wanted.unique().numel() < wanted.numel():
            raise Race(
                f"program {self.shown(self.number)} stores several numbers to one place"
                f" of {buffer.name} at once{self.line()}"
            )
        buffer.writer[wanted] = self.number
        self.report.stored[buffer.name] += buffer.data.itemsize * wanted.numel()
        value = torch.as_tensor(value).to(buffer.data.dtype)
        buffer.data[wanted] = value.broadcast_to(places.shape)[on]

    def places(self, what: str, pointer: Pointer, mask: Any) -> tuple[Tensor, Tensor]:
        """Offsets, and which of them the mask leaves on.

        Raises:
            TypeError: no pointer.
            ValueError: the mask is no block of the same shape.
        """
        if not isinstance(pointer, Pointer):
            raise TypeError(
                f"tl.{what} takes a pointer plus offsets, not a"
                f" {type(pointer).__name__}"
            )
        offsets = torch.as_tensor(pointer.offsets)
        on = torch.as_tensor(True if mask is None else mask)
        try:
            return offsets, on.broadcast_to(offsets.shape)
        except RuntimeError:
            raise ValueError(
                f"tl.{what}: a mask {tuple(on.shape)} for addresses"
                f" {tuple(offsets.shape)}: it must have their shape"
            ) from None

    def check_range(self, does: str, buffer: Buffer, wanted: Tensor) -> None:
        """
        Raises:
            OutOfRange: a place is not the tensor's.
        """
        outside = (wanted < 0) | (wanted >= len(buffer.own))
        if outside.any():
            last = int(buffer.own.nonzero()[-1])
            with_gaps = last >= buffer.count
            end = f", the last at {buffer.name}[{last}]" if with_gaps else ""
            raise OutOfRange(
                f"program {self.shown(self.number)} {does}"
                f" {buffer.name}[{wanted[outside][0]}], and {buffer.name} has"
                f" {buffer.count} numbers{end}{self.line()}"
            )
        gap = ~buffer.own[wanted]
        if gap.any():
            raise OutOfRange(
                f"program {self.shown(self.number)} {does}"
                f" {buffer.name}[{wanted[gap][0]}], which lies between the rows of"
                f" {buffer.name}{self.line()}"
            )

    def check_race(
        self, does: str, buffer: Buffer, wanted: Tensor, others: Tensor, they: str
    ) -> None:
        """
        Args:
            others: who touched each of the places.
            they: what those programs do there.
        Raises:
            Race: one of them is not this program.
        """
        foreign = (others != NOBODY) & (others != self.number)
        if foreign.any():
            place, other = wanted[foreign][0], others[foreign][0]
            several = other == SEVERAL
            who = "another program" if several else f"program {self.shown(other)}"
            raise Race(
                f"program {self.shown(self.number)} {does} {buffer.name}[{place}],"
                f" which {who} {they}, too: programs run in no order{self.line()}"
            )

    def shown(self, number: Any) -> str:
        """A program by its place in the grid."""
        place = []
        number = int(number)
        for n in self.grid:
            place.append(number % n)
            number //= n
        return str(place[0]) if len(place) == 1 else f"({', '.join(map(str, place))})"

    def line(self) -> str:
        """The line of the kernel that is running, for a message."""
        frame = sys._getframe()
        while frame is not None and frame.f_code is not self.code:
            frame = frame.f_back
        if frame is None:
            return ""
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        return f" (line: {text})" if text else ""

    # arithmetic

    def dot(
        self,
        a: Tensor,
        b: Tensor,
        acc: Tensor | None = None,
        input_precision: str | None = None,
    ) -> Tensor:
        self.used("dot")
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise ValueError(
                f"tl.dot of {tuple(a.shape)} and {tuple(b.shape)}: (m, k) and (k, n)"
            )
        self.report.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        product = a.float() @ b.float()
        return product if acc is None else acc + product

    def max(self, x: Tensor, axis: int | None = None, keep_dims: bool = False):
        self.used("max")
        return x.max() if axis is None else x.amax(axis, keepdim=keep_dims)

    def sum(self, x: Tensor, axis: int | None = None, keep_dims: bool = False):
        self.used("sum")
        return x.sum() if axis is None else x.sum(axis, keepdim=keep_dims)

    def where(self, condition: Any, x: Any, y: Any) -> Tensor:
        self.used("where")
        return torch.where(torch.as_tensor(condition), x, y)

    def maximum(self, x: Any, y: Any) -> Any:
        self.used("maximum")
        if isinstance(x, int) and isinstance(y, int):
            return max(x, y)
        return torch.maximum(torch.as_tensor(x), torch.as_tensor(y))

    def minimum(self, x: Any, y: Any) -> Any:
        self.used("minimum")
        if isinstance(x, int) and isinstance(y, int):
            return min(x, y)
        return torch.minimum(torch.as_tensor(x), torch.as_tensor(y))

    def cdiv(self, x: int, y: int) -> int:
        self.used("cdiv")
        return -(-x // y)

    def exp(self, x: Tensor) -> Tensor:
        self.used("exp")
        return torch.exp(x)

    def log(self, x: Tensor) -> Tensor:
        self.used("log")
        return torch.log(x)

    def abs(self, x: Tensor) -> Tensor:
        self.used("abs")
        return x.abs()

    def trans(self, x: Tensor) -> Tensor:
        self.used("trans")
        return x.T


tl = Language()
