"""TMA: a thread names a box of a tensor, and hardware copies it to shared memory.

CUDA driver API, cuTensorMapEncodeTiled; PTX ISA, 5.5. Sizes and strides begin with the
dimension whose numbers lie side by side. What lies outside of the tensor is filled with
zeros. Blocks of a cluster may receive one box together (multicast): it is read once.

Of a product of M × K by K × N in tiles of m × n × k, a cluster of c₀ × c₁ blocks holds
c₀ tiles below each other, c₁ side by side. Blocks in a row share the tile of A, those
in a column the tile of B:

    bytes = ⌈M / m⌉ ⌈N / n⌉ ⌈K / k⌉ · (m k / c₁ + k n / c₀) · width

Simplified: only tiled mode, without interleaving, element strides of 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmlab.chips.nvidia_gpu.transactions import SECTOR

DIMENSIONS = 5
SIDE = 256  # of a box, at most
ALIGNED = 16  # bytes
SPANS = (0, 32, 64, 128)  # of a swizzle; 0: none


@dataclass(frozen=True)
class TensorMap:
    """A tensor and the box in which it is copied.

    Attributes:
        shape: numbers along each dimension, the innermost first.
        box: numbers of a box along each dimension.
        width: bytes of a number.
        strides: bytes from one to the next along the other dimensions; None: no gaps.
        swizzle: bytes of the span within which pieces of 16 change places.

    Raises:
        ValueError: the driver would refuse it.
    """

    shape: tuple[int, ...]
    box: tuple[int, ...]
    width: int = 2
    strides: tuple[int, ...] | None = None
    swizzle: int = 0

    def __post_init__(self) -> None:
        rank = len(self.shape)
        if not 1 <= rank <= DIMENSIONS or len(self.box) != rank:
            raise ValueError(
                f"shape={self.shape} and box={self.box} must both have from 1 to"
                f" {DIMENSIONS} dimensions"
            )
        if self.width not in (1, 2, 4, 8):
            raise ValueError(f"width={self.width} must be 1, 2, 4 or 8")
        if min(self.shape) < 1:
            raise ValueError(f"shape={self.shape} must be positive")
        if not all(1 <= side <= SIDE for side in self.box):
            raise ValueError(f"box={self.box} must have sides from 1 to {SIDE}")
        if self.inner % ALIGNED:
            raise ValueError(
                f"box={self.box} has rows of {self.inner} bytes: they must be a"
                f" multiple of {ALIGNED}"
            )
        if self.swizzle not in SPANS:
            raise ValueError(f"swizzle={self.swizzle} must be one of {SPANS}")
        if self.swizzle and self.inner > self.swizzle:
            raise ValueError(
                f"box={self.box} has rows of {self.inner} bytes: with"
                f" swizzle={self.swizzle} they must not be longer"
            )
        if len(self.steps) != rank - 1 or any(s % ALIGNED for s in self.steps):
            raise ValueError(
                f"strides={self.steps} must be {rank - 1} multiples of {ALIGNED} bytes"
            )

    @property
    def inner(self) -> int:
        """Bytes of a row of the box."""
        return self.box[0] * self.width

    @property
    def steps(self) -> tuple[int, ...]:
        """Bytes from one to the next along the dimensions but the first."""
        if self.strides is not None:
            return self.strides
        sizes = [self.width * math.prod(self.shape[:d]) for d in range(1, self.rank)]
        return tuple(sizes)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def bytes(self) -> int:
        """That a box fills in shared memory, zeros too: what a barrier waits for."""
        return math.prod(self.box) * self.width

    def read(self, start: Sequence[int]) -> tuple[int, int]:
        """Bytes of the tensor in the box that begins at `start`, and their sectors.

        Raises:
            ValueError: start has another number of dimensions.
        """
        if len(start) != self.rank:
            raise ValueError(f"start={tuple(start)} must have {self.rank} dimensions")
        inside = [
            range(max(0, at), min(at + side, size))
            for at, side, size in zip(start, self.box, self.shape, strict=True)
        ]
        if not all(len(each) for each in inside):
            return 0, 0
        # a row of the box begins here, without the offsets of the other dimensions
        first, last = inside[0][0] * self.width, (inside[0][-1] + 1) * self.width - 1
        rows = [0]
        for each, step in zip(inside[1:], self.steps, strict=True):
            rows = [row + i * step for row in rows for i in each]
        sectors = {
            sector
            for row in rows
            for sector in range((row + first) // SECTOR, (row + last) // SECTOR + 1)
        }
        return len(rows) * (last - first + 1), len(sectors)


def multicast(
    size: tuple[int, int, int],
    tile: tuple[int, int, int],
    cluster: tuple[int, int] = (1, 1),
    width: int = 2,
) -> int:
    """Bytes that the blocks of a product ask the second cache for.

    Args:
        size: M, N, K of the product; `tile`: m, n, k of a block's step.
        cluster: blocks below each other, and side by side, that share their tiles.

    Raises:
        ValueError: a size is not positive; the cluster has more than 8 blocks, or does
            not divide the grid.
    """
    if min(*size, *tile, *cluster, width) < 1:
        raise ValueError(
            f"size={size}, tile={tile}, cluster={cluster} must be positive"
        )
    if math.prod(cluster) > 8:
        raise ValueError(f"cluster={cluster} must not have more than 8 blocks")
    (M, N, K), (m, n, k) = size, tile
    down, right, steps = math.ceil(M / m), math.ceil(N / n), math.ceil(K / k)
    if down % cluster[0] or right % cluster[1]:
        raise ValueError(f"cluster={cluster} must divide the grid of {(down, right)}")
    a_tiles = down * right // cluster[1]
    b_tiles = down * right // cluster[0]
    return steps * (a_tiles * m * k + b_tiles * k * n) * width
