"""JAX's interpreter of a TPU, and what it saw of a kernel.

    settings   how to interpret: when copies are carried out, and that races are sought
    watch      runs a kernel: its result and a report
    Report     each access in plain words, the copies, and the races

The interpreter keeps a vector clock for the core and for each copy. Two accesses to the
same place, of which one writes, *race* if neither clock is at or below the other one
everywhere: then nothing says which comes first, whatever the numbers were this time.

Its records are private to JAX; `_recorded` alone reads them, and `_accesses` puts names
to their numbers.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import linecache
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

CHIPS = 8
"""CPU devices that JAX is started with: chips that a ring may have."""
FIRST = 100
"""The interpreter's first number for a buffer, and for a copy."""
BYTES = 4
MODES = ("on_wait", "eager")


@dataclass(frozen=True)
class Access:
    """One read or write that the interpreter recorded.

    place holds (start, stop) of each axis; by is "chip 0" or "copy 3 of chip 0"; line
    is the kernel's line, or "pallas_call" where the pipeline did it.
    """

    kind: str
    buffer: str
    chip: int
    place: tuple[tuple[int, int], ...]
    by: str
    line: str
    clock: np.ndarray = field(compare=False, repr=False)

    @property
    def elements(self) -> int:
        return math.prod(stop - start for start, stop in self.place)

    def __str__(self) -> str:
        return f"{self.kind} of {self.buffer} by {self.by} in `{self.line}`"


@dataclass(frozen=True)
class Copy:
    """A copy that was carried out; number counts those that its chip has started."""

    number: int
    source: str
    source_chip: int
    target: str
    target_chip: int
    place: tuple[tuple[int, int], ...]
    bytes: int


@dataclass(frozen=True)
class Report:
    """What the interpreter saw of one kernel.

    left_over is whether a semaphore was not back at zero at the end.
    """

    accesses: tuple[Access, ...]
    left_over: bool

    @cached_property
    def races(self) -> tuple[tuple[Access, Access], ...]:
        """Pairs that nothing orders; of pairs of the same two lines the first one."""
        found = {}
        for _, group in itertools.groupby(self.accesses, _memory):
            for a, b in itertools.combinations(group, 2):
                if "write" in (a.kind, b.kind) and _touch(a, b) and unordered(a, b):
                    lines = frozenset((x.kind, x.buffer, x.line) for x in (a, b))
                    found.setdefault(lines, (a, b))
        return tuple(found.values())

    def loaded(self, buffer: str) -> int:
        """Blocks that the pipeline loaded from a buffer in HBM."""
        return self._moved("read", buffer)

    def stored(self, buffer: str) -> int:
        """Blocks that the pipeline stored to a buffer in HBM."""
        return self._moved("write", buffer)

    def _moved(self, kind: str, buffer: str) -> int:
        asked = (kind, buffer, "pallas_call")
        return sum((a.kind, a.buffer, a.line) == asked for a in self.accesses)

    @property
    def copies(self) -> tuple[Copy, ...]:
        """Copies by the kernel that were carried out, chip by chip."""
        sides: dict[str, dict[str, Access]] = {}
        for access in self.accesses:
            if access.by.startswith("copy"):
                sides.setdefault(access.by, {})[access.kind] = access
        copies = []
        for name, side in sides.items():
            if len(side) == 2:
                read = side["read"]
                write = side["write"]
                copy = Copy(
                    number=int(name.split()[1]),
                    source=read.buffer,
                    source_chip=read.chip,
                    target=write.buffer,
                    target_chip=write.chip,
                    place=write.place,
                    bytes=BYTES * write.elements,
                )
                copies.append(copy)
        return tuple(sorted(copies, key=lambda c: (c.source_chip, c.number)))

    @property
    def sent(self) -> tuple[Copy, ...]:
        """The copies that went from one chip to another one."""
        return tuple(c for c in self.copies if c.source_chip != c.target_chip)


def _memory(access: Access) -> tuple[str, int]:
    """Which memory an access is to: a buffer of a chip."""
    return access.buffer, access.chip


def _touch(a: Access, b: Access) -> bool:
    """Whether two accesses to one memory have a place in common."""
    return all(
        start < other_stop and other_start < stop
        for (start, stop), (other_start, other_stop) in zip(
            a.place, b.place, strict=True
        )
    )


def unordered(a: Access, b: Access) -> bool:
    """Neither clock is at or below the other one everywhere: both may be at once."""
    return bool((a.clock > b.clock).any() and (a.clock < b.clock).any())


