"""Checks of 08-compilers/06-triton.

Kernels run in the course's interpreter of block programs: a stray address or a race is
told as it happens, and what is stored is compared with what usual mistakes store.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmlab.checks.judging import Outcome, judge
from llmlab.compilers.triton_kernels import (
    Blocked,
    Linear,
    OutOfRange,
    Race,
    Report,
    TensorCore,
    launch,
    linear,
    tl,
)
from llmlab.course.grading.checking import Checks, Mistake

check = Checks("08-compilers/06-triton")


def run_kernel(answer: Callable, grid: tuple[int, ...], *arguments) -> Report:
    """Launches it; what the interpreter refuses is a mistake in its words."""
    try:
        return launch(answer, grid, *arguments)
    except (OutOfRange, Race) as refusal:
        raise Mistake(str(refusal)) from None


def shown(values: Tensor) -> object:
    """What a tensor is to a comparison: rounded, so that sums in any order agree."""
    return [None if v != v else round(v, 4) for v in values.double().flatten().tolist()]


# 1 ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sum:
    """A case: x of T rows, `stride` apart, of d numbers; blocks of ROWS x COLS."""

    T: int
    d: int
    stride: int
    rows: int
    cols: int


SUMS = (
    Sum(4, 8, 8, 4, 8),
    Sum(8, 16, 16, 4, 8),
    Sum(7, 13, 20, 4, 8),
    Sum(5, 6, 9, 2, 4),
    Sum(3, 21, 21, 4, 8),
)


def run_sum(answer: Callable, n: int) -> Outcome:
    """Case n: what stands in y, and what was never stored to."""
    case = SUMS[n]
    random = torch.Generator().manual_seed(n)
    wide = torch.randn(case.T, case.stride, generator=random)
    x, b = wide[:, : case.d], torch.randn(case.d, generator=random)
    y = torch.zeros(case.T, case.d)
    grid = (-(-case.T // case.rows), -(-case.d // case.cols))
    sizes = (case.T, case.d, case.stride, case.rows, case.cols)
    report = run_kernel(answer, grid, x, b, y, *sizes)
    missing = (~report.written["y"]).nonzero().flatten().tolist()
    if missing:
        row, col = divmod(missing[0], case.d)
        raise Mistake(
            f"y[{row}, {col}] was never stored to, and {len(missing)} in all (T ="
            f" {case.T}, d = {case.d}, blocks of {case.rows} × {case.cols}):"
            " tl.program_id(0) counts blocks of rows, tl.program_id(1) of columns, and"
            " the mask leaves on what is below T and d"
        )
    return {"y": shown(y)}


def bias_kernel(
    x_ptr, b_ptr, y_ptr, T, d, stride, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """y = x + b, a block of it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    there = (row < T) & (col < d)
    x = tl.load(x_ptr + row * stride + col, mask=there)
    b = tl.load(b_ptr + col, mask=col < d)
    tl.store(y_ptr + row * d + col, x + b, mask=there)


def summing(
    bias: Callable = lambda row, col: col,
    value: Callable = lambda x, b: x + b,
) -> Callable:
    """`bias_kernel`, and what comes out with one thing changed."""

    def kernel(x_ptr, b_ptr, y_ptr, T, d, stride, ROWS, COLS):
        r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        c = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
        there = (r < T) & (c < d)
        x = tl.load(x_ptr + r * stride + c, mask=there, other=0.0)
        at = bias(r, c)
        b = tl.load(b_ptr + at, mask=at < d, other=0.0)
        tl.store(y_ptr + r * d + c, value(x, b), mask=there)

    return kernel


def wrong_sums() -> dict[str, Callable]:
    """Diagnosis → a kernel that makes this mistake."""
    return {
        "b is missing: y is x + b": summing(value=lambda x, b: x),
        "x is missing: y is x + b": summing(value=lambda x, b: b),
        "b was subtracted: y is x + b": summing(value=lambda x, b: x - b),
        "b was multiplied: y is x + b": summing(value=lambda x, b: x * b),
        "b was added twice": summing(value=lambda x, b: x + 2 * b),
        "b was added along the rows: every column has its own, b_ptr + col": summing(
            bias=lambda row, col: row + 0 * col
        ),
        "every block of columns has the first block of b: its offset begins at"
        " tl.program_id(1) * COLS": summing(bias=lambda row, col: col - col[:, :1]),
    }


