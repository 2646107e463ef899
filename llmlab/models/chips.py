"""Chips as their vendors print them: a figure per line, each with its source.

The lines are in `data/chips.csv`:

    chip, vendor, year
    quantity   flops, memory, bandwidth (of the memory), link (all links of one chip),
               or power
    format     flops only: of the numbers that are multiplied
    value      as printed, with its
    unit       a product with a sum is two FLOP; GB are 10⁹ bytes, GiB 2³⁰
    kind       flops: dense, "sparse 2:4" (every second weight is zero, and the printed
               figure counts the zeros), sparse, unstated
               link: one way, both ways, unstated
    source     bibtex key
    read       own: a page of the vendor; quoted: a page that quotes one
    used       yes: a `Chip` takes it; no: kept because it says something else
    note

Two sources rarely agree in everything: `contradictions` lists where.
"""

from __future__ import annotations

import csv
import difflib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).parent / "data" / "chips.csv"
PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
# What is left of a unit without its prefix → how many FLOP, bytes or watts it is.
BASES = {
    "FLOP/s": 1.0,
    "OPS": 1.0,
    "MAC/s": 2.0,
    "B": 1.0,
    "B/s": 1.0,
    "bit/s": 1 / 8,
    "W": 1.0,
}
# The part of a printed figure that counts; a kind that is not here says too little.
KINDS = {"": 1.0, "dense": 1.0, "sparse 2:4": 0.5, "one way": 1.0, "both ways": 0.5}
UNKNOWN = ("sparse", "unstated")
QUANTITIES = ("flops", "memory", "bandwidth", "link", "power")


def to_si(value: float, unit: str, kind: str = "") -> float | None:
    """Dense FLOP/s, bytes, bytes/s in one direction, or watts; None: not known.

    >>> to_si(900, "GB/s", "both ways")
    450000000000.0

    Raises:
        ValueError: unit or kind is none of the known ones, or value is not positive.
    """
    if not value > 0:
        raise ValueError(f"value={value} must be above 0")
    if kind not in (*KINDS, *UNKNOWN):
        known = ", ".join(repr(each) for each in (*KINDS, *UNKNOWN))
        raise ValueError(f"kind={kind!r} must be one of {known}")
    for prefix, factor in (PREFIXES | BINARY).items():
        base = unit.removeprefix(prefix)
        if base in BASES and unit == prefix + base:
            scale = factor * BASES[base]
            return None if kind in UNKNOWN else value * scale * KINDS[kind]
    raise ValueError(
        f"unit={unit!r} is not known: use a prefix ({', '.join(PREFIXES | BINARY)})"
        f" and one of {', '.join(BASES)}"
    )


@dataclass(frozen=True)
class Figure:
    """One printed number."""

    chip: str
    quantity: str
    format: str
    value: float
    unit: str
    kind: str
    source: str
    own: bool  # a page of the vendor, not one that quotes it
    used: bool
    note: str

    @property
    def si(self) -> float | None:
        """Dense FLOP/s, bytes, bytes/s one way, watts; None: it says too little."""
        return to_si(self.value, self.unit, self.kind)

    def __str__(self) -> str:
        words = [f"{self.value:g} {self.unit}", self.kind]
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Chip:
    """What one chip can do at most; None where nothing clear is published.

    Attributes:
        flops: format → dense FLOP/s.
        memory: bytes.
        bandwidth: of the memory, bytes/s.
        link: to other chips, all links together, bytes/s in one direction.
        power: watts.
    """

    name: str
    vendor: str
    year: int
    flops: dict[str, float]
    memory: float | None = None
    bandwidth: float | None = None
    link: float | None = None
    power: float | None = None

    def speed(self, *formats: str) -> float:
        """FLOP/s in the first of these formats that the chip has.

        Raises:
            ValueError: it has none of them, or nothing clear is published.
        """
        for each in formats:
            if each in self.flops:
                return self.flops[each]
        raise ValueError(
            f"{self.name} has no clear figure for {' or '.join(formats)}:"
            f" there is {', '.join(self.flops) or 'none at all'}"
        )


@cache
def _lines() -> list[dict[str, str]]:
    with FILE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@cache
def figures() -> tuple[Figure, ...]:
    """All printed numbers, in the order of the file."""
    return tuple(
        Figure(
            chip=line["chip"],
            quantity=line["quantity"],
            format=line["format"],
            value=float(line["value"]),
            unit=line["unit"],
            kind=line["kind"],
            source=line["source"],
            own=line["read"] == "own",
            used=line["used"] == "yes",
            note=line["note"],
        )
        for line in _lines()
    )


@cache
def chips() -> dict[str, Chip]:
    """Name → chip, from the figures that are used."""
    found = {}
    for line in _lines():
        name = line["chip"]
        mine = [each for each in figures() if each.chip == name and each.used]
        speeds = {each.format: each.si for each in mine if each.quantity == "flops"}
        rest = {each.quantity: each.si for each in mine if each.quantity != "flops"}
        found[name] = Chip(name, line["vendor"], int(line["year"]), speeds, **rest)
    return found


def chip(name: str) -> Chip:
    """The chip of that name.

    Raises:
        ValueError: there is none; the message has similar names.
    """
    if name in chips():
        return chips()[name]
    near = difflib.get_close_matches(name, chips(), n=3, cutoff=0.4) or chips()
    raise ValueError(f"name={name!r} is not in {FILE.name}: try {', '.join(near)}")


def contradictions(tolerance: float = 0.005) -> list[tuple[Figure, ...]]:
    """Figures of one quantity of one chip that differ by more than `tolerance`.

    Those that say too little count, too: nobody can tell whether they agree.
    """
    groups: dict[tuple[str, str, str], list[Figure]] = {}
    for each in figures():
        groups.setdefault((each.chip, each.quantity, each.format), []).append(each)
    found = []
    for group in groups.values():
        values = [each.si for each in group]
        unclear = len(group) > 1 and None in values
        clear = [value for value in values if value is not None]
        if unclear or (clear and max(clear) > min(clear) * (1 + tolerance)):
            found.append(tuple(group))
    return found
