"""Fractals: how a matrix lies in an Ascend's memory.

The cube takes 16 × 16 numbers at once, so these lie together: a matrix is cut into
*fractals*, and two letters say in which order they lie, and their numbers within. The
letter drawn row by row is Z, column by column N; the first is of the fractals.

    M, N       rows and columns        m₀, n₀     rows and columns of a fractal
    M₁, N₁     ⌈M/m₀⌉, ⌈N/n₀⌉          i, j       row and column of a number

    NZ   (N₁, M₁, m₀, n₀)   offset  ((j÷n₀) M₁ + i÷m₀) m₀ n₀ + (i mod m₀) n₀ + j mod n₀
    ZZ   (M₁, N₁, m₀, n₀)   as L0A wants A
    ZN   (M₁, N₁, n₀, m₀)   as L0B wants B
         and L0C gives C in NZ

A fractal has 16 rows of 32 bytes: n₀ is 16 for numbers of 16 bits, and 32 for 8 bits.
What is missing at the edges is filled with zeros. "Data layout formats" and
"TransdataOperation" in the documentation of CANN.
"""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor

# name → where (M₁, m₀, N₁, n₀) go
ORDERS = {"NZ": (2, 0, 1, 3), "ZZ": (0, 2, 1, 3), "ZN": (0, 2, 3, 1)}


def _fractal(rows: int, columns: int) -> None:
    for name, value in (("rows", rows), ("columns", columns)):
        if value < 1:
            raise ValueError(f"{name}={value} of a fractal must be at least 1")


def _order(layout: str) -> tuple[int, ...]:
    if layout not in ORDERS:
        raise ValueError(f"layout={layout!r} must be one of {', '.join(ORDERS)}")
    return ORDERS[layout]


def to_fractals(
    x: Shaped[Tensor, "*batch M N"], layout: str = "NZ", rows: int = 16, cols: int = 16
) -> Shaped[Tensor, "*batch _ _ _ _"]:
    """The matrix in fractals of (rows, cols), filled with zeros at its edges.

    Raises:
        ValueError: the layout is unknown, or a fractal has no rows or columns.
    """
    order = _order(layout)
    _fractal(rows, cols)
    *batch, height, width = x.shape
    padded = torch.nn.functional.pad(x, (0, -width % cols, 0, -height % rows))
    # (…, M, N) → (…, M₁, m₀, N₁, n₀)
    cut = padded.reshape(
        *batch, padded.shape[-2] // rows, rows, padded.shape[-1] // cols, cols
    )
    first = len(batch)
    places = [*range(first), *(first + place for place in order)]
    return cut.permute(places).contiguous()


def from_fractals(
    x: Shaped[Tensor, "*batch _ _ _ _"], height: int, width: int, layout: str = "NZ"
) -> Shaped[Tensor, "*batch M N"]:
    """The matrix again, without what was filled in.

    Raises:
        ValueError: the fractals do not hold a matrix of that size.
    """
    order = _order(layout)
    first = x.ndim - 4
    back = [order.index(place) for place in range(4)]
    cut = x.permute(*range(first), *(first + place for place in back))
    tall, rows, wide, cols = cut.shape[first:]
    for name, size, count, part in (
        ("height", height, tall, rows),
        ("width", width, wide, cols),
    ):
        if not (count - 1) * part < size <= count * part:
            raise ValueError(
                f"{name}={size} does not take {count} fractals of {part}: it must be"
                f" above {(count - 1) * part} and at most {count * part}"
            )
    # (…, M₁, m₀, N₁, n₀) → (…, M, N)
    whole = cut.reshape(*x.shape[:first], tall * rows, wide * cols)
    return whole[..., :height, :width].contiguous()


def nz_offset(row: int, col: int, height: int, rows: int = 16, cols: int = 16) -> int:
    """Where the number of a row and a column lies in NZ, in a matrix of that height."""
    _fractal(rows, cols)
    if not 0 <= row < height or col < 0:
        raise ValueError(f"row={row}, col={col} is outside of {height} rows")
    tall = -(-height // rows)
    fractal = (col // cols) * tall + row // rows
    return fractal * rows * cols + (row % rows) * cols + col % cols


def cube_product(
    a: Shaped[Tensor, "M1 K1 m0 k0"], b: Shaped[Tensor, "K1 N1 n0 k0"]
) -> Shaped[Tensor, "N1 M1 m0 n0"]:
    """A in ZZ times B in ZN, fractal by fractal as the cube takes them: C in NZ.

    Raises:
        ValueError: A has not as many fractals along k as B, or not as wide ones.
    """
    if a.shape[1] != b.shape[0] or a.shape[3] != b.shape[3]:
        raise ValueError(
            f"a {tuple(a.shape)} and b {tuple(b.shape)} do not meet along k: a is (M₁,"
            " K₁, m₀, k₀) and b (K₁, N₁, n₀, k₀)"
        )
    tall, deep, m0, _ = a.shape
    wide, n0 = b.shape[1:3]
    c = torch.zeros(wide, tall, m0, n0, dtype=a.dtype)
    for i in range(tall):
        for j in range(wide):
            for k in range(deep):  # one step of the cube
                c[j, i] += a[i, k] @ b[k, j].T
    return c
