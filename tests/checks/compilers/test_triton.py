"""Wrong answers to 08-compilers/06-triton, each with its diagnosis."""

from __future__ import annotations

from llmlab.checks.compilers import triton as checks
from llmlab.checks.compilers.triton import check
from llmlab.compilers.triton_kernels import Linear, tl
from tests.checks.rejecting import (
    ByCases,
    Wrong,
    accepts,
    all_foreseen,
    kept_apart,
    rejects,
)

SLUG = "08-compilers/06-triton"

# Right, written otherwise ------------------------------------------------------------


def bias_by_rows(x_ptr, b_ptr, y_ptr, T, d, stride, ROWS, COLS):
    """A row of the block after the other."""
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    b = tl.load(b_ptr + col, mask=col < d, other=0.0)
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i
        on = (col < d) & (row < T)
        x = tl.load(x_ptr + (row * stride + col), mask=on, other=0.0)
        tl.store(y_ptr + row * d + col, b + x, on)


def bias_with_base(x_ptr, b_ptr, y_ptr, T, d, stride, ROWS, COLS):
    """The block's own corner first, then places in it."""
    r0, c0 = tl.program_id(0) * ROWS, tl.program_id(1) * COLS
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    mask = (r < T - r0) & (c < d - c0)
    x = tl.load(x_ptr + r0 * stride + c0 + r * stride + c, mask)
    b = tl.load(b_ptr + c0 + c + 0 * r, mask, other=1e9)
    tl.store(y_ptr + (r0 + r) * d + c0 + c, x + b, mask)


def softmax_by_two(x_ptr, y_ptr, d, stride, COLS):
    """With powers of 2, and divided by multiplying."""
    col = tl.arange(0, COLS)
    on = col < d
    x = tl.load(x_ptr + tl.program_id(0) * stride + col, mask=on, other=-1e30)
    e = tl.exp(x - tl.max(x))
    share = 1 / tl.sum(e)
    tl.store(y_ptr + tl.program_id(0) * d + col, e * share, on)


def softmax_with_where(x_ptr, y_ptr, d, stride, COLS):
    row, col = tl.program_id(0), tl.arange(0, COLS)
    x = tl.load(x_ptr + row * stride + col, col < d, 0.0)
    top = tl.max(tl.where(col < d, x, float("-inf")), 0)
    e = tl.where(col < d, tl.exp(x - top), 0.0)
    tl.store(y_ptr + row * d + col, e / tl.sum(e, 0), col < d)


def softmax_by_logarithm(x_ptr, y_ptr, d, stride, COLS):
    """e to the power of x less the logarithm of the sum."""
    row, col = tl.program_id(0), tl.arange(0, COLS)
    x = tl.load(x_ptr + row * stride + col, col < d, float("-inf"))
    top = tl.max(x, 0)
    all_in = top + tl.log(tl.sum(tl.exp(x - top), 0))
    tl.store(y_ptr + row * d + col, tl.exp(x - all_in), col < d)


def grouped_by_list(pid, down, across, group):
    tiles = [
        (i, j)
        for first in range(0, down, group)
        for j in range(across)
        for i in range(first, min(first + group, down))
    ]
    return tiles[pid]


def grouped_by_counting(pid, down, across, group):
    first = 0
    while pid >= min(group, down - first) * across:
        pid -= group * across
        first += group
    j, i = divmod(pid, min(group, down - first))
    return [first + i, j]


def owners_by_matrix(register, lane, warp, row, col):
    bases = (register, lane, warp)
    rows = 1 << max(b[0] for part in bases for b in part).bit_length()
    cols = 1 << max(b[1] for part in bases for b in part).bit_length()
    return Linear((rows, cols), *bases).owners((row, col))


def owners_by_growing(register, lane, warp, row, col):
    held = {(0, 0, 0): (0, 0)}
    for part, bases in enumerate((register, lane, warp)):
        for bit, (a, b) in enumerate(bases):
            for place, (r, c) in list(held.items()):
                new = [*place]
                new[part] |= 1 << bit
                held[tuple(new)] = (r ^ a, c ^ b)
    return {place for place, element in held.items() if element == (row, col)}


RIGHT = {
    "add_bias": (bias_by_rows, bias_with_base),
    "softmax_row": (softmax_by_two, softmax_with_where, softmax_by_logarithm),
    "grouped": (grouped_by_list, grouped_by_counting),
    "owners": (owners_by_matrix, owners_by_growing),
}


test_right_answers_written_otherwise = accepts(check, RIGHT)


# Wrong --------------------------------------------------------------------------------

KINDS = {
    "add_bias": ByCases(
        checks.run_sum, checks.bias_kernel, checks.wrong_sums, checks.SUMS
    ),
    "softmax_row": ByCases(
        checks.run_softmax,
        checks.softmax_kernel,
        checks.wrong_softmaxes,
        checks.SOFTMAXES,
    ),
    "grouped": ByCases(
        checks.run_order,
        checks.tile_of,
        checks.wrong_orders,
        checks.ORDERS,
    ),
    "owners": ByCases(
        checks.run_owners,
        checks.holders,
        checks.wrong_owners,
        checks.layout_cases(),
    ),
}