# ---------------------------------------------------------------- the interpreter


def start_jax() -> Any:
    """JAX with enough CPU devices for a ring, if it is not running already."""
    import jax

    # too late if JAX runs already; the ring then says so
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", CHIPS)
    return jax


def settings(dma: str = "on_wait") -> Any:
    """How to interpret a kernel: `pallas_call(..., interpret=settings())`.

    dma says when a copy is carried out: "eager" at its start, "on_wait" when somebody
    waits for it, so never if nobody does. A right kernel cannot tell them apart. Clocks
    have 1024 places, so that hardly any two copies share one; by JAX's default all
    copies on one chip share one, and those that race with each other go unseen.

    Raises:
        ValueError: dma is neither of the two.
    """
    if dma not in MODES:
        raise ValueError(f"dma={dma!r} must be one of {MODES}")
    start_jax()
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams(
        detect_races=True, dma_execution_mode=dma, vector_clock_size=1024
    )


def _recorded() -> tuple[dict, dict]:
    """The interpreter's records of reads and writes: private, read here alone.

    Raises:
        RuntimeError: they are not where they were in JAX 0.10.
    """
    import jax

    try:
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call

        races = interpret_pallas_call.races
        return dict(races.reads), dict(races.writes)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"JAX {jax.__version__} keeps the races that its TPU interpreter finds "
            "elsewhere than 0.10 did (jax._src.pallas.mosaic.interpret"
            f".interpret_pallas_call.races): {error}"
        ) from error


def _line(frame: str) -> str:
    """The text of the line that a frame such as "kernel.py:12:8 (name)" points to."""
    found = re.fullmatch(r"(.+?):(\d+)(?::\d+)? \(.*\)", frame)
    if not found:
        return frame
    text = linecache.getline(found[1], int(found[2])).strip()
    return text or f"line {found[2]}"


def _names(reads: dict) -> dict[int, str]:
    """The interpreter's number of each copy: whose copy it is, and which of them."""
    chips = {
        int(entry[0]): int(chip)
        for (_, _, chip, _), entries in reads.items()
        for entry in entries
        if entry[0] >= FIRST
    }
    if len(set(chips.values())) == 1:
        # copies that were never carried out count, too
        return {number: f"copy {number - FIRST} of chip 0" for number in chips}
    counts = dict.fromkeys(chips.values(), 0)
    names = {}
    for number in sorted(chips):
        chip = chips[number]
        names[number] = f"copy {counts[chip]} of chip {chip}"
        counts[chip] += 1
    return names


def _accesses(
    reads: dict, writes: dict, buffers: Sequence[tuple[str, tuple[int, ...]]]
) -> tuple[Access, ...]:
    """The records in plain words; they name buffers and copies by numbers."""
    names = _names(reads)
    found = []
    for kind, records in (("read", reads), ("write", writes)):
        for (_, number, chip, _), entries in records.items():
            name, shape = buffers[int(number) - FIRST]
            for actor, _, clock, ranges, frame in entries:
                place = [
                    (r.start, r.stop) if isinstance(r, slice) else (r, r + 1)
                    for r in ranges
                ]
                place += [(0, size) for size in shape[len(place) :]]
                by = names.get(int(actor), f"chip {actor}")
                line = _line(frame)
                access = Access(kind, name, int(chip), tuple(place), by, line, clock)
                found.append(access)
    # those of one actor stay in the order of its program
    return tuple(sorted(found, key=lambda a: (*_memory(a), a.kind, a.by)))


def watch(
    call: Callable, *arrays: Any, buffers: Sequence[tuple[str, tuple[int, ...]]]
) -> tuple[np.ndarray, Report]:
    """A kernel's result and what the interpreter saw.

    Args:
        call: what `pallas_call(..., interpret=settings())` gave.
        arrays: its arguments.
        buffers: name and shape of each buffer as the interpreter numbers them: inputs
            and outputs in HBM, then each argument of the kernel that lies elsewhere.

    Raises:
        RuntimeError: JAX keeps its records elsewhere.
    """
    from jax.experimental.pallas import tpu as pltpu

    # the interpreter draws from NumPy's own stream of random numbers, and prints
    stream = np.random.get_state()
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            value = np.asarray(call(*arrays))
    except Exception:
        pltpu.reset_tpu_interpret_mode_state()
        raise
    finally:
        np.random.set_state(stream)
    reads, writes = _recorded()
    left_over = "has non-zero count" in said.getvalue()
    return value, Report(_accesses(reads, writes, buffers), left_over)
