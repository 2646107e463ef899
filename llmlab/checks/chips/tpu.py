"""Checks of 09-chips/03-tpu.

An answer is run on cases, and what it returns is compared with what usual mistakes make
of them. Cycles and bytes count exactly, seconds to nine digits.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence

from llmlab.checks.judging import Outcome, judge, whole
from llmlab.chips import tpu
from llmlab.course.grading.checking import Checks, Mistake

check = Checks("09-chips/03-tpu")


# 1 ------------------------------------------------------------------------------------

# rows, m, r, c
WHEN_CASES = [
    (4, 0, 0, 0),
    (4, 3, 1, 2),
    (3, 2, 2, 4),
    (1, 5, 0, 3),
    (8, 0, 7, 1),
    (6, 11, 4, 9),
]


def run_when(answer: Callable, n: int) -> Outcome:
    """Case n: both cycles."""
    found = answer(*WHEN_CASES[n])
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise Mistake(f"when(…) returned {found!r}: return two cycles")
    return {
        "the cycle in which they meet": whole(found[0], "when(…)[0]"),
        "the cycle in which the result leaves": whole(found[1], "when(…)[1]"),
    }


def right_when(rows: int, m: int, r: int, c: int) -> tuple[int, int]:
    """(meeting, leaving), with weights that stay, loaded from cycle 0 on."""
    return rows + m + r + c, 2 * rows - 1 + m + c


def timing(meets: Callable | None = None, leaves: Callable | None = None) -> Callable:
    """`when`, and what comes out with one thing changed."""
    meets = meets or (lambda rows, m, r, c: rows + m + r + c)
    leaves = leaves or (lambda rows, m, r, c: 2 * rows - 1 + m + c)
    return lambda *case: (meets(*case), leaves(*case))


def wrong_when() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "the weights come in first, in as many cycles as there are rows": timing(
            lambda rows, m, r, c: m + r + c, lambda rows, m, r, c: rows - 1 + m + c
        ),
        "row r of the array gets its numbers r cycles later than row 0": timing(
            lambda rows, m, r, c: rows + m + c
        ),
        "a number needs c cycles to column c": timing(
            lambda rows, m, r, c: rows + m + r, lambda rows, m, r, c: 2 * rows - 1 + m
        ),
        "a sum that leaves column c began c cycles later than in column 0": timing(
            None, lambda rows, m, r, c: 2 * rows - 1 + m
        ),
        "cycles count from 0, and so do m, r and c: both are one too late": timing(
            lambda rows, m, r, c: rows + m + r + c + 1,
            lambda rows, m, r, c: 2 * rows + m + c,
        ),
        "a result leaves in the cycle in which the last row adds to it: one too"
        " late": timing(None, lambda rows, m, r, c: 2 * rows + m + c),
        "a sum leaves below the last row, not at row r": timing(
            None, lambda rows, m, r, c: rows + m + r + c
        ),
        "a sum goes down row by row, rows − 1 cycles from top to bottom": timing(
            None, lambda rows, m, r, c: rows + m + c
        ),
        "row 0 is on top, where sums begin": timing(
            lambda rows, m, r, c: rows + m + rows - 1 - r + c
        ),
        "the last of the rows of weights comes in in cycle rows − 1; x comes in the"
        " next": timing(
            lambda rows, m, r, c: rows - 1 + m + r + c,
            lambda rows, m, r, c: 2 * rows - 2 + m + c,
        ),
        "row m of X comes m cycles after row 0": timing(
            lambda rows, m, r, c: rows + r + c, lambda rows, m, r, c: 2 * rows - 1 + c
        ),
        "meeting and leaving are exchanged": lambda *case: right_when(*case)[::-1],
    }


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        "When is the last row of weights in its place? What enters row 0 then?",
        (
            "Row r starts r cycles later. From column to column a number needs one"
            " cycle, and so does a sum from row to row."
        ),
        (
            "Meeting: rows + m, then r for the skew and c to the right. Leaving: as if"
            " r were the last row."
        ),
    ),
)
def when(answer):
    """When a cell sees a row of X, and when the result leaves."""
    judge(answer, run_when, right_when, wrong_when(), len(WHEN_CASES), "when(…)")


# 2 ------------------------------------------------------------------------------------

# m, k, n, rows, columns, double
CYCLES_CASES = [
    (5, 8, 6, 4, 3, False),
    (5, 6, 7, 4, 3, False),
    (1, 9, 17, 4, 8, False),
    (6, 4, 3, 4, 3, True),
    (9, 6, 7, 4, 3, True),
    (2, 17, 10, 8, 5, True),
    (1, 3, 50, 5, 7, True),
    (30, 20, 20, 6, 16, False),
    (12, 25, 11, 8, 2, True),
]


def run_cycles(answer: Callable, n: int) -> Outcome:
    """Case n: a number of cycles."""
    m, k, size, rows, columns, double = CYCLES_CASES[n]
    what = f"cycles({m}, {k}, {size}, {rows}, {columns}, {double})"
    return {f"the result of {what}": whole(answer(*CYCLES_CASES[n]), what)}


def right_cycles(m: int, k: int, n: int, rows: int, columns: int, double: bool) -> int:
    """Cycles with weights that stay."""
    return tpu.Run(tpu.Array(rows, columns, "weight", double), m, k, n).cycles


def counting(
    folds: Callable = lambda m, k, n, R, C: -(-k // R) * -(-n // C),
    last: Callable = lambda m, R, C: 2 * R + C + m - 2,
    period: Callable = max,
    one: Callable | None = None,
    extra: Callable = lambda folds: folds - 1,
    off: int = 0,
) -> Callable:
    """`cycles`, and what comes out with one thing changed."""

    def way(m, k, n, rows, columns, double):
        count = folds(m, k, n, rows, columns)
        end = last(m, rows, columns)
        each = period(m, rows) if double else (one or last)(m, rows, columns)
        more = extra(count) if double else count - 1
        return more * each + end + off

    return way


def edges(m, k, n, rows, columns, double):
    """Folds that are as short as what they hold."""
    begins = end = 0
    for i in range(0, k, rows):
        for j in range(0, n, columns):
            used, wide = min(rows, k - i), min(columns, n - j)
            overlap = double and end > 0
            begins = begins + max(m, used) if overlap else end + used
            end = begins + m + used + wide - 2
    return end


def otherwise(change: Callable, double: bool) -> Callable:
    """`cycles`, changed with a second register only, or without it only.

    Args:
        change: (blocks, m, rows, columns) → cycles too many.
    """

    def way(m, k, n, rows, columns, doubled):
        cycles = right_cycles(m, k, n, rows, columns, doubled)
        if doubled != double:
            return cycles
        blocks = -(-k // rows) * -(-n // columns)
        return cycles + change(blocks, m, rows, columns)

    return way


def wrong_cycles() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "what does not divide needs a block of its own: round up": counting(
            lambda m, k, n, R, C: max(1, k // R) * max(1, n // C)
        ),
        "blocks are cut along k and along n: round each of them up, not their"
        " product": counting(lambda m, k, n, R, C: math.ceil(k * n / (R * C))),
        "k lies along the rows of the array, n along its columns": counting(
            lambda m, k, n, R, C: -(-k // C) * -(-n // R)
        ),
        "rows of X are streamed: m is not cut": counting(
            lambda m, k, n, R, C: -(-m // R) * -(-k // R) * -(-n // C)
        ),
        "only the blocks along k were counted": counting(
            lambda m, k, n, R, C: -(-k // R)
        ),
        "only the blocks along n were counted": counting(
            lambda m, k, n, R, C: -(-n // C)
        ),
        "the weights come in first: rows cycles": counting(
            last=lambda m, R, C: R + C + m - 2
        ),
        "one cycle too many for each block: the last row enters at m − 1": counting(
            last=lambda m, R, C: 2 * R + C + m - 1
        ),
        "two cycles too many for each block: from the first row to the last there are"
        " rows − 1 steps, and columns − 1 to the right": counting(
            last=lambda m, R, C: 2 * R + C + m
        ),
        "rows and columns are exchanged in the cycles of a block": counting(
            last=lambda m, R, C: R + 2 * C + m - 2
        ),
        "the last column gets its numbers columns − 1 cycles later": counting(
            last=lambda m, R, C: 2 * R + m - 1
        ),
        "a sum goes down through all rows": counting(
            last=lambda m, R, C: R + C + m - 1
        ),
        "that is the number of the last cycle: there is one more, since they count"
        " from 0": counting(off=-1),
        "a second register was not used": lambda m, k, n, R, C, double: right_cycles(
            m, k, n, R, C, False
        ),
        "without a second register nothing overlaps": (
            lambda m, k, n, R, C, double: right_cycles(m, k, n, R, C, True)
        ),
        "the next weights need rows cycles to come in, however few rows are"
        " streamed": counting(period=lambda m, R: m),
        "a block costs what takes longer: its rows of X may be more than the rows of"
        " the array": counting(period=lambda m, R: R),
        "rows come in while others stream: the longer of the two, not both": counting(
            period=lambda m, R: m + R
        ),
        "the last block is there once: its stream was counted twice": counting(
            extra=lambda folds: folds
        ),
        "a block that fills a part of the array takes as long as a full one": edges,
        "what divides needs no further block": counting(
            lambda m, k, n, R, C: (k // R + 1) * (n // C + 1)
        ),
        "the last row of X is through rows − 1 + columns − 1 cycles after it"
        " entered": counting(last=lambda m, R, C: R + m),
        "a second register does not help the first block: it must come in before"
        " anything begins": otherwise(lambda blocks, m, R, C: -R, True),
        "no block comes in while the last one works: it takes its m rows": otherwise(
            lambda blocks, m, R, C: max(m, R) - m, True
        ),
        "with a second register a block does not wait for the last result of the"
        " block before": otherwise(
            lambda blocks, m, R, C: (blocks - 1) * (m + R + C - 2 - max(m, R)), True
        ),
        "without a second register each block waits for its own weights": otherwise(
            lambda blocks, m, R, C: -(blocks - 1) * R, False
        ),
        "with and without a second register are exchanged": (
            lambda m, k, n, R, C, double: right_cycles(m, k, n, R, C, not double)
        ),
    }


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=5,
    hints=(
        "How many blocks does W have? When does the last result of one leave?",
        (
            "`blocks = ceil(k / rows) * ceil(n / columns)`. The last row of X is m − 1,"
            " and it leaves the last column: your `when`, plus one."
        ),
        (
            "One block takes 2 rows + columns + m − 2. With a second register each"
            " block before the last costs max(m, rows) instead."
        ),
    ),
)
def cycles(answer):
    """Cycles of a product on an array."""
    judge(
        answer,
        run_cycles,
        right_cycles,
        wrong_cycles(),
        len(CYCLES_CASES),
        "cycles(…)",
    )


# 3 ------------------------------------------------------------------------------------

PADDED_CASES = [
    ((8, 128), 4),
    ((1, 4096), 2),
    ((576, 192), 2),
    ((9, 130), 1),
    ((3, 5, 64), 4),
    ((2, 7, 12, 100), 2),
    ((16, 256), 1),
    ((300,), 4),
    ((1,), 2),
]


def run_padded(answer: Callable, n: int) -> Outcome:
    """Case n: bytes."""
    shape, itemsize = PADDED_CASES[n]
    what = f"padded_bytes({shape}, {itemsize})"
    return {f"the result of {what}": whole(answer(shape, itemsize), what)}


def up(size: int, unit: int) -> int:
    """The next multiple."""
    return -(-size // unit) * unit


def tiling(
    rows: Callable = lambda size: up(size, 8),
    lanes: Callable = lambda size: up(size, 128),
    rest: Callable = lambda size: size,
    alone: Callable = lambda size: (1, size),
    total: Callable = lambda shape, numbers, itemsize: numbers * itemsize,
) -> Callable:
    """`padded_bytes`, and what comes out with one thing changed."""

    def way(shape: Sequence[int], itemsize: int) -> int:
        full = alone(shape[0]) if len(shape) == 1 else tuple(shape)
        *others, r, c = full
        numbers = math.prod(rest(each) for each in others) * rows(r) * lanes(c)
        return total(shape, numbers, itemsize)

    return way


def wrong_padded() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "the last dimension lies along the 128 lanes, the one before along 8"
        " rows": tiling(lambda size: up(size, 128), lambda size: up(size, 8)),
        "the rows were not filled up to 8": tiling(rows=lambda size: size),
        "the lanes were not filled up to 128": tiling(lanes=lambda size: size),
        "each of the two is filled up, not the number of all numbers": tiling(
            lambda size: size,
            lambda size: size,
            total=lambda shape, numbers, itemsize: up(numbers, 1024) * itemsize,
        ),
        "what is full needs no further tile": tiling(
            lambda size: (size // 8 + 1) * 8, lambda size: (size // 128 + 1) * 128
        ),
        "a tile that is begun counts whole: round up": tiling(
            lambda size: max(8, size // 8 * 8), lambda size: max(128, size // 128 * 128)
        ),
        "only the last two dimensions are filled up": tiling(
            rest=lambda size: up(size, 8)
        ),
        "the dimensions before the last two count, too": tiling(rest=lambda size: 1),
        "one dimension alone lies along the lanes": tiling(
            alone=lambda size: (size, 1)
        ),
        "one dimension alone takes a row of tiles, and a tile has 8 rows": (
            lambda shape, itemsize: (
                tiling()(shape, itemsize) // (8 if len(shape) == 1 else 1)
            )
        ),
        "one dimension alone is one row: it is not cut into the 8 rows of a tile": (
            lambda shape, itemsize: tiling()(
                shape if len(shape) > 1 else (8, -(-shape[0] // 8)), itemsize
            )
        ),
        "the dimensions before the last two are not rows: each matrix is filled up by"
        " itself": lambda shape, itemsize: tiling()(
            (math.prod(shape[:-1]), shape[-1]), itemsize
        ),
        "the last two dimensions lie in a tile, not the first two": (
            lambda shape, itemsize: tiling()((*shape[2:], *shape[:2]), itemsize)
        ),
        "a tile has 8 rows, however many bytes a number has": (
            lambda shape, itemsize: tiling(lambda size: up(size, 32 // itemsize))(
                shape, itemsize
            )
        ),
        "a number has itemsize bytes, not always 4": tiling(
            total=lambda shape, numbers, itemsize: numbers * 4
        ),
        "numbers were counted, not bytes": tiling(
            total=lambda shape, numbers, itemsize: numbers
        ),
        "a tile is 8 × 128 numbers, not bytes": (
            lambda shape, itemsize: tiling(lanes=lambda size: up(size * itemsize, 128))(
                shape, 1
            )
        ),
        "those are the bytes that are lost: the question is how many it takes": tiling(
            total=lambda shape, numbers, itemsize: (
                (numbers - math.prod(shape)) * itemsize
            )
        ),
        "those are the bytes without tiles": tiling(
            total=lambda shape, numbers, itemsize: math.prod(shape) * itemsize
        ),
    }


@check.exercise(
    points=2,
    minutes=8,
    difficulty=1,
    importance=4,
    hints=(
        "Which two dimensions lie in a tile? What is the next multiple of 8?",
        "`-(-size // 8) * 8` rounds up. A shape of one number becomes (1, size).",
    ),
)
def padded_bytes(answer):
    """Bytes of an array in tiles of 8 × 128."""
    judge(
        answer,
        run_padded,
        tpu.padded_bytes,
        wrong_padded(),
        len(PADDED_CASES),
        "padded_bytes(…)",
    )


# 4 ------------------------------------------------------------------------------------

# total, sides, link, hop
TORUS_CASES = [
    (1e9, (16, 16), 50e9, 0.0),
    (1e9, (8, 8, 8), 45e9, 1e-6),
    (64.0, (4,), 1.0, 1.0),
    (3e6, (4, 16), 100e9, 2e-6),
    (96.0, (3, 5), 2.0, 0.25),
    (768.0, (4, 16, 8), 10.0, 3.0),
]


def run_torus(answer: Callable, n: int) -> Outcome:
    """Case n: seconds."""
    found = answer(*TORUS_CASES[n])
    if isinstance(found, bool) or not isinstance(found, numbers.Real):
        raise Mistake(f"all_reduce(…) returned {found!r}: return seconds")
    total, sides, *_ = TORUS_CASES[n]
    return {f"the seconds for {total:g} bytes on {sides}": f"{float(found):.9g}"}


def right_torus(total: float, sides: tuple[int, ...], link: float, hop: float) -> float:
    """Seconds of an all-reduce."""
    return tpu.all_reduce_seconds(tpu.Torus(sides, link, hop), total)


def reducing(
    shards: Callable = lambda n: (n - 1) / 2,
    hops: Callable = lambda n: math.ceil((n - 1) / 2),
    parts: Callable = len,
    first: Callable = lambda sides: math.prod(sides),
    grows: Callable = lambda sides, axis, phase: sides[axis],
    ring: Callable = lambda hops, shards: hops + shards,
    step: Callable = max,
    axes: Callable = lambda part, phase: part + phase,
    both: float = 2.0,
) -> Callable:
    """`all_reduce`, and what comes out with one thing changed."""

    def way(total, sides, link, hop):
        have = [total / parts(sides) / first(sides)] * len(sides)
        seconds = 0.0
        for phase in range(len(sides)):
            took = []
            for part in range(len(sides)):
                axis = axes(part, phase) % len(sides)
                n = sides[axis]
                took.append(ring(hop * hops(n), shards(n) * have[part] / link))
                have[part] *= grows(sides, axis, phase)
            seconds += step(took)
        return both * seconds

    return way


def each_alone(took: Sequence[tuple[float, float]]) -> float:
    """The most hops of any part and the most bytes of any, as if of one part."""
    return sum(max(times) for times in zip(*took, strict=True))


def flat(total, sides, link, hop):
    """One ring through all chips."""
    n = math.prod(sides)
    shard = total / n
    return 2 * (hop * math.ceil((n - 1) / 2) + (n - 1) / 2 * shard / link)


def wrong_torus() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "that is the all-gather alone: a reduce-scatter takes as long again": reducing(
            both=1.0
        ),
        "both directions work at the same time: half of the shards goes each"
        " way": reducing(shards=lambda n: n - 1),
        "the furthest chip of a ring is half a turn away": reducing(
            hops=lambda n: n - 1
        ),
        "hops and shards: both directions work at the same time": reducing(
            shards=lambda n: n - 1, hops=lambda n: n - 1
        ),
        "a ring of n has n − 1 others, not n": reducing(
            shards=lambda n: n / 2, hops=lambda n: math.ceil(n / 2)
        ),
        "half a hop is one: round up": reducing(hops=lambda n: (n - 1) // 2),
        "each hop takes its time, too": reducing(hops=lambda n: 0),
        "a hop was counted once for each axis: there are as many as shards come one"
        " after the other": reducing(hops=lambda n: 1),
        "the bytes are cut into as many parts as there are axes, and all axes work at"
        " once": reducing(parts=lambda sides: 1, axes=lambda part, phase: phase),
        "each part begins with another axis, and a step ends when the slowest part is"
        " done: take the longest of each step, not the mean": reducing(
            axes=lambda part, phase: phase
        ),
        "in each further step a part takes another axis": reducing(
            axes=lambda part, phase: part
        ),
        "after an axis comes the next, and after the last the first": reducing(
            axes=lambda part, phase: part - phase
        ),
        "the bytes are cut into as many parts as there are axes": reducing(
            parts=lambda sides: 1
        ),
        "after an axis of n a chip has n times as much to send": reducing(
            grows=lambda sides, axis, phase: 1
        ),
        "a part grows by the axis that it went over itself": reducing(
            grows=lambda sides, axis, phase: sides[phase]
        ),
        "a shard is what a chip has of a part by then: only in the last step is that"
        " the part divided by the chips of an axis": reducing(
            shards=lambda n: (n - 1) / 2 / n,
            first=lambda sides: 1,
            grows=lambda sides, axis, phase: 1,
        ),
        "(n − 1) / 2 shards cross a link: only hops are rounded up": reducing(
            shards=lambda n: math.ceil((n - 1) / 2)
        ),
        "add the time of the hops and that of the bytes: the shorter counts, too": (
            reducing(ring=max)
        ),
        "a step ends when one part, the slowest, is done with its hops and its bytes:"
        " the most hops and the most bytes may be of two parts": reducing(
            ring=lambda hops, shards: (hops, shards), step=each_alone
        ),
        "at first each chip has one part in as many as there are chips": reducing(
            first=lambda sides: 1
        ),
        "parts go over different axes at the same time: take the longest, not the"
        " sum": reducing(step=sum),
        "a step ends when the slowest part is done, not the first": reducing(step=min),
        "that is one ring through all chips: a torus has a ring for each axis": flat,
    }


@check.exercise(
    points=3,
    minutes=20,
    difficulty=4,
    importance=4,
    hints=(
        (
            "One axis first: each chip has a shard. How many shards cross a link in one"
            " direction until all have all?"
        ),
        (
            "`have = [total / axes / chips] * axes`. In step s, part p goes over"
            " `sides[(p + s) % axes]`; then it is that many times as large."
        ),
        (
            "A part takes `hop * ceil((n - 1) / 2) + (n - 1) / 2 * have[p] / link`; the"
            " step takes the longest of them. Twice the sum of the steps."
        ),
    ),
)
def all_reduce(answer):
    """Seconds of an all-reduce on a torus."""
    judge(
        answer,
        run_torus,
        right_torus,
        wrong_torus(),
        len(TORUS_CASES),
        "all_reduce(…)",
    )