@check.exercise(
    points=3,
    minutes=15,
    difficulty=2,
    importance=5,
    hints=(
        (
            "Which rows are this program's? It has number tl.program_id(0), and each"
            " program has ROWS of them: a column of numbers, tl.arange(0, ROWS)[:,"
            " None]. The same for columns, as a row: [None, :]."
        ),
        (
            "A place in x is row * stride + col, in y row * d + col, in b col. A block"
            " may reach beyond the tensor: there = (row < T) & (col < d)."
        ),
        (
            "x = tl.load(x_ptr + row * stride + col, mask=there); b likewise with"
            " mask=col < d; tl.store(y_ptr + row * d + col, x + b, mask=there)."
        ),
    ),
)
def add_bias(answer):
    """y = x + b by a grid of blocks, with offsets and masks."""
    judge(answer, run_sum, bias_kernel, wrong_sums(), len(SUMS), "add_bias", brief)


def brief(values: object) -> str:
    """The first numbers of a comparison."""
    return ", ".join(map(str, list(values)[:6])) + ", …"


# 2 ------------------------------------------------------------------------------------

SOFTMAXES = (  # T, d, stride, the numbers' size, their middle
    (3, 8, 8, 1.0, 0.0),
    (4, 5, 9, 1.0, 0.0),
    (2, 13, 16, 300.0, 0.0),
    (3, 6, 6, 1.0, -9.0),
    (2, 5, 8, 2.0, -150.0),
)


def run_softmax(answer: Callable, n: int) -> Outcome:
    """Case n: T rows of d numbers, `stride` apart."""
    T, d, stride, size, middle = SOFTMAXES[n]
    random = torch.Generator().manual_seed(10 + n)
    x = (torch.randn(T, stride, generator=random) * size + middle)[:, :d]
    y = torch.zeros(T, d)
    cols = 1 << (d - 1).bit_length()
    report = run_kernel(answer, (T,), x, y, d, stride, cols)
    missing = int((~report.written["y"]).sum())
    if missing:
        raise Mistake(f"{missing} of {T * d} numbers of y were never stored to")
    loaded = report.loaded["x"] / (4 * T * d)
    if loaded > 1:
        raise Mistake(
            f"x was loaded {loaded:.0f} times: a row is on the chip once it is loaded,"
            " maximum, sum and result come from the same block"
        )
    return {"y": shown(y)}


def softmax_kernel(x_ptr, y_ptr, d, stride, COLS: tl.constexpr):
    """A row's softmax."""
    row = tl.program_id(0)
    col = tl.arange(0, COLS)
    x = tl.load(x_ptr + row * stride + col, mask=col < d, other=float("-inf"))
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(y_ptr + row * d + col, e / tl.sum(e, axis=0), mask=col < d)


def softmaxing(
    other: float = float("-inf"),
    exponent: Callable = lambda x: x - x.max(),
    result: Callable = lambda e, d: e / e.sum(),
) -> Callable:
    """`softmax_kernel`, and what comes out with one thing changed."""

    def kernel(x_ptr, y_ptr, d, stride, COLS):
        row = tl.program_id(0)
        col = tl.arange(0, COLS)
        x = tl.load(x_ptr + row * stride + col, mask=col < d, other=other)
        e = tl.exp(exponent(x))
        tl.store(y_ptr + row * d + col, result(e, d), mask=col < d)

    return kernel


def from_block(result: Callable, other: float = float("-inf")) -> Callable:
    """A kernel that stores what `result` makes of a row and of its mask."""

    def kernel(x_ptr, y_ptr, d, stride, COLS):
        row = tl.program_id(0)
        col = tl.arange(0, COLS)
        on = col < d
        x = tl.load(x_ptr + row * stride + col, mask=on, other=other)
        tl.store(y_ptr + row * d + col, result(x, on), mask=on)

    return kernel


def masked_after(x: Tensor, on: Tensor) -> Tensor:
    """The mask comes after the exponential."""
    e = (x - x[on].max()).exp() * on
    return e / e.sum()


def shifted_below(x: Tensor, on: Tensor) -> Tensor:
    """The maximum was subtracted in the sum only."""
    return x.exp() / (x - x.max()).exp().sum()


def logarithm(x: Tensor, on: Tensor) -> Tensor:
    """Of the softmax."""
    return x - x.max() - (x - x.max()).exp().sum().log()


