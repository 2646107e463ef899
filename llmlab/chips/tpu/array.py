"""A systolic array and a product: how many cycles, and what is read in each of them.

Kung and Leiserson 1979; the TPU's: Jouppi et al. 2017, https://arxiv.org/abs/1704.04760.
R × C cells, each with a multiplier, an adder and a few registers. A cell hands on what
it has to its right and lower neighbour in the next cycle, so one reading of the memory
at the edge serves a whole row or column. For Y = X W, with X (M, K) and W (K, N):

    dataflow   stays in the cells   comes from the left   goes down
    weight     a block of W         rows of X             partial sums of Y
    output     a block of Y         X                     W
    input      a block of X^T       columns of W          partial sums of Y^T

A matrix that is larger than the array is cut into folds. With weights that stay, a fold
takes R cycles to fill, and its last row leaves the last column M + R + C − 2 later:

    weight   ⌈K/R⌉ ⌈N/C⌉ (2R + C + M − 2)
    output   ⌈M/R⌉ ⌈N/C⌉ (2R + C + K − 2)
    input    ⌈K/R⌉ ⌈M/C⌉ (2R + C + N − 2)

With a second register for weights in each cell ("double"), the next block comes in
while this one works. A fold then costs max(M, R) cycles, and filling and draining are
paid once: R + (folds − 1) max(M, R) + M + R + C − 2.

    X (M, K), W (K, N), Y (M, N)     the product
    R, C                             rows and columns of the array
    f                                a fold; K (or M) runs faster than N

Simplified: the memory at the edges always has what is asked for; a fold that fills only
a part of the array takes as long as a full one, since its cells are all passed through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

DATAFLOWS = ("weight", "output", "input")
NOTHING = -1  # no address: a port that is idle in this cycle


@dataclass(frozen=True)
class Array:
    """R × C cells, and what stays in them.

    Attributes:
        double: a second register in each cell, into which the next block comes.

    Raises:
        ValueError: a side is not a whole number of at least 1, the dataflow is not
            known, or double goes with "output", where no block comes in.
    """

    rows: int
    columns: int
    dataflow: str = "weight"
    double: bool = False

    def __post_init__(self) -> None:
        whole(rows=self.rows, columns=self.columns)
        if self.dataflow not in DATAFLOWS:
            known = ", ".join(DATAFLOWS)
            raise ValueError(f"dataflow={self.dataflow!r} must be one of {known}")
        if self.double and self.dataflow == "output":
            raise ValueError(
                "double=True needs a block that comes in: dataflow='output' has none"
            )

    @property
    def cells(self) -> int:
        """Multipliers."""
        return self.rows * self.columns


def whole(**values: int) -> None:
    """Nothing, if each value is a whole number of at least 1.

    Raises:
        ValueError: names the first one that is not.
    """
    for name, value in values.items():
        if isinstance(value, bool) or int(value) != value or value < 1:
            raise ValueError(f"{name}={value} must be a whole number of at least 1")


@dataclass(frozen=True)
class Run:
    """A product on an array, in closed form.

    The names follow the array, not the product: what is held in the cells is cut along
    `down` (to its rows) and `across` (to its columns), and `stream` lines pass each
    fold.
    """

    array: Array
    m: int
    k: int
    n: int

    def __post_init__(self) -> None:
        whole(m=self.m, k=self.k, n=self.n)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(down, across, stream): along the rows, the columns, and in time."""
        return {
            "weight": (self.k, self.n, self.m),
            "output": (self.m, self.n, self.k),
            "input": (self.k, self.m, self.n),
        }[self.array.dataflow]

    @property
    def folds_down(self) -> int:
        return math.ceil(self.sizes[0] / self.array.rows)

    @property
    def folds_across(self) -> int:
        return math.ceil(self.sizes[1] / self.array.columns)

    @property
    def folds(self) -> int:
        """Blocks that come one after the other."""
        return self.folds_down * self.folds_across

    @property
    def period(self) -> int:
        """Cycles from the beginning of a fold to that of the next."""
        stream = self.sizes[2]
        if self.array.double:
            return max(stream, self.array.rows)
        return 2 * self.array.rows + self.array.columns + stream - 2

    @property
    def cycles(self) -> int:
        """From the first number that is read to the last that is written."""
        rows, columns = self.array.rows, self.array.columns
        last = 2 * rows + columns + self.sizes[2] - 2
        return (self.folds - 1) * self.period + last

    @property
    def macs(self) -> int:
        """Products with a sum."""
        return self.m * self.k * self.n

    @property
    def utilisation(self) -> float:
        """The share of cells × cycles in which a product is made."""
        return self.macs / (self.array.cells * self.cycles)

    @property
    def mapping(self) -> float:
        """The share of cells that hold something, over the folds: what edges leave."""
        down, across, _ = self.sizes
        return down * across / (self.folds * self.array.cells)

    @property
    def reads_x(self) -> int:
        """Numbers of X that are read, each as often as it is."""
        times = 1 if self.array.dataflow == "input" else self.folds_across
        return self.m * self.k * times

    @property
    def reads_w(self) -> int:
        """Numbers of W that are read."""
        times = {
            "weight": 1,
            "output": self.folds_down,
            "input": self.folds_across,
        }[self.array.dataflow]
        return self.k * self.n * times

    @property
    def writes_y(self) -> int:
        """Numbers that leave: with a block that stays, each fold has partial sums."""
        times = 1 if self.array.dataflow == "output" else self.folds_down
        return self.m * self.n * times

    @property
    def reads_y(self) -> int:
        """Partial sums that are read again, so that the next fold is added."""
        return self.writes_y - self.m * self.n

    @cached_property
    def demands(self) -> Demands:
        """What is read and written in each cycle, without stepping through them."""
        if self.array.dataflow == "output":
            return _output_demands(self)
        return _held_demands(self)

    @cached_property
    def busy(self) -> Int[np.ndarray, "cycles"]:
        """For each cycle the cells that make a product."""
        down, across, stream = self.sizes
        rows, columns = self.array.rows, self.array.columns
        fill = 0 if self.array.dataflow == "output" else rows
        out = np.zeros(self.cycles, dtype=np.int64)
        kinds: dict[tuple[int, int], np.ndarray] = {}
        for f in range(self.folds):
            used_rows = min(rows, down - f % self.folds_down * rows)
            used_columns = min(columns, across - f // self.folds_down * columns)
            kind = (used_rows, used_columns)
            if kind not in kinds:
                # Cell (r, c) works in the cycles r + c, …, r + c + stream − 1.
                diagonals = np.convolve(np.ones(kind[0]), np.ones(kind[1]))
                wave = np.convolve(diagonals, np.ones(stream))
                kinds[kind] = np.rint(wave).astype(np.int64)
            start = f * self.period + fill
            out[start : start + len(kinds[kind])] += kinds[kind]
        return out


@dataclass(frozen=True)
class Demands:
    """Addresses by cycle and port; `NOTHING` where a port is idle.

    An address is the place in the matrix, row by row: m K + k in X, k N + n in W,
    m N + n in Y.
    """

    x: Int[np.ndarray, "cycles ports"]
    w: Int[np.ndarray, "cycles ports"]
    y: Int[np.ndarray, "cycles ports"]

    def counts(self) -> tuple[int, int, int]:
        """Numbers of X and W that are read and of Y that are written."""
        x, w, y = (int(np.sum(each != NOTHING)) for each in (self.x, self.w, self.y))
        return x, w, y


def _addresses(
    row: Int[np.ndarray, "*shape"],
    column: Int[np.ndarray, "*shape"],
    rows: int,
    columns: int,
    valid: Bool[np.ndarray, "*shape"],
    turned: bool = False,
) -> Int[np.ndarray, "*shape"]:
    """Places in a matrix of rows × columns, NOTHING outside of it.

    `turned`: the matrix is stored as its transpose.
    """
    inside = valid & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    place = column * rows + row if turned else row * columns + column
    return np.where(inside, place, NOTHING)


def _held_demands(run: Run) -> Demands:
    """A block stays in the cells; `stream` lines pass it."""
    down, across, stream = run.sizes
    rows, columns = run.array.rows, run.array.columns
    turned = run.array.dataflow == "input"
    t = np.arange(run.cycles)[:, None]
    r, c = np.arange(rows)[None], np.arange(columns)[None]

    def fold(time: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(cycles since the fold began, its first row, its first column)."""
        f = time // run.period
        first_row = f % run.folds_down * rows
        first_column = f // run.folds_down * columns
        return time - f * run.period, first_row, first_column

    # Line s of the stream enters row r when the block is there, r cycles later.
    s, first, _ = fold(t - rows - r)
    here = (t - rows - r >= 0) & (t - rows - r < run.folds * run.period)
    streamed = _addresses(s, first + r, stream, down, here & (s < stream), turned)
    # It leaves column c below the last row.
    s, _, first = fold(t - (2 * rows - 1) - c)
    here = (t - (2 * rows - 1) - c >= 0) & (s < stream)
    left = _addresses(s, first + c, stream, across, here, turned)
    if run.array.double:
        # A block is sent when the one before begins to work, the first row first.
        since, first_row, first_column = fold(t - c + run.period - rows)
        row = np.where(t - c < rows, t - c, since)
        begins = t - c < rows  # the first block, which has none before it
        first_row, first_column = (
            np.where(begins, 0, each) for each in (first_row, first_column)
        )
        here = (t - c >= 0) & (row < rows)
    else:
        # Shifted in from above: the last row comes first; all columns at once.
        since, first_row, first_column = fold(t + 0 * c)
        row, here = rows - 1 - since, since < rows
    held = _addresses(first_row + row, first_column + c, down, across, here, turned)
    if turned:
        return Demands(held, streamed, left)
    return Demands(streamed, held, left)


def _output_demands(run: Run) -> Demands:
    """A block of Y stays; X comes from the left, W from above, and Y leaves below."""
    rows, columns = run.array.rows, run.array.columns
    t = np.arange(run.cycles)[:, None]
    r, c = np.arange(rows)[None], np.arange(columns)[None]
    f, since = t // run.period, t % run.period
    first_row = f % run.folds_down * rows
    first_column = f // run.folds_down * columns

    k = since - r
    x = _addresses(first_row + r, k, run.m, run.k, k >= 0)
    k = since - c
    w = _addresses(k, first_column + c, run.k, run.n, k >= 0)
    # Column c is shifted down as soon as its lowest cell has finished.
    row = rows - 1 - (since - (rows + run.k - 1 + c))
    here = (row >= 0) & (row < rows)
    y = _addresses(first_row + row, first_column + c, run.m, run.n, here)
    return Demands(x, w, y)
