"""A small tuner: schedules are drawn, measured, and the best ones changed a little.

    space       name → `Tile` (whole numbers whose product is the extent) or `Choice`
    decisions   name → what was chosen: data, and all that a schedule depends on
    mutate      one decision changed: of a tile, a prime factor moves to another place
    tune        random draws first; then mutations of the best so far
    log         one line of JSON per measurement; a run that is started again goes on
                where it ended, and `best` reads the winner without measuring anything

The moves are those of Ansor and of TVM's MetaSchedule (Zheng et al. 2020; Shao et al.
2022). TVM's own tuner needs a package more than TVM installs (0.27.0.post1), so this
one is ours, on its `Schedule`. Simplified: no model of the cost; every candidate is
measured.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llmlab.compilers import json_lines
from llmlab.compilers.tvm.loops import Primitive
from llmlab.compilers.tvm.product import registers

Decision = tuple[int, ...] | int | bool
Decisions = dict[str, Decision]


@dataclass(frozen=True)
class Tile:
    """An extent in parts, whole: their product is the extent.

    Attributes:
        most: the largest last part: what is written out or put into registers.
        least: the smallest.
    """

    extent: int
    parts: int = 2
    most: int = 64
    least: int = 1

    def __post_init__(self) -> None:
        for name in ("extent", "parts", "most", "least"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.options:
            raise ValueError(f"{self} has no tile")

    @property
    def options(self) -> list[tuple[int, ...]]:
        found = tiles(self.extent, self.parts, self.most)
        return [tile for tile in found if tile[-1] >= self.least]

    def draw(self, draw: random.Random) -> tuple[int, ...]:
        """Every tile is as likely as any other."""
        return draw.choice(self.options)

    def near(self, tile: tuple[int, ...]) -> list[tuple[int, ...]]:
        found = neighbours(tile, self.most)
        return [other for other in found if other[-1] >= self.least]


@dataclass(frozen=True)
class Choice:
    """One of a few."""

    options: tuple[int | bool, ...]

    def draw(self, draw: random.Random) -> int | bool:
        return draw.choice(self.options)

    def near(self, option: int | bool) -> list[int | bool]:
        return [other for other in self.options if other != option]


Space = Mapping[str, Tile | Choice]


def tiles(extent: int, parts: int, most: int) -> list[tuple[int, ...]]:
    """All ways to write an extent as a product of so many parts, in order."""
    if parts == 1:
        return [(extent,)] if extent <= most else []
    found = []
    for first in range(1, extent + 1):
        if extent % first == 0:
            found += [
                (first, *rest) for rest in tiles(extent // first, parts - 1, most)
            ]
    return found


def primes(n: int) -> list[int]:
    """The prime numbers that divide n, each once."""
    found = []
    p = 2
    while p * p <= n:
        if n % p == 0:
            found.append(p)
            while n % p == 0:
                n //= p
        p += 1
    return [*found, n] if n > 1 else found


def neighbours(tile: tuple[int, ...], most: int) -> list[tuple[int, ...]]:
    """The tiles that differ by one prime factor, which moved to another part.

    Args:
        most: the largest last part.
    """
    found = set()
    for source, part in enumerate(tile):
        for prime in primes(part):
            for target in range(len(tile)):
                new = list(tile)
                new[source] //= prime
                new[target] *= prime
                if target != source and new[-1] <= most:
                    found.add(tuple(new))
    return sorted(found)


def sample(space: Space, draw: random.Random) -> Decisions:
    """One point of a space."""
    return {name: part.draw(draw) for name, part in space.items()}


def mutate(decisions: Decisions, space: Space, draw: random.Random) -> Decisions:
    """The same with one decision changed, where there is another choice."""
    near = {name: part.near(decisions[name]) for name, part in space.items()}
    changeable = [name for name in near if near[name]]
    if not changeable:
        return dict(decisions)
    name = draw.choice(changeable)
    return {**decisions, name: draw.choice(near[name])}


# The log ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """A measurement. A candidate that failed has no time, and the reason."""

    task: str
    decisions: Decisions
    seconds: float | None
    problem: str = ""


def frozen(decisions: Mapping[str, object]) -> Decisions:
    """Decisions as JSON gives them back: lists are tiles."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in decisions.items()
    }


def key(decisions: Decisions) -> str:
    """A text that is the same for the same decisions."""
    return json.dumps(decisions, sort_keys=True)


def append(path: Path, record: Record) -> None:
    """One line more."""
    json_lines.append(path, asdict(record))


def read(path: Path, task: str) -> list[Record]:
    """The measurements of a task, in their order.

    A line that a run was stopped in the middle of is left out.
    """
    found = []
    for values in json_lines.read(path):
        try:
            record = Record(**{**values, "decisions": frozen(values["decisions"])})
        except (KeyError, TypeError):
            continue
        if record.task == task:
            found.append(record)
    return found


def best(records: Sequence[Record]) -> Record | None:
    """The fastest."""
    measured = [record for record in records if record.seconds is not None]
    return min(measured, key=lambda record: record.seconds, default=None)


# The search ---------------------------------------------------------------------------


def candidates(
    space: Space, known: list[Record], draw: random.Random, random_first: int, keep: int
) -> Iterator[Decisions]:
    """What to measure next, never the same twice.

    `known` may grow meanwhile: mutations are those of the best that it holds by then.
    """
    seen = {key(record.decisions) for record in known}
    patience = 0
    while patience < 200:
        parents = sorted(
            (record for record in known if record.seconds is not None),
            key=lambda record: record.seconds,
        )[:keep]
        # now and then a stranger, or a search ends where all neighbours are known
        if len(seen) < random_first or not parents or draw.random() < 0.1:
            decisions = sample(space, draw)
        else:
            decisions = mutate(draw.choice(parents).decisions, space, draw)
        if key(decisions) in seen:
            patience += 1  # a small space may be all known
            continue
        patience = 0
        seen.add(key(decisions))
        yield decisions


def tune(
    task: str,
    space: Space,
    measure: Callable[[Decisions], float],
    log: Path,
    trials: int,
    seed: int = 0,
    random_first: int = 8,
    keep: int = 4,
) -> list[Record]:
    """All measurements of a task, up to `trials`, old ones from the log included.

    Args:
        measure: decisions → seconds. What it raises is written down, and the search
            goes on.
        random_first: how many are drawn before the best are changed.
        keep: how many of the best have children.
    """
    known = read(log, task)
    draw = random.Random(f"{seed} {len(known)}")
    for decisions in candidates(space, known, draw, random_first, keep):
        if len(known) >= trials:
            break
        try:
            record = Record(task, decisions, measure(decisions))
        except Exception as problem:
            record = Record(task, decisions, None, f"{problem}"[:200])
        append(log, record)
        known.append(record)
    return known


# The product --------------------------------------------------------------------------


def product_space(M: int, N: int, K: int) -> dict[str, Tile | Choice]:
    """What may be chosen in `product.registers`."""
    return {
        "i": Tile(M, most=16),
        "j": Tile(N, most=64, least=4),
        "k": Tile(K, most=4),
        "packed": Choice((False, True)),
        "by_columns": Choice((False, True)),
    }


def product_schedule(decisions: Decisions) -> list[Primitive]:
    """The schedule of a product under these decisions."""
    return registers(
        rows=decisions["i"][-1],
        columns=decisions["j"][-1],
        steps=decisions["k"][-1],
        packed=decisions["packed"],
        by_columns=decisions["by_columns"],
    )


def size(space: Space) -> int:
    """How many points a space has."""
    return math.prod(len(part.options) for part in space.values())