def wrong_softmaxes() -> dict[str, Callable]:
    """Diagnosis → a kernel that makes this mistake."""
    return {
        "what is masked off counts in the sum: with other=0.0 it adds e^(0 − max). Give"
        " the load other=float('-inf')": softmaxing(0.0),
        "`other` is low, and the numbers of a row may all be lower: only"
        " float('-inf') is below every number": softmaxing(-100.0),
        "for low numbers y is NaN: e^x of what is masked off is infinite, and 0 times"
        " that is NaN. Mask before tl.exp, not after it": from_block(masked_after, 0.0),
        "the sum is that of e^(x − max), and e^x was divided by it: subtract the"
        " maximum in both": from_block(shifted_below),
        "it is the logarithm of the softmax, x − max − log(sum): store e / sum": (
            from_block(logarithm)
        ),
        "what is masked off is undefined without `other`, NaN here: give the load"
        " other=float('-inf'). If it has that, ∞ − ∞ or 0 · ∞ makes the NaN": (
            softmaxing(float("nan"))
        ),
        "e^x overflows for large numbers: subtract the row's maximum first": softmaxing(
            exponent=lambda x: x
        ),
        "the result is not divided by the sum": softmaxing(result=lambda e, d: e),
        "the result is divided by the number of columns, and the sum is"
        " asked": softmaxing(result=lambda e, d: e / d),
        "the exponent is upside down: x − max, which is never above 0": softmaxing(
            exponent=lambda x: x.max() - x
        ),
        "the sum was divided by d, which makes it a mean: the sum is asked": softmaxing(
            result=lambda e, d: e / (e.sum() / d)
        ),
        "the maximum was added: x − max, which is never above 0": softmaxing(
            exponent=lambda x: x + x.max()
        ),
        "it is the logarithm of the softmax: store e / sum": softmaxing(
            result=lambda e, d: (e / e.sum()).log()
        ),
    }


@check.exercise(
    points=3,
    minutes=15,
    difficulty=2,
    importance=5,
    hints=(
        (
            "COLS may be larger than d. What must stand in the places beyond, so that"
            " neither the maximum nor the sum sees them?"
        ),
        (
            "e^(−∞) is 0: load with mask=col < d and other=float('-inf'). Then"
            " tl.max(x, axis=0), tl.exp, tl.sum(…, axis=0)."
        ),
        "Rows of x lie `stride` apart, those of y d. Store with the same mask.",
    ),
)
def softmax_row(answer):
    """The softmax of one row per program, loaded once."""
    wrong = wrong_softmaxes()
    cases = len(SOFTMAXES)
    judge(answer, run_softmax, softmax_kernel, wrong, cases, "softmax_row", brief)


# 3 ------------------------------------------------------------------------------------

ORDERS = (
    (4, 3, 2),
    (5, 3, 2),
    (7, 4, 3),
    (5, 3, 3),
    (3, 5, 8),
    (6, 6, 1),
    (1, 7, 4),
)


def run_order(answer: Callable, n: int) -> Outcome:
    """Case n: the tile of each program."""
    down, across, group = ORDERS[n]
    tiles = []
    for pid in range(down * across):
        tile = answer(pid, down, across, group)
        if not isinstance(tile, tuple | list) or len(tile) != 2:
            raise Mistake(f"grouped({pid}, …) returned {tile!r}: return (i, j)")
        if any(isinstance(i, bool) or not isinstance(i, int) for i in tile):
            raise Mistake(
                f"grouped({pid}, …) returned {tuple(tile)!r}: i and j are whole"
                " numbers, so divide by //"
            )
        tiles.append(tuple(tile))
    return {f"the order of {down} × {across} tiles in groups of {group}": tiles}


def tile_of(pid: int, down: int, across: int, group: int) -> tuple[int, int]:
    """Tile (i, j) of program `pid`."""
    per_group = group * across
    first = pid // per_group * group
    height = min(down - first, group)
    return first + pid % per_group % height, pid % per_group // height


