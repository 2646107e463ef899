"""Where the energy goes: so much per operation, so much per byte from each memory.

Horowitz 2014, https://doi.org/10.1109/ISSCC.2014.6757323; brought to 7 nm by Jouppi et
al. 2021, https://doi.org/10.1109/ISCA52012.2021.00010; measured on an A100 by Antepara
et al. 2025, https://escholarship.org/uc/item/6189368s.

    E  =  MACs · e  +  Σ bytes · e_level  +  P₀ t

    MACs      products, each with its sum       P₀  watts that are drawn in any case
    e         joules per MAC in a format        t   seconds
    e_level   joules per byte from a memory

The printed figures are lines in `data/energy.csv`:

    what    add, multiply, read
    where   a format, or a level of memory
    node    of the process, or the chip
    low     picojoules; `high` is empty where one number is printed
    per     operation, 64 bits, bit
    kind    circuit: the array or the adder alone, as designed
            device: the memory's chips alone
            measured: what a whole GPU took more

Simplified: a byte costs the same whatever is in it, and neither clock nor temperature
matters.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from llmlab.chips.checked import not_negative, positive

FILE = Path(__file__).parents[1] / "data" / "energy.csv"
PICO = 1e-12
# How many operations, or bytes, one printed figure is for.
PER = {"operation": 1.0, "64 bits": 8.0, "bit": 1 / 8}
KINDS = ("circuit", "device", "measured")
# A product and the sum that takes it up, which is wider.
SUMS = {"int8": "int32", "bf16": "fp32", "fp16": "fp32", "fp32": "fp32"}


@dataclass(frozen=True)
class Figure:
    """One printed number; picojoules per operation, or per byte."""

    what: str
    where: str
    node: str
    low_pj: float
    high_pj: float
    kind: str
    source: str
    note: str

    @property
    def pj(self) -> float:
        """The middle of a range."""
        return (self.low_pj + self.high_pj) / 2


@cache
def figures() -> tuple[Figure, ...]:
    """All printed numbers, in the order of the file.

    Raises:
        ValueError: a line with a kind that is none, or an energy that is not above 0.
    """
    with FILE.open(encoding="utf-8", newline="") as file:
        return tuple(_figure(line) for line in csv.DictReader(file))


def _figure(line: Mapping[str, str]) -> Figure:
    if line["kind"] not in KINDS:
        raise ValueError(f"kind={line['kind']!r} must be one of {', '.join(KINDS)}")
    if line["per"] not in PER:
        raise ValueError(f"per={line['per']!r} must be one of {', '.join(PER)}")
    low = float(line["low"])
    high = float(line["high"] or low)
    positive(low=low, high=high)
    return Figure(
        what=line["what"],
        where=line["where"],
        node=line["node"],
        low_pj=low / PER[line["per"]],
        high_pj=high / PER[line["per"]],
        kind=line["kind"],
        source=line["source"],
        note=line["note"],
    )


def printed(what: str, where: str, node: str) -> Figure:
    """The figure for that.

    Raises:
        ValueError: there is none.
    """
    for each in figures():
        if (each.what, each.where, each.node) == (what, where, node):
            return each
    known = sorted({each.where for each in figures() if each.node == node})
    raise ValueError(
        f"no energy to {what} {where} at {node}: there is {', '.join(known) or 'none'}"
    )


@dataclass(frozen=True)
class Costs:
    """What operations and bytes cost on one machine.

    Attributes:
        mac_pj: format → picojoules of a product and its sum.
        byte_pj: level → picojoules per byte, all the way to where it is used.
        static_watts: drawn in any case.

    Raises:
        ValueError: an energy that is not above 0, or a power below 0, by name.
    """

    name: str
    mac_pj: Mapping[str, float]
    byte_pj: Mapping[str, float]
    static_watts: float = 0.0
    sources: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        positive(**{f"mac_pj[{name!r}]": pj for name, pj in self.mac_pj.items()})
        positive(**{f"byte_pj[{name!r}]": pj for name, pj in self.byte_pj.items()})
        not_negative(static_watts=self.static_watts)


def macs_at(node: str) -> dict[str, float]:
    """Picojoules of a product and its sum, in the formats printed for a process."""
    known = {each.where for each in figures() if each.node == node}
    return {
        each: printed("multiply", each, node).pj + printed("add", wide, node).pj
        for each, wide in SUMS.items()
        if each in known
    }


def costs_45nm() -> Costs:
    """Horowitz's table, with the on-chip memory of 32 KiB."""
    levels = {"SRAM": "SRAM 32 KiB", "DRAM": "DRAM"}
    byte_pj = {name: printed("read", at, "45 nm").pj for name, at in levels.items()}
    source = ("horowitz2014computing",)
    return Costs("45 nm", macs_at("45 nm"), byte_pj, sources=source)


