"""The array, register by register: numbers move from cell to cell, cycle after cycle.

Nothing here knows a formula for cycles: a run is over when the last result has left.

    x        what a cell has from its left neighbour (output: and w from above)
    sum      a partial sum on its way down; output: the sum that stays
    weight   what the cell multiplies with
    next     the second register: the weight of the next block ("double")
    passing  a weight on its way down to the row that it is for ("double")

An empty register holds None. A cell in which both factors are there works in this
cycle. `input` is `weight` with both matrices turned: Y^T = W^T X^T.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from llmlab.chips.tpu.array import Array

Grid = list[list[int | None]]


@dataclass
class Cycle:
    """The registers at the end of a cycle, and what went in and out in it.

    Attributes:
        read_x, read_w: (row, column) of the numbers that were read.
        left: (row, column, value) of results, or partial sums, that left below.
    """

    number: int
    x: Grid
    weight: Grid
    sum: Grid
    next: Grid
    works: set[tuple[int, int]]
    read_x: list[tuple[int, int]] = field(default_factory=list)
    read_w: list[tuple[int, int]] = field(default_factory=list)
    left: list[tuple[int, int, int]] = field(default_factory=list)


def empty(array: Array) -> Grid:
    """Registers with nothing in them."""
    return [[None] * array.columns for _ in range(array.rows)]


def copied(grid: Grid) -> Grid:
    """The registers as they are now."""
    return [list(row) for row in grid]


def cycles(
    array: Array, x: Int[np.ndarray, "m k"], w: Int[np.ndarray, "k n"]
) -> Iterator[Cycle]:
    """All cycles of Y = X W on the array.

    Raises:
        ValueError: the shapes do not fit, a matrix is empty, or not of whole numbers.
    """
    for name, matrix in (("x", x), ("w", w)):
        if matrix.ndim != 2 or not matrix.size:
            raise ValueError(f"{name} of shape {matrix.shape} must be a matrix")
        if not np.issubdtype(matrix.dtype, np.integer):
            raise ValueError(f"{name} of {matrix.dtype} must hold whole numbers")
    if x.shape[1] != w.shape[0]:
        raise ValueError(f"x {x.shape} and w {w.shape}: columns of x are rows of w")
    if array.dataflow == "output":
        yield from _outputs_stay(array, x, w)
    elif array.dataflow == "weight":
        yield from _weights_stay(array, x, w)
    else:
        for each in _weights_stay(array, w.T, x.T):
            each.read_x, each.read_w = (
                [(j, i) for i, j in each.read_w],
                [(j, i) for i, j in each.read_x],
            )
            each.left = [(j, i, value) for i, j, value in each.left]
            yield each


def product(
    array: Array, x: Int[np.ndarray, "m k"], w: Int[np.ndarray, "k n"]
) -> tuple[Int[np.ndarray, "m n"], int]:
    """(Y, cycles): what has left the array below, added up, and how long it took."""
    y = np.zeros((x.shape[0], w.shape[1]), dtype=np.int64)
    count = 0
    for each in cycles(array, x, w):
        count += 1
        for m, n, value in each.left:
            y[m, n] += value
    return y, count


def _folds(array: Array, down: int, across: int) -> list[tuple[int, int]]:
    """(first row, first column) of each block, the rows running faster."""
    return [
        (first_row, first_column)
        for first_column in range(0, across, array.columns)
        for first_row in range(0, down, array.rows)
    ]


class _Held:
    """An array in which weights stay; one call of `step` is one cycle."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.x = empty(array)
        self.first = [[False] * array.columns for _ in range(array.rows)]
        self.sum = empty(array)
        self.weight = empty(array)
        self.next = empty(array)
        # (weight, the row that it is for)
        self.passing: list = [[None] * array.columns for _ in range(array.rows)]

    def shift_weights(self, above: list[int | None]) -> None:
        """All weights go down by one row."""
        self.weight = [above, *self.weight[:-1]]

    def pass_weights(self, above: list) -> None:
        """Weights on their way go down, and stay in `next` of their row."""
        self.passing = [above, *self.passing[:-1]]
        for r, row in enumerate(self.passing):
            for c, moving in enumerate(row):
                if moving is not None and moving[1] == r:
                    self.next[r][c] = moving[0]
                    row[c] = None

    def step(
        self, left: list[int | None], first: list[bool]
    ) -> tuple[list[int | None], set[tuple[int, int]]]:
        """(sums that leave below, cells that work).

        Args:
            left: what enters each row.
            first: whether it belongs to the first line of a block; such a line makes
                each cell that it reaches take its next weight.
        """
        rows, columns = self.array.rows, self.array.columns
        self.x = [[left[r], *self.x[r][:-1]] for r in range(rows)]
        self.first = [[first[r], *self.first[r][:-1]] for r in range(rows)]
        sums = empty(self.array)
        works = set()
        for r in range(rows):
            for c in range(columns):
                if self.first[r][c]:
                    self.weight[r][c] = self.next[r][c]
                    self.next[r][c] = None
                here = self.x[r][c]
                # A sum begins in the first row, and is handed down from there.
                total = self.sum[r - 1][c] if r else (None if here is None else 0)
                if here is not None and self.weight[r][c] is not None:
                    total += here * self.weight[r][c]
                    works.add((r, c))
                sums[r][c] = total
        self.sum = sums
        return sums[-1], works

    def cycle(
        self, number: int, works: set[tuple[int, int]], read_x: list, read_w: list
    ) -> Cycle:
        """The registers as they are now; nothing has left yet."""
        grids = (self.x, self.weight, self.sum, self.next)
        return Cycle(number, *map(copied, grids), works, read_x, read_w)


