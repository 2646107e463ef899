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
from jaxtyping import Int

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
        is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not is_whole or value < 1:
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


def _padded(places: Int[np.ndarray, "a b"], rows: int, columns: int) -> np.ndarray:
    """Cut into blocks of rows × columns: (folds across, folds down, rows, columns)."""
    a, b = places.shape
    down, across = -(-a // rows), -(-b // columns)
    full = np.full((down * rows, across * columns), NOTHING, dtype=np.int32)
    full[:a, :b] = places
    blocks = full.reshape(down, rows, across, columns)
    return blocks.transpose(2, 0, 1, 3)


def _places(rows: int, columns: int) -> Int[np.ndarray, "rows columns"]:
    return np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)


def _laid(
    cycles: int,
    blocks: Int[np.ndarray, "across down lines ports"],
    start: int,
    period: int,
    skew: int = 1,
) -> Int[np.ndarray, "cycles ports"]:
    """Line s of fold f comes to port p in cycle start + f period + s + skew p.

    A skew is a stride: in a table of cycles × ports, one port further and one cycle
    later is ports + 1 numbers further. So all folds are written at once.
    """
    ports = blocks.shape[-1]
    out = np.full((cycles, ports), NOTHING, dtype=np.int32)
    number = out.itemsize
    fold = period * ports * number
    diagonal = np.ndarray(
        shape=blocks.shape,
        dtype=out.dtype,
        buffer=out,
        offset=start * ports * number,
        strides=(
            blocks.shape[1] * fold,
            fold,
            ports * number,
            (skew * ports + 1) * number,
        ),
    )
    diagonal[...] = blocks
    return out


def _held_demands(run: Run) -> Demands:
    """A block stays in the cells; lines pass it."""
    rows, columns = run.array.rows, run.array.columns
    stream = run.sizes[2]
    if run.array.dataflow == "weight":
        streamed, held = _places(run.m, run.k), _places(run.k, run.n)
        left = _places(run.m, run.n)
    else:
        streamed, held = _places(run.k, run.n).T, _places(run.m, run.k).T
        left = _places(run.m, run.n).T
    blocks = _padded(held, rows, columns)
    # Each block of columns of `streamed` passes as often as there are folds across, and
    # each of `left` comes once for every fold down.
    lines = _padded(streamed, stream, rows).transpose(1, 0, 2, 3)
    lines = np.broadcast_to(lines, (run.folds_across, *lines.shape[1:]))
    results = _padded(left, stream, columns)
    results = np.broadcast_to(results, (*blocks.shape[:2], *results.shape[2:]))

    total, period = run.cycles, run.period
    reads = _laid(total, lines, rows, period)
    writes = _laid(total, results, 2 * rows - 1, period)
    if run.array.double:
        loads = _double_loads(run, blocks)
    else:
        # Shifted in from above: the last row comes first, all columns at once.
        loads = _laid(total, blocks[:, :, ::-1], 0, period, skew=0)
    if run.array.dataflow == "weight":
        return Demands(reads, loads, writes)
    return Demands(loads, reads, writes)


def _double_loads(
    run: Run, blocks: Int[np.ndarray, "across down rows columns"]
) -> Int[np.ndarray, "cycles columns"]:
    """A block is sent when the one before begins to work; its first row comes first."""
    rows, columns = blocks.shape[2:]
    flat = blocks.reshape(1, -1, rows, columns)
    first = _laid(run.cycles, flat[:, :1], 0, run.period)
    others = flat[:, 1:]
    if others.shape[1]:
        later = _laid(run.cycles, others, rows, run.period)
        return np.maximum(first, later)
    return first


def _output_demands(run: Run) -> Demands:
    """A block of Y stays; X comes from the left, W from above, and Y leaves below."""
    rows, columns, k = run.array.rows, run.array.columns, run.k
    folds = (run.folds_across, run.folds_down)
    x = _padded(_places(run.m, k).T, k, rows).transpose(1, 0, 2, 3)
    w = _padded(_places(k, run.n), k, columns)
    y = _padded(_places(run.m, run.n), rows, columns)
    x = np.broadcast_to(x, (*folds, k, rows))
    w = np.broadcast_to(w, (*folds, k, columns))
    total, period = run.cycles, run.period
    return Demands(
        x=_laid(total, x, 0, period),
        w=_laid(total, w, 0, period),
        # A column is shifted down as soon as its lowest cell has finished.
        y=_laid(total, y[:, :, ::-1], rows + k - 1, period),
    )
