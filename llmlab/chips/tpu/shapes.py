"""Generations of TPUs, and what the shapes of a model make of their arrays.

An MXU is an array with weights that stay, and a second register for the next ones. A
chip has `units` of them; its peak is 2 × units × side² × clock. So a printed peak and
a printed number of units imply a clock, which says whether both can be true.

XLA lays arrays out in tiles of 8 × 128 numbers: a vector register has 8 sublanes of
128 lanes. The last two dimensions are filled up to whole tiles.

Simplified: each product of a layer is fed to one MXU by itself, memory keeps up, and
nothing but the products of the layers is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmlab.chips.tpu.array import Array, Run, whole
from llmlab.models.accounting import linear_shapes
from llmlab.models.chips import chip
from llmlab.models.llama import LlamaConfig

TILE = (8, 128)  # sublanes, lanes
V1_OPS = 92e12  # int8, Jouppi et al. 2017: v1 is not among the chips for training


@dataclass(frozen=True)
class Generation:
    """How a TPU is built.

    Attributes:
        name: as in the file of chips; TPU v1 is not in it.
        units: MXUs of a chip, as printed.
        side: rows and columns of each.
        source: bibtex key of both.
    """

    name: str
    units: int
    side: int
    source: str

    @property
    def peak(self) -> float:
        """FLOP/s in 16 bits, as printed; TPU v1 has 8 bits only."""
        return V1_OPS if self.name == "TPU v1" else chip(self.name).speed("bf16")

    @property
    def clock(self) -> float:
        """Hertz that peak and units imply together."""
        return self.peak / (2 * self.units * self.side**2)

    @property
    def array(self) -> Array:
        """One of its MXUs."""
        return Array(self.side, self.side, "weight", double=True)


GENERATIONS = {
    each.name: each
    for each in (
        Generation("TPU v1", 1, 256, "jouppi2017tpu"),
        Generation("TPU v3", 4, 128, "google2025tpuv3"),
        Generation("TPU v4", 8, 128, "google2025tpuv4"),
        Generation("TPU v5e", 4, 128, "google2025tpuv5e"),
        Generation("TPU v5p", 8, 128, "google2025tpuv5p"),
        Generation("TPU v6e", 2, 256, "google2025tpuv6e"),
        Generation("TPU7x", 4, 256, "jax2026tpuinfo"),
    )
}


def layer_runs(config: LlamaConfig, tokens: int, array: Array) -> dict[str, Run]:
    """The products of one layer on the array, by name: X (tokens, into) W (into, out).

    Raises:
        ValueError: tokens is not a whole number of at least 1.
    """
    return {
        name: Run(array, tokens, into, out)
        for name, (out, into) in linear_shapes(config).items()
    }


def utilisation(runs: Sequence[Run]) -> float:
    """Products made over products that would have fitted, of runs on like arrays.

    Raises:
        ValueError: no run.
    """
    if not runs:
        raise ValueError("runs is empty: there is nothing to use the array")
    return sum(run.macs for run in runs) / sum(
        run.array.cells * run.cycles for run in runs
    )


def mapping(runs: Sequence[Run]) -> float:
    """What the edges leave of an array, at best: as many tokens as one likes."""
    held = sum(run.sizes[0] * run.sizes[1] for run in runs)
    return held / sum(run.folds * run.array.cells for run in runs)


def tokens_for(config: LlamaConfig, array: Array, share: float) -> int:
    """The fewest tokens at which the layer reaches that share of its best utilisation.

    Raises:
        ValueError: share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share} must lie between 0 and 1")

    def enough(tokens: int) -> bool:
        runs = [*layer_runs(config, tokens, array).values()]
        return utilisation(runs) >= share * mapping(runs)

    high = 1
    while not enough(high):
        high *= 2
    low = high // 2  # not enough, or 0
    while high - low > 1:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return high


def padded(shape: Sequence[int], tile: tuple[int, int] = TILE) -> tuple[int, ...]:
    """The shape with its last two dimensions filled up to whole tiles.

    One dimension alone lies along the lanes, in one row.

    Raises:
        ValueError: no dimension, or one that is not a whole number of at least 1.
    """
    if not shape:
        raise ValueError("shape=() has no dimension to lay out")
    whole(**{f"shape[{i}]": size for i, size in enumerate(shape)})
    rows, lanes = tile
    full = (1, *shape) if len(shape) == 1 else tuple(shape)
    return (
        *full[:-2],
        math.ceil(full[-2] / rows) * rows,
        math.ceil(full[-1] / lanes) * lanes,
    )


def padded_bytes(
    shape: Sequence[int], itemsize: int, tile: tuple[int, int] = TILE
) -> int:
    """Bytes that an array takes in tiles."""
    whole(itemsize=itemsize)
    return math.prod(padded(shape, tile)) * itemsize