test_no_two_mistakes_come_to_the_same = kept_apart(KINDS)


def bias_kernel_with(row="", col="", x="", b="", y="", mask=""):
    """`add_bias` with one of its expressions replaced."""
    source = f"""
def kernel(x_ptr, b_ptr, y_ptr, T, d, stride, ROWS, COLS):
    row = {row or "tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]"}
    col = {col or "tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]"}
    there = {mask or "(row < T) & (col < d)"}
    x = {x or "tl.load(x_ptr + row * stride + col, mask=there)"}
    b = {b or "tl.load(b_ptr + col, mask=col < d)"}
    {y or "tl.store(y_ptr + row * d + col, x + b, mask=there)"}
"""
    names = {"tl": tl}
    exec(source, names)
    return names["kernel"]


def softmax_with(x="", e="", y=""):
    """`softmax_row` with one of its expressions replaced."""
    source = f"""
def kernel(x_ptr, y_ptr, d, stride, COLS):
    row, col = tl.program_id(0), tl.arange(0, COLS)
    inf = float("inf")
    x = {x or "tl.load(x_ptr + row * stride + col, mask=col < d, other=-inf)"}
    e = {e or "tl.exp(x - tl.max(x, axis=0))"}
    {y or "tl.store(y_ptr + row * d + col, e / tl.sum(e, axis=0), mask=col < d)"}
"""
    names = {"tl": tl}
    exec(source, names)
    return names["kernel"]


TWICE = "tl.load(x_ptr + row * stride + col, mask=col < d, other=-inf)"


def returns_a_tensor(x_ptr, y_ptr, d, stride, COLS):
    return tl.load(x_ptr + tl.arange(0, COLS), mask=tl.arange(0, COLS) < d)


def with_a_slash(pid, down, across, group):
    i, j = checks.tile_of(pid, down, across, group)
    return i / 1, j


def a_number(pid, down, across, group):
    i, j = checks.tile_of(pid, down, across, group)
    return i * across + j


def a_generator(register, lane, warp, row, col):
    return iter(checks.holders(register, lane, warp, row, col))


def threads_only(register, lane, warp, row, col):
    return [place[1:] for place in checks.holders(register, lane, warp, row, col)]


test_wrong_answers = rejects(
    SLUG,
    [
        *all_foreseen(KINDS),
        Wrong(
            "add_bias",
            bias_kernel_with(x="tl.load(x_ptr + row * d + col, mask=there)"),
            "which lies between the rows of x",
        ),
        Wrong(
            "add_bias",
            bias_kernel_with(x="tl.load(x_ptr + row * stride + col)"),
            "reads x[",
        ),
        Wrong("add_bias", bias_kernel_with(b="tl.load(b_ptr + col)"), "reads b[13]"),
        Wrong("add_bias", bias_kernel_with(mask="col < d"), "reads x["),
        Wrong("add_bias", bias_kernel_with(mask="row < T"), "between the rows of x"),
        Wrong(
            "add_bias",
            bias_kernel_with(y="tl.store(y_ptr + row * stride + col, x + b, there)"),
            "stores y[",
        ),
        Wrong(
            "add_bias",
            bias_kernel_with(row="tl.arange(0, ROWS)[:, None]"),
            "too: programs run in no order",
        ),
        Wrong(
            "add_bias",
            bias_kernel_with(
                row="tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]",
                col="tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]",
            ),
            "tl.program_id(0) counts blocks of rows",
        ),
        Wrong(
            "add_bias",
            bias_kernel_with(mask="(row < T - 1) & (col < d)"),
            "was never stored to",
        ),
        Wrong(
            "add_bias",
            bias_kernel_with(y="tl.store(y_ptr + row * d + col, x + b)"),
            "stores y[",
        ),
        Wrong("add_bias", bias_kernel_with(y="return x + b"), "was never stored to"),
        Wrong(
            "softmax_row",
            softmax_with(y="tl.store(y_ptr + row * d + col, e / tl.sum(e, axis=0))"),
            "too: programs run in no order",
        ),
        Wrong(
            "softmax_row",
            softmax_with(x="tl.load(x_ptr + row * d + col, col < d, -inf)"),
            "between the rows of x",
        ),
        Wrong(
            "softmax_row",
            softmax_with(e=f"tl.exp(x - tl.max({TWICE}, axis=0))"),
            "x was loaded 2 times",
        ),
        Wrong(
            "softmax_row",
            softmax_with(y="tl.store(y_ptr + col, e / tl.sum(e), mask=col < d)"),
            "too: programs run in no order",
        ),
        Wrong("softmax_row", returns_a_tensor, "were never stored to"),
        Wrong("grouped", with_a_slash, "are whole numbers, so divide by //"),
        Wrong("grouped", a_number, "return (i, j)"),
        Wrong("owners", a_generator, "return a list of"),
        Wrong("owners", threads_only, "each owner is (register, lane, warp)"),
    ],
)