def costs_a100() -> Costs:
    """Arithmetic as designed at 7 nm, memory and constant power as measured.

    A byte from HBM also passes L2 and L1, and the measured figures are increments.
    """
    l1, l2, hbm = (printed("read", at, "A100").pj for at in ("L1", "L2", "HBM2"))
    return Costs(
        name="A100",
        mac_pj=macs_at("7 nm"),
        byte_pj={"L1": l1, "L2": l1 + l2, "HBM": l1 + l2 + hbm},
        static_watts=54.0,
        sources=("jouppi2021ten", "antepara2025benchmark"),
    )


def joules(
    costs: Costs,
    format: str,
    macs: float,
    moved_bytes: Mapping[str, float],
    seconds: float = 0.0,
) -> dict[str, float]:
    """Joules by part: arithmetic, each level of memory, and what is drawn in any case.

    Args:
        moved_bytes: level → bytes read from it or written to it.

    Raises:
        ValueError: a negative amount, or a format or level without a figure.
    """
    not_negative(macs=macs, seconds=seconds)
    not_negative(**{f"moved_bytes[{level!r}]": n for level, n in moved_bytes.items()})
    if format not in costs.mac_pj:
        known = ", ".join(costs.mac_pj)
        raise ValueError(f"format={format!r} has no figure for {costs.name}: {known}")
    parts = {"arithmetic": macs * costs.mac_pj[format] * PICO}
    for level, moved in moved_bytes.items():
        if level not in costs.byte_pj:
            known = ", ".join(costs.byte_pj)
            raise ValueError(f"level={level!r} has no figure for {costs.name}: {known}")
        parts[level] = moved * costs.byte_pj[level] * PICO
    parts["static"] = costs.static_watts * seconds
    return parts


def product_joules(
    m: int,
    k: int,
    n: int,
    *,
    number_bytes: float,
    tile: int,
    mac_pj: float,
    chip_pj_per_byte: float,
    memory_pj_per_byte: float,
) -> dict[str, float]:
    """Joules of x (m, k) times W (k, n), by part.

    The large memory is touched once: x and W read, the result written. The chip reads
    tiles: an operand that it fetches from its own memory is used `tile` times.

    Raises:
        ValueError: a size or an energy that is not above 0.
    """
    positive(m=m, k=k, n=n, number_bytes=number_bytes, tile=tile, mac_pj=mac_pj)
    not_negative(
        chip_pj_per_byte=chip_pj_per_byte, memory_pj_per_byte=memory_pj_per_byte
    )
    macs = m * k * n
    fetched = 2 * macs / tile * number_bytes
    moved = (m * k + k * n + m * n) * number_bytes
    return {
        "arithmetic": macs * mac_pj * PICO,
        "chip": fetched * chip_pj_per_byte * PICO,
        "memory": moved * memory_pj_per_byte * PICO,
    }


def floor_pj_per_flop(watts: float, flops_per_second: float) -> float:
    """Picojoules per FLOP of a chip at full power and full speed, all included."""
    positive(watts=watts, flops_per_second=flops_per_second)
    return watts / flops_per_second / PICO


# This machine ------------------------------------------------------------------------


class Counter:
    """The energy counter of a processor (RAPL, Intel and AMD under Linux).

    It counts microjoules, and starts from 0 again when it is full.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        limit = folder / "max_energy_range_uj"
        self.limit = int(limit.read_text()) if limit.exists() else 2**32

    def microjoules(self) -> int:
        """What it shows now."""
        return int((self.folder / "energy_uj").read_text())

    def joules_since(self, before: int) -> float:
        """Joules since it showed `before`, if it filled up at most once."""
        return ((self.microjoules() - before) % (self.limit + 1)) * 1e-6


def counter(root: Path = Path("/sys/class/powercap")) -> Counter | str:
    """The counter of the first processor, or why it cannot be read."""
    found = sorted(root.glob("*rapl:0")) if root.exists() else []
    if not found:
        return "this system has no energy counter (RAPL)"
    made = Counter(found[0])
    try:
        made.microjoules()
    except (OSError, ValueError) as error:
        return f"the energy counter cannot be read: {type(error).__name__}"
    return made


def measured(
    call: Callable[[], object], root: Path = Path("/sys/class/powercap")
) -> tuple[float, float | None, str]:
    """(seconds, joules of the processor, why not) of a call; joules may be None."""
    found = counter(root)
    before = 0 if isinstance(found, str) else found.microjoules()
    started = time.perf_counter()
    call()
    took = time.perf_counter() - started
    if isinstance(found, str):
        return took, None, found
    return took, found.joules_since(before), ""
