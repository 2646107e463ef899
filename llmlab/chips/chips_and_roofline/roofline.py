"""The roofline: what a chip needs at least for a piece of work.

Williams, Waterman and Patterson 2009, https://doi.org/10.1145/1498765.1498785. A chip
computes and reads at the same time, so the slower of the two decides:

    seconds     ≥  max( W / π,  Q / β )
    FLOP/s      ≤  min( π,  I β ),       I = W / Q

    W  FLOPs of the work        π  FLOP/s of the chip, its peak
    Q  bytes read and written   β  bytes/s of its memory
    I  arithmetic intensity     π / β  the ridge: below it reading takes longer

Simplified: both rates are reached, everything overlaps, and Q counts each input and
each output once, as if the chip kept what it needs again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmlab.models.accounting import (
    forward_flops,
    kv_cache_bytes,
    linear_shapes,
    parameters,
)
from llmlab.models.chips import Chip
from llmlab.models.llama import LlamaConfig


@dataclass(frozen=True)
class Work:
    """FLOPs to compute and bytes to move.

    Raises:
        ValueError: one of them is negative, or both are zero.
    """

    name: str
    flops: float
    bytes: float

    def __post_init__(self) -> None:
        for name in ("flops", "bytes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.flops == self.bytes == 0:
            raise ValueError("flops and bytes are both 0: that is no work")

    @property
    def intensity(self) -> float:
        """FLOPs per byte; inf where nothing is moved."""
        return self.flops / self.bytes if self.bytes else math.inf

    def __add__(self, other: Work) -> Work:
        flops, moved = self.flops + other.flops, self.bytes + other.bytes
        return Work(f"{self.name} + {other.name}", flops, moved)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}={value} must be above 0")


def attainable(intensity: float, peak: float, bandwidth: float) -> float:
    """FLOP/s at most, of work with that many FLOPs per byte: the roof above it."""
    _positive(intensity=intensity, peak=peak, bandwidth=bandwidth)
    return min(peak, intensity * bandwidth)


def seconds(work: Work, peak: float, bandwidth: float) -> float:
    """What the work takes at least."""
    _positive(peak=peak, bandwidth=bandwidth)
    return max(work.flops / peak, work.bytes / bandwidth)


def ridge(peak: float, bandwidth: float) -> float:
    """FLOPs per byte at which computing and reading take equally long."""
    _positive(peak=peak, bandwidth=bandwidth)
    return peak / bandwidth


def product(
    m: int, k: int, n: int, x_bytes: float = 2, w_bytes: float = 2, y_bytes: float = 2
) -> Work:
    """y = x W with x (m, k) and W (k, n); bytes per number of each."""
    _positive(m=m, k=k, n=n, x_bytes=x_bytes, w_bytes=w_bytes, y_bytes=y_bytes)
    moved = m * k * x_bytes + k * n * w_bytes + m * n * y_bytes
    return Work(f"({m}, {k}) × ({k}, {n})", 2 * m * k * n, moved)


def smallest_batch(
    k: int,
    n: int,
    peak: float,
    bandwidth: float,
    x_bytes: float = 2,
    w_bytes: float = 2,
    y_bytes: float = 2,
) -> int | None:
    """How many rows x needs until computing x W takes as long as moving it; or None.

    2 m k n / π ≥ (m k bₓ + k n b_w + m n b_y) / β, solved for m. Each row also brings
    bytes of its own: if those alone take longer than its FLOPs, no m is enough.
    """
    product(1, k, n, x_bytes, w_bytes, y_bytes)  # checks all of them
    _positive(peak=peak, bandwidth=bandwidth)
    a_row = 2 * k * n / peak - (k * x_bytes + n * y_bytes) / bandwidth  # s
    once = k * n * w_bytes / bandwidth  # s
    if a_row <= 0:
        return None
    return math.ceil(once / a_row)


def step(
    config: LlamaConfig,
    sequences: int,
    new: int,
    past: int = 0,
    weight_bytes: float = 2,
    cache_bytes: float = 2,
) -> Work:
    """A pass of a Llama over `new` tokens in each of `sequences`, after `past` others.

    All weights are read once, the table of embeddings only where a row is taken; each
    sequence reads its keys and values. What goes between the layers stays on the chip.
    """
    _positive(sequences=sequences, new=new, weight_bytes=weight_bytes)
    _positive(cache_bytes=cache_bytes)
    if past < 0:
        raise ValueError(f"past={past} must not be negative")
    flops = forward_flops(config, sequences, new, past)
    table = config.vocab_size * config.hidden_size
    looked_up = 0 if config.tie_word_embeddings else table
    read = (parameters(config) - looked_up) * weight_bytes
    cache = kv_cache_bytes(config, sequences, past + new) / 2 * cache_bytes
    name = f"{sequences} × {new} tokens after {past}"
    return Work(name, flops, read + cache)


def layer_products(
    config: LlamaConfig, tokens: int, weight_bytes: float = 2
) -> list[Work]:
    """The products of one layer, by name: the dots that one draws into a roofline."""
    works = []
    for name, (out, into) in linear_shapes(config).items():
        work = product(tokens, into, out, w_bytes=weight_bytes)
        works.append(Work(name, work.flops, work.bytes))
    return works


def chips_needed(held: float, memory: float, free: float = 0.9) -> int:
    """How many chips it takes to hold that many bytes, using a part of each memory."""
    _positive(held=held, memory=memory, free=free)
    if free > 1:
        raise ValueError(f"free={free} is a part of the memory: at most 1")
    return math.ceil(held / (free * memory))


@dataclass(frozen=True)
class Place:
    """What one kind of chip makes of the work."""

    chip: Chip
    chips: int  # that hold what must be held
    seconds: float
    bound: str  # "compute" or "memory"

    @property
    def chip_seconds(self) -> float:
        """Seconds times chips: what one pays for."""
        return self.seconds * self.chips

    @property
    def joules(self) -> float | None:
        """At full power, all of them; None where the power is not published."""
        return self.chip.power and self.chip.power * self.chip_seconds


def rank(
    work: Work, held: float, chips: Sequence[Chip], *formats: str, free: float = 0.9
) -> list[Place]:
    """Chips by chip-seconds of the work, the best first.

    As many of one kind as hold `held` bytes share the work evenly, and their links cost
    nothing: a bound, not a forecast. Chips without a clear figure are left out.
    """
    found = []
    for chip in chips:
        known = any(each in chip.flops for each in formats)
        if not (known and chip.memory and chip.bandwidth):
            continue
        count = chips_needed(held, chip.memory, free)
        compute = work.flops / (count * chip.speed(*formats))
        memory = work.bytes / (count * chip.bandwidth)
        bound = "compute" if compute >= memory else "memory"
        found.append(Place(chip, count, max(compute, memory), bound))
    return sorted(found, key=lambda place: place.chip_seconds)


def implied_clock(flops: float, per_clock: float) -> float:
    """Hertz at which units that do `per_clock` FLOPs together reach a printed figure.

    A clock that no such chip has betrays the figure: zeros that were counted, or
    products and sums that were counted once or twice too often.
    """
    _positive(flops=flops, per_clock=per_clock)
    return flops / per_clock