def _weights_stay(array: Array, x: np.ndarray, w: np.ndarray) -> Iterator[Cycle]:
    run = _double_buffered if array.double else _one_after_the_other
    yield from run(array, x, w)


def _one_after_the_other(array: Array, x: np.ndarray, w: np.ndarray) -> Iterator[Cycle]:
    """Fill the block, stream all lines, wait until the last has left; next block."""
    (lines, down), across = x.shape, w.shape[1]
    rows, columns = array.rows, array.columns
    number = 0
    for first_row, first_column in _folds(array, down, across):
        held = _Held(array)
        for load in range(rows):
            k = first_row + rows - 1 - load  # the last row comes first
            ns = range(first_column, min(first_column + columns, across))
            read = [(k, n) for n in ns] if k < down else []
            above = [int(w[place]) for place in read]
            held.shift_weights(above + [None] * (columns - len(above)))
            yield held.cycle(number, set(), [], read)
            number += 1
        line = [0] * columns  # of each column, the results that have left
        since = 0
        while line[-1] < lines:
            read = []
            left: list[int | None] = [None] * rows
            for r in range(min(rows, down - first_row)):
                if 0 <= since - r < lines:  # row r starts r cycles later
                    read.append((since - r, first_row + r))
                    left[r] = int(x[read[-1]])
            below, works = held.step(left, [False] * rows)
            now = held.cycle(number, works, read, [])
            for c, value in enumerate(below):
                if value is not None:
                    if first_column + c < across:
                        now.left.append((line[c], first_column + c, value))
                    line[c] += 1
            yield now
            number += 1
            since += 1


def _double_buffered(array: Array, x: np.ndarray, w: np.ndarray) -> Iterator[Cycle]:
    """The next block comes in, a row per cycle, while lines pass this one.

    A block is sent from the moment at which the block before it begins to work. It
    begins to work when all its rows are sent and the block before has had all lines.
    """
    (lines, down), across = x.shape, w.shape[1]
    rows, columns = array.rows, array.columns
    folds = _folds(array, down, across)
    held = _Held(array)
    # cycle → the row of weights that is sent in it, counted through all folds
    sent: dict[int, int] = {}
    begun: list[int] = []  # when each fold begins to work
    line = [0] * columns
    number = 0
    while line[-1] < lines * len(folds):
        complete = len(sent) // rows
        free = not begun or number - begun[-1] >= lines
        if free and complete > len(begun):
            begun.append(number)
        if complete < len(folds) and complete <= len(begun):
            sent[number] = len(sent)
        read_w, above = [], [None] * columns
        for c in range(columns):
            # Column c gets each row c cycles later.
            if number - c in sent:
                f, r = divmod(sent[number - c], rows)
                place = (folds[f][0] + r, folds[f][1] + c)
                if place[0] < down and place[1] < across:
                    read_w.append(place)
                    above[c] = (int(w[place]), r)
        read, left, first = [], [None] * rows, [False] * rows
        for f, start in enumerate(begun):
            for r in range(min(rows, down - folds[f][0])):
                m = number - start - r
                if 0 <= m < lines:
                    read.append((m, folds[f][0] + r))
                    left[r], first[r] = int(x[read[-1]]), m == 0
        below, works = held.step(left, first)
        held.pass_weights(above)
        now = held.cycle(number, works, read, read_w)
        for c, value in enumerate(below):
            if value is not None:
                f, m = divmod(line[c], lines)
                if folds[f][1] + c < across:
                    now.left.append((m, folds[f][1] + c, value))
                line[c] += 1
        yield now
        number += 1


def _outputs_stay(array: Array, x: np.ndarray, w: np.ndarray) -> Iterator[Cycle]:
    """X comes from the left and W from above; the sums stay, and leave at the end."""
    (m, depth), n = x.shape, w.shape[1]
    rows, columns = array.rows, array.columns
    number = 0
    for first_row, first_column in _folds(array, m, n):
        xs, ws, sums = empty(array), empty(array), empty(array)
        to_leave = [rows] * columns
        since = 0
        while any(to_leave):
            read_x, read_w, works, out = [], [], set(), []
            left, above = [None] * rows, [None] * columns
            for r in range(rows):
                if 0 <= since - r < depth and first_row + r < m:
                    read_x.append((first_row + r, since - r))
                    left[r] = int(x[read_x[-1]])
            for c in range(columns):
                if 0 <= since - c < depth and first_column + c < n:
                    read_w.append((since - c, first_column + c))
                    above[c] = int(w[read_w[-1]])
            for c in range(columns):
                # The lowest cell is the last of its column to finish.
                if since > rows - 1 + c + depth - 1 and to_leave[c]:
                    value = sums[-1][c]
                    to_leave[c] -= 1
                    if value is not None:
                        out.append((first_row + to_leave[c], first_column + c, value))
                    for r in reversed(range(rows)):
                        sums[r][c] = sums[r - 1][c] if r else None
            xs = [[left[r], *xs[r][:-1]] for r in range(rows)]
            ws = [above, *ws[:-1]]
            for r in range(rows):
                for c in range(columns):
                    if xs[r][c] is not None and ws[r][c] is not None:
                        sums[r][c] = (sums[r][c] or 0) + xs[r][c] * ws[r][c]
                        works.add((r, c))
            state = (copied(xs), copied(ws), copied(sums))
            yield Cycle(number, *state, empty(array), works, read_x, read_w, out)
            number += 1
            since += 1
