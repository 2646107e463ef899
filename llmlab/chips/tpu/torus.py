"""Chips on a torus, and how long collectives take on it.

Each chip has a link to the next one on either side of each axis; where an axis wraps
around, its ends are neighbours, too. α is the time of a hop, `link` the bytes/s of one
link in one direction; both directions work at the same time.

All-gather of V bytes over an axis of n chips: each has a shard of V / n at first. Half
of the others is nearer one way round, half the other way. In each direction

    ring   (n − 1) / 2 shards cross each link, over ⌈(n − 1) / 2⌉ hops:
           t = α ⌈(n − 1) / 2⌉ + (n − 1) / 2 · V / (n link)
    line   n − 1 shards cross the last link, over n − 1 hops:
           t = α (n − 1) + (n − 1) V / (n link)

Over several axes the data are cut into as many parts as there are axes, and each part
begins with another axis: all links work all the time. A reduce-scatter is an all-gather
backwards, an all-reduce is both.

Simplified: a step begins when the slowest part of the step before is done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmlab.chips.checked import not_negative, positive
from llmlab.chips.tpu.array import whole
from llmlab.models.chips import chip

PORTS = {"TPU v4": 6, "TPU v5e": 4, "TPU v5p": 6, "TPU v6e": 4, "TPU7x": 6}


@dataclass(frozen=True)
class Torus:
    """Chips along two or three axes (or one: a ring).

    Attributes:
        link: bytes/s of one link in one direction.
        hop: seconds until the first byte is one chip further.
        wrap: whether the ends of an axis are neighbours. An axis of two has one link.

    Raises:
        ValueError: no axis, an axis of one, no bandwidth, or a negative hop.
    """

    sides: tuple[int, ...]
    link: float
    hop: float = 0.0
    wrap: bool = True

    def __post_init__(self) -> None:
        if not self.sides:
            raise ValueError("sides=() has no axis")
        whole(**{f"sides[{i}]": side for i, side in enumerate(self.sides)})
        if 1 in self.sides:
            raise ValueError(
                f"sides={self.sides} has an axis of one: a chip is not its own"
                " neighbour; leave that axis out"
            )
        positive(link=self.link)
        not_negative(hop=self.hop)

    @classmethod
    def of(cls, name: str, *sides: int, hop: float = 0.0, wrap: bool = True) -> Torus:
        """TPUs of that name, with the links of the file of chips.

        Raises:
            ValueError: not a TPU whose links are known, or more axes than its ports.
        """
        if name not in PORTS:
            raise ValueError(f"name={name!r} must be one of {', '.join(PORTS)}")
        if 2 * len(sides) > PORTS[name]:
            raise ValueError(
                f"sides={sides}: {name} has {PORTS[name]} links, two for each axis"
            )
        return cls(sides, chip(name).link / PORTS[name], hop, wrap)

    @property
    def chips(self) -> int:
        return math.prod(self.sides)

    def wraps(self, side: int) -> bool:
        """Whether an axis of that many chips is a ring."""
        return self.wrap and side > 2

    @property
    def bisection(self) -> float:
        """Bytes/s, one way, between two halves: across the middle of the longest axis.

        Raises:
            ValueError: the longest axis is odd, so there are no halves.
        """
        longest = max(self.sides)
        if longest % 2:
            raise ValueError(f"sides={self.sides}: the longest axis is odd")
        cuts = 2 if self.wraps(longest) else 1
        return cuts * self.chips // longest * self.link


def axis_seconds(torus: Torus, side: int, total: float) -> float:
    """All-gather to `total` bytes on each chip, over one axis of `side` chips."""
    shard = total / side
    if torus.wraps(side):
        hops, shards = math.ceil((side - 1) / 2), (side - 1) / 2
    else:
        hops, shards = side - 1, side - 1
    return torus.hop * hops + shards * shard / torus.link


def all_gather_seconds(torus: Torus, total: float) -> float:
    """Until each chip has all `total` bytes, of which each had its part."""
    positive(total=total)
    axes = len(torus.sides)
    have = [total / axes / torus.chips] * axes  # bytes of each part on a chip
    seconds = 0.0
    for step in range(axes):
        slowest = 0.0
        for part in range(axes):
            side = torus.sides[(part + step) % axes]
            have[part] *= side
            slowest = max(slowest, axis_seconds(torus, side, have[part]))
        seconds += slowest
    return seconds


def reduce_scatter_seconds(torus: Torus, total: float) -> float:
    """Until each chip has its part of the sum of `total` bytes: backwards the same."""
    return all_gather_seconds(torus, total)


def all_reduce_seconds(torus: Torus, total: float) -> float:
    """Until each chip has the sum of `total` bytes: reduce-scatter, then all-gather."""
    return reduce_scatter_seconds(torus, total) + all_gather_seconds(torus, total)


def all_reduce_bound(torus: Torus, total: float) -> float:
    """No algorithm is faster: each chip must send 2 (N − 1) / N of its bytes."""
    positive(total=total)
    links = sum(2 if torus.wraps(side) else 1 for side in torus.sides)
    return 2 * total * (torus.chips - 1) / torus.chips / (links * torus.link)


@dataclass(frozen=True)
class Gathered:
    """An all-gather along one axis, shard by shard.

    Attributes:
        holds: of each chip, the halves of shards that it has at the end.
        busiest: shards over the busiest link in one direction.
        sent: shards that each chip sends, over both its links.
    """

    holds: list[set[tuple[int, int]]]
    steps: int
    busiest: float
    sent: list[float]


def gather(side: int, wrapped: bool = True) -> Gathered:
    """Moves the halves of shards from neighbour to neighbour until all have all.

    Raises:
        ValueError: side is below 2, or a ring of two is asked for.
    """
    whole(side=side)
    if side < 2 or (wrapped and side < 3):
        raise ValueError(f"side={side}: a line begins at 2 chips, a ring at 3")
    holds = [{(i, 0), (i, 1)} for i in range(side)]
    # What each chip sends next to the right (+1) and to the left (−1).
    moving = {(i, way): {(i, 0), (i, 1)} for i in range(side) for way in (1, -1)}
    crossed: dict[tuple[int, int], float] = {}
    steps = 0
    while any(moving.values()):
        arriving: dict[tuple[int, int], set] = {key: set() for key in moving}
        for (i, way), pieces in moving.items():
            to = i + way
            if not wrapped and not 0 <= to < side:
                continue
            to %= side
            wanted = {p for p in pieces if _goes(p, to, way, side, wrapped)}
            crossed[i, way] = crossed.get((i, way), 0) + len(wanted) / 2
            holds[to] |= wanted
            arriving[to, way] = wanted
        steps += any(arriving.values())
        moving = arriving
    sent = [crossed.get((i, 1), 0) + crossed.get((i, -1), 0) for i in range(side)]
    return Gathered(holds, steps, max(crossed.values()), sent)


def _goes(piece: tuple[int, int], to: int, way: int, side: int, wrapped: bool) -> bool:
    """Whether half a shard reaches chip `to` in that direction."""
    if not wrapped:
        return True
    owner, half = piece
    distance = (to - owner) * way % side
    if 2 * distance == side:  # opposite: one half each way
        return half == (0 if way == 1 else 1)
    return 0 < 2 * distance < side
