"""The matrix product by schedule alone: the steps from three loops to a fast one.

    naive           i, j, k, as the expression says
    rows            k before j: a row of B is read in order, and so is a row of C
    vectors         16 numbers of the row at once
    registers       a block of C stays in registers while k runs
    packed          what a block reads of B is copied side by side, once

Each is a list of primitives for `with_tvm.scheduled`. The block is ROWS × COLUMNS: 4 ×
16 fits the registers of every CPU with vectors of 4 to 16 floats.
"""

from __future__ import annotations

from llmlab.compilers.tvm.expressions import (
    Tensor,
    compute,
    placeholder,
    reduce_axis,
    sum_over,
)
from llmlab.compilers.tvm.loops import Primitive

ROWS, COLUMNS = 4, 16


def matmul(M: int, N: int, K: int) -> Tensor:
    """C[i, j] = Σ_k A[i, k] B[k, j]."""
    A = placeholder("A", (M, K))
    B = placeholder("B", (K, N))
    k = reduce_axis("k", K)
    return compute("C", (M, N), lambda i, j: sum_over(A[i, k] * B[k, j], k))


def rows() -> list[Primitive]:
    """k before j."""
    return [("reorder", "C", ("i", "k", "j")), ("decompose_reduction", "C", "k")]


def vectors(width: int = COLUMNS) -> list[Primitive]:
    """The same, so many numbers of a row at once."""
    return [
        ("split", "C", "j", (None, width)),
        ("reorder", "C", ("i", "k", "j_0", "j_1")),
        ("vectorize", "C", "j_1"),
        ("decompose_reduction", "C", "k"),
    ]


def registers(
    rows: int = ROWS,
    columns: int = COLUMNS,
    steps: int = 1,
    packed: bool = False,
    by_columns: bool = True,
    block: str = "C",
    loops: tuple[str, str, str] = ("i", "j", "k"),
    writer: str | None = None,
) -> list[Primitive]:
    """A block of the result in registers.

    Args:
        steps: how many steps of k are written out.
        packed: whether B is copied into panels of `columns`.
        by_columns: whether blocks below each other come next, or those beside.
        block: the name of the product.
        loops: its three.
        writer: an operation that is to be done with each block while it is in
            registers. Without one, the block is written as it is.
    """
    i, j, k = loops
    outer = (f"{j}_0", f"{i}_0") if by_columns else (f"{i}_0", f"{j}_0")
    found: list[Primitive] = [("pack", block, 1, columns)] if packed else []
    if writer is None:
        found.append(("cache_write", block, "local"))
        writer = f"{block}_local"
    found += [
        ("split", block, i, (None, rows)),
        ("split", block, j, (None, columns)),
        ("split", block, k, (None, steps)),
        ("reorder", block, (*outer, f"{k}_0", f"{k}_1", f"{i}_1", f"{j}_1")),
        ("reverse_compute_at", writer, block, outer[1]),
        ("unroll", block, f"{k}_1"),
        ("unroll", block, f"{i}_1"),
    ]
    if columns > 1:
        # TVM leaves out loops of one iteration
        inner = "ax1" if rows > 1 else "ax0"
        found += [("vectorize", block, f"{j}_1"), ("vectorize", writer, inner)]
    if packed:
        found += [
            ("split", "B_global", "ax1", (None, columns)),
            ("reorder", "B_global", ("ax1_0", "ax0", "ax1_1")),
            ("vectorize", "B_global", "ax1_1"),
        ]
    return [*found, ("decompose_reduction", block, f"{k}_0")]


STEPS: dict[str, list[Primitive]] = {
    "naive": [],
    "rows": rows(),
    "vectors": vectors(),
    "registers": registers(),
    "packed": registers(packed=True),
}