def ordering(
    per_group: Callable = lambda down, across, group: group * across,
    height: Callable = lambda down, first, group: min(down - first, group),
    first: Callable = lambda number, group: number * group,
    inside: Callable = lambda k, height, across: (k % height, k // height),
    rest: bool = True,
) -> Callable:
    """`tile_of`, and what comes out with one thing changed."""

    def way(pid: int, down: int, across: int, group: int) -> tuple[int, int]:
        size = per_group(down, across, group)
        begin = first(pid // size, group)
        k = pid % size if rest else pid
        i, j = inside(k, height(down, begin, group), across)
        return begin + i, j

    return way


def wrong_orders() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "this is the order row by row: within a group go down its rows first": ordering(
            inside=lambda k, height, across: (k // across, k % across)
        ),
        "this is the order column by column, of all tiles: only `group` rows at a"
        " time": lambda pid, down, across, group: (pid % down, pid // down),
        "the last group may be lower: its height is min(down − first, group)": ordering(
            height=lambda down, first, group: group
        ),
        "i and j are swapped": lambda *args: tile_of(*args)[::-1],
        "a group begins at row number · group: the number of the group alone was"
        " added": ordering(first=lambda number, group: number),
        "the first row of the group is missing, in i and in the height": ordering(
            first=lambda number, group: 0,
            height=lambda down, first, group: min(down, group),
        ),
        "a group has group · across programs, not group · down": ordering(
            per_group=lambda down, across, group: group * down,
        ),
        "a group has group · across programs, not group · down: with it, groups begin"
        " beyond the last row": ordering(
            per_group=lambda down, across, group: group * down,
            height=lambda down, first, group: min(max(down - first, 1), group),
        ),
        "the first row of the group is missing in i: add it to the row in the group": (
            lambda pid, down, across, group: (
                tile_of(pid, down, across, group)[0] % group,
                tile_of(pid, down, across, group)[1],
            )
        ),
        "the groups are of columns: `group` rows of tiles make one": (
            lambda pid, down, across, group: tile_of(pid, across, down, group)[::-1]
        ),
        "i is pid % height: take what is left of pid, pid % (group · across), or a last"
        " group that is lower begins in its middle": rows_of_pid,
        "the last group's height was given to all: it is min(down − first, group), so"
        " `group` for all but the last": ordering(
            height=lambda down, first, group: down % group or group
        ),
        "j counts on from group to group: divide what is left of pid, pid % (group ·"
        " across)": ordering(rest=False),
        "the height was taken for the width: j is divided by the group's height, and i"
        " is what is left": ordering(
            inside=lambda k, height, across: (k // height, k % height)
        ),
    }


def rows_of_pid(pid: int, down: int, across: int, group: int) -> tuple[int, int]:
    """`tile_of`, with i from pid and not from its place in the group."""
    first = pid // (group * across) * group
    height = min(down - first, group)
    return first + pid % height, tile_of(pid, down, across, group)[1]


@check.exercise(
    points=2,
    minutes=12,
    difficulty=3,
    importance=4,
    hints=(
        (
            "A group is `group` rows of tiles, all columns: how many programs is that?"
            " Which group is pid in, and which is its first row?"
        ),
        "The last group has fewer rows where `group` does not divide `down`.",
        (
            "k = pid % (group * across) is the place in the group. Down first: i ="
            " first + k % height, j = k // height."
        ),
    ),
)
def grouped(answer):
    """Which tile a program computes, so that its neighbours need the same data."""
    judge(answer, run_order, tile_of, wrong_orders(), len(ORDERS), "grouped")


# 4 ------------------------------------------------------------------------------------


def layout_cases() -> list[Linear]:
    """Blocks of registers, tensor cores' results, repeated elements (in lanes or
    warps, and in registers), a swizzle.
    """
    swizzle = Linear((8, 4), ((0, 1),), ((1, 0), (2, 2), (4, 1)), ((0, 2),))
    twice = Linear((4, 4), ((0, 1), (0, 0)), ((1, 0), (0, 2)), ((2, 0), (2, 0)))
    return [
        linear(Blocked((1, 2), (2, 4), (2, 1), (1, 0)), (8, 8)),
        linear(Blocked((2, 1), (4, 2), (1, 2), (0, 1)), (8, 8)),
        linear(TensorCore(2, (1, 1), (16, 8)), (16, 8)),
        linear(Blocked((1, 2), (4, 4), (2, 2), (1, 0)), (4, 8)),
        swizzle,
        twice,
    ]


def run_owners(answer: Callable, n: int) -> Outcome:
    """Case n: who holds each of some elements."""
    layout = layout_cases()[n]
    rows, cols = layout.shape
    found = {}
    for row, col in ((0, 0), (1, 3), (rows - 1, cols - 1), (rows // 2, 1), (3, 0)):
        owners = answer(layout.register, layout.lane, layout.warp, row, col)
        if not isinstance(owners, list | tuple | set):
            raise Mistake(
                f"owners(…) returned a {type(owners).__name__}: return a list of"
                " (register, lane, warp)"
            )
        if any(not isinstance(o, tuple | list) or len(o) != 3 for o in owners):
            raise Mistake("each owner is (register, lane, warp)")
        named = sorted(tuple(map(int, owner)) for owner in owners)
        found[f"the owners of ({row}, {col}) in a block of {rows} × {cols}"] = named
    return found


def holders(register, lane, warp, row: int, col: int) -> list[tuple[int, int, int]]:
    """All (register, lane, warp) that hold the element."""
    return owning()(register, lane, warp, row, col)


def owning(
    combine: Callable = lambda a, b: a ^ b,
    take: Callable = lambda index, bit: index >> bit & 1,
    sizes: Callable = lambda bases: 1 << len(bases),
    parts: tuple[bool, bool, bool] = (True, True, True),
    keep: Callable = lambda found: found,
    swap: bool = False,
    order: Callable = lambda place: place,
    across: Callable = lambda a, b: a ^ b,
) -> Callable:
    """`holders`, and what comes out with one thing changed.

    Args:
        combine: what is done with two steps of one part; `across`: with two parts.
    """

    def way(register, lane, warp, row, col):
        every = (register, lane, warp)
        found = []
        for place in itertools.product(*(range(sizes(bases)) for bases in every)):
            at = [0, 0]
            for bases, index, used in zip(every, place, parts, strict=True):
                own = [0, 0]
                for bit, basis in enumerate(bases):
                    if used and take(index, bit):
                        own = [combine(a, b) for a, b in zip(own, basis, strict=True)]
                at = [across(a, b) for a, b in zip(at, own, strict=True)]
            if tuple(at[::-1] if swap else at) == (row, col):
                found.append(order(place))
        return keep(found)

    return way


def wrong_owners() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "steps were added: they are combined without carry, by ^ (exclusive"
        " or)": owning(combine=lambda a, b: a + b, across=lambda a, b: a + b),
        "steps were combined by |: two that are equal must cancel, as ^ does": owning(
            combine=lambda a, b: a | b, across=lambda a, b: a | b
        ),
        "an element is held by several threads here, and only the first is in the"
        " list": owning(keep=lambda found: found[:1]),
        "bits were taken from the other end: bit 0 is the lowest, index >> bit &"
        " 1": mirrored,
        "row and column are swapped: a step is (row, col)": owning(swap=True),
        "the registers' steps are missing": owning(parts=(False, True, True)),
        "the lanes' steps are missing": owning(parts=(True, False, True)),
        "the warps' steps are missing": owning(parts=(True, True, False)),
        "an owner is (register, lane, warp): the order is another": owning(
            order=lambda place: place[::-1]
        ),
        "an owner is (register, lane, warp): you have the lane first": owning(
            order=lambda place: (place[1], place[0], place[2])
        ),
        "the elements of register, lane and warp were added: between the three it is ^,"
        " too": owning(across=lambda a, b: a + b),
        "warp 0 alone was looked at: all 2ⁿ of them may hold the element": owning(
            keep=lambda found: [place for place in found if place[2] == 0]
        ),
        "a thread is in the list once, and two of its registers hold the element": (
            owning(
                keep=lambda found: [
                    *{place[1:]: place for place in found[::-1]}.values()
                ]
            )
        ),
        "n steps are n bits, so there are 2ⁿ registers, lanes or warps, and n were"
        " tried": owning(sizes=len),
    }


def mirrored(register, lane, warp, row, col):
    """Bit 0 taken for the highest."""
    return owning()(register[::-1], lane[::-1], warp[::-1], row, col)


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=3,
    hints=(
        (
            "Do not invert anything: go through all registers, lanes and warps, and"
            " compute which element each holds."
        ),
        (
            "With n steps there are 2ⁿ indices. Where bit `k` of the index is 1 (index"
            " >> k & 1), step k is added to row and col by ^."
        ),
        (
            "itertools.product(range(1 << len(register)), …) gives all triples; keep"
            " those whose element is (row, col)."
        ),
    ),
)
def owners(answer):
    """Who holds an element, from the bases of a linear layout."""
    cases = len(layout_cases())
    judge(answer, run_owners, holders, wrong_owners(), cases, "owners(…)")
