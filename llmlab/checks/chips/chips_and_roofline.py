"""Checks of 09-chips/01-chips-and-roofline.

An answer is run on cases, and what it returns is compared with what usual mistakes make
of them. Numbers count to nine digits.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence

from llmlab.checks.judging import Outcome, judge, number, told
from llmlab.chips import chips_and_roofline as cr
from llmlab.course.grading.checking import Checks, Mistake
from llmlab.models.chips import KINDS, UNKNOWN
from llmlab.models.chips import to_si as right_si

check = Checks("09-chips/01-chips-and-roofline")

# 1 ------------------------------------------------------------------------------------

SI_CASES = [
    (312, "TFLOP/s", "dense"),
    (1979, "TFLOP/s", "sparse 2:4"),
    (512, "TMAC/s", "dense"),
    (624, "TOPS", "dense"),
    (4.5, "PFLOP/s", "sparse 2:4"),
    (80, "GB", ""),
    (95, "GiB", ""),
    (3.35, "TB/s", ""),
    (820, "GiB/s", ""),
    (900, "GB/s", "both ways"),
    (300, "GB/s", "one way"),
    (400, "Gbit/s", "one way"),
    (4.8, "Tbit/s", "both ways"),
    (125, "PFLOP/s", "unstated"),
    (1.28, "TB/s", "unstated"),
    (250, "TMAC/s", "sparse 2:4"),
]


def run_si(answer: Callable, n: int) -> Outcome:
    """Case n: one figure."""
    value, unit, kind = SI_CASES[n]
    found = answer(value, unit, kind)
    what = f"to_si({value}, {unit!r}, {kind!r})"
    return {f"the result of {what}": None if found is None else number(found, what)}


def converting(
    kinds: dict[str, float] | None = None,
    unknown: Sequence[str] = UNKNOWN,
    bit: float = 1 / 8,
    binary: bool = True,
    pair: float = 2.0,
    operation: float = 1.0,
    prefixes: dict[str, float] | None = None,
    nothing: float | None = None,
    kind_alone: bool = False,
) -> Callable:
    """`to_si`, and what comes out with one thing changed."""
    kinds = KINDS | dict.fromkeys(UNKNOWN, 1.0) | (kinds or {})

    def way(value: float, unit: str, kind: str = "") -> float | None:
        if kind in unknown:
            return nothing
        plain = unit.replace("Gi", "G") if not binary else unit
        factor = right_si(value, plain) * kinds[kind]
        factor *= 8 * bit if "bit" in unit else 1
        factor *= pair / 2 if "MAC" in unit else 1
        factor *= (prefixes or {}).get(unit[0], 1) if unit[:2] != "Gi" else 1
        factor /= 2 if kind_alone and "MAC" in unit and kind == "sparse 2:4" else 1
        return factor * (operation if "OPS" in unit else 1)

    return way


def wrong_si() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "a sparse figure counts products with zeros that are never computed: half of it"
        " is dense": converting({"sparse 2:4": 1.0}),
        "both ways together are printed: one direction has half": converting(
            {"both ways": 1.0}
        ),
        "neither sparse figures nor those of both directions were halved": converting(
            {"sparse 2:4": 1.0, "both ways": 1.0}
        ),
        "a dense figure was halved, too": converting({"dense": 0.5}),
        "a link that is printed one way was halved, too": converting({"one way": 0.5}),
        "sparse was doubled: the printed figure has the zeros in it": converting(
            {"sparse 2:4": 2.0}
        ),
        "both ways were doubled: the printed figure has both in it": converting(
            {"both ways": 2.0}
        ),
        "bits were taken for bytes: divide by 8": converting(bit=1.0),
        "bits were multiplied by 8: a byte has 8 of them": converting(bit=8.0),
        "GiB were taken for GB: 2³⁰ bytes, not 10⁹": converting(binary=False),
        "a MAC is a product and a sum: two FLOP": converting(pair=1.0),
        "MACs were halved: each of them is two FLOP": converting(pair=0.5),
        "of a sparse figure in MAC/s both count: a MAC is two, and half of them is"
        " computed": converting(kind_alone=True),
        "G, T and P are powers of 1000 here; only Gi is 2³⁰": converting(
            prefixes={"G": 1.024**3, "T": 1.024**4, "P": 1.024**5}
        ),
        "T is 10¹², not 2⁴⁰": converting(prefixes={"T": 1.024**4}),
        "P is 10¹⁵, a thousand T": converting(prefixes={"P": 1e-3}),
        "what is not stated is not 0: return None": converting(nothing=0.0),
        "an operation of TOPS was counted as two: vendors have counted both"
        " already": converting(operation=2.0),
        "what is not stated cannot be converted: return None": converting(unknown=()),
    }


@check.exercise(
    points=2,
    minutes=12,
    difficulty=2,
    importance=5,
    hints=(
        "A unit is a prefix and a base. Which prefixes are there, which bases?",
        (
            "Try the long prefixes first: 'Gi' before 'G'. A dict of prefixes, a dict"
            " of bases (`bit/s` is 1 / 8, `MAC/s` is 2), a dict of kinds."
        ),
        (
            "`for prefix in ('Gi', 'G', 'T', 'P'): if unit.startswith(prefix): base ="
            " unit[len(prefix):]`, then value × prefix × base × kind."
        ),
    ),
)
def to_si(answer):
    """A printed figure in dense FLOP/s, bytes, or bytes/s one way."""
    judge(answer, run_si, right_si, wrong_si(), len(SI_CASES), "to_si(…)")


# 2 ------------------------------------------------------------------------------------

PRODUCT_CASES = [
    (1, 576, 1536, 2, 2, 2),
    (7, 64, 48, 4, 4, 4),
    (32, 4096, 1024, 2, 0.5, 2),
    (5, 96, 200, 1, 1, 4),
    (300, 20, 3, 2, 4, 8),
]


def run_product(answer: Callable, n: int) -> Outcome:
    """Case n: FLOPs and bytes."""
    found = answer(*PRODUCT_CASES[n])
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise Mistake(f"product(…) returned {found!r}: return FLOPs and bytes")
    return {
        "the number of FLOPs": number(found[0], "product(…)[0]"),
        "the number of bytes": number(found[1], "product(…)[1]"),
    }


def right_product(*shape: float) -> tuple[float, float]:
    """(FLOPs, bytes) of the reference."""
    work = cr.product(*shape)
    return work.flops, work.bytes


def counting(
    flops: Callable = lambda m, k, n: 2 * m * k * n,
    x: Callable = lambda m, k, n: m * k,
    w: Callable = lambda m, k, n: k * n,
    y: Callable = lambda m, k, n: m * n,
    sizes: Callable = lambda x, w, y: (x, w, y),
) -> Callable:
    """`product`, and what comes out with one thing changed."""

    def way(m, k, n, x_bytes, w_bytes, y_bytes):
        each = sizes(x_bytes, w_bytes, y_bytes)
        parts = (x(m, k, n), w(m, k, n), y(m, k, n))
        return flops(m, k, n), sum(p * b for p, b in zip(parts, each, strict=True))

    return way


def wrong_products() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "products were counted without their sums: 2 m k n": counting(
            lambda m, k, n: m * k * n
        ),
        "only k − 1 sums were counted: each product is added to what is there, so 2 m k"
        " n": counting(lambda m, k, n: m * n * (2 * k - 1)),
        "the result is written, too: m n numbers": counting(y=lambda m, k, n: 0),
        "x is read, too: m k numbers": counting(x=lambda m, k, n: 0),
        "W is read, too: k n numbers": counting(w=lambda m, k, n: 0),
        "W is read once, not once for each row of x": counting(
            w=lambda m, k, n: m * k * n
        ),
        "x is read once, not once for each column of W": counting(
            x=lambda m, k, n: m * k * n
        ),
        "the result is only written: it counts once": counting(
            y=lambda m, k, n: 2 * m * n
        ),
        "W's numbers may be smaller than the others: three sizes": counting(
            sizes=lambda x, w, y: (x, x, x)
        ),
        "x and the result have sizes of their own, not that of W": counting(
            sizes=lambda x, w, y: (w, w, w)
        ),
        "the sizes of W's numbers and of y's are exchanged": counting(
            sizes=lambda x, w, y: (x, y, w)
        ),
        "the sizes of x's numbers and of W's are exchanged": counting(
            sizes=lambda x, w, y: (w, x, y)
        ),
        "the result has a size of its own, not that of x": counting(
            sizes=lambda x, w, y: (x, w, x)
        ),
        "numbers were counted, not bytes": counting(sizes=lambda x, w, y: (1, 1, 1)),
    }


@check.exercise(
    points=2,
    minutes=8,
    difficulty=1,
    importance=5,
    hints=(
        "How many numbers are in x, in W, and in y? How many products make one of y?",
        "A number of y takes k products and k sums.",
        "`2 * m * k * n`, and `m * k * x_bytes + k * n * w_bytes + …`.",
    ),
)
def product(answer):
    """FLOPs and bytes of y = x W."""
    cases = len(PRODUCT_CASES)
    judge(answer, run_product, right_product, wrong_products(), cases, "product(…)")


# 3 ------------------------------------------------------------------------------------

# k, n, peak, bandwidth, x_bytes, w_bytes, y_bytes
BATCH_CASES = [
    (4096, 14336, 989.4e12, 3.35e12, 2, 2, 2),
    (4096, 4096, 312e12, 2.039e12, 2, 2, 2),
    (4096, 1024, 989.4e12, 3.35e12, 2, 0.5, 2),
    (64, 64, 989.4e12, 3.35e12, 2, 2, 2),  # never: rows bring too much of their own
    (512, 256, 1e12, 1e12, 1, 1, 4),
    (1000, 1000, 1e9, 1e12, 2, 2, 2),  # from the first row on
    (300, 5000, 2e13, 1e12, 4, 4, 2),
    (100, 100, 2e12, 1e12, 1, 2, 1),
    (64, 64, 2.0**40, 2.0**36, 2, 2, 2),  # 32 rows take exactly as long
    (64, 64, 2.0**40, 2.0**36, 4, 2, 4),  # a row's FLOPs take as long as its bytes
    (600, 600, 989.4e12, 3.35e12, 2, 2, 2),  # thousands of rows
]


def run_batch(answer: Callable, n: int) -> Outcome:
    """Case n: how many rows, or None."""
    found = answer(*BATCH_CASES[n])
    if found is not None and not isinstance(found, numbers.Integral):
        raise Mistake(
            f"smallest_batch(…) returned {found!r}: return a whole number, or None"
        )
    if found is not None and found > 2**50:
        raise Mistake(
            f"smallest_batch(…) returned {found}: beside so many rows the bytes of W"
            " are lost in rounding. Ask first whether a row's FLOPs take longer than"
            " the row's own bytes; if not, return None"
        )
    k, n_, *_ = BATCH_CASES[n]
    return {f"the number of rows for k={k} and n={n_}": found}


def batching(
    flops: float = 2.0,
    x: float = 1.0,
    y: float = 1.0,
    w: Callable = lambda size, other: size,
    whole: Callable = math.ceil,
    never: object = None,
    even: object = None,
) -> Callable:
    """`smallest_batch`, and what comes out with one thing changed."""

    def way(k, n, peak, bandwidth, x_bytes, w_bytes, y_bytes):
        own = (x * k * x_bytes + y * n * y_bytes) / bandwidth
        a_row = flops * k * n / peak - own
        if a_row == 0:
            return even if never is None else never
        if a_row < 0:
            return never
        return whole(k * n * w(w_bytes, x_bytes) / bandwidth / a_row)

    return way


def wrong_batches() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "the rows of x are read, too: each brings k numbers": batching(x=0.0),
        "the rows of y are written, too: each brings n numbers": batching(y=0.0),
        "only W was counted: each row also reads k and writes n numbers": batching(
            x=0.0, y=0.0
        ),
        "products were counted without their sums: 2 m k n": batching(flops=1.0),
        "W has a size of its own, not that of x": batching(w=lambda size, other: other),
        "with that many rows it is still memory that takes longer: round up": batching(
            whole=math.floor
        ),
        "rounded down: the next whole number above is the first that is"
        " enough": batching(whole=lambda rows: max(1, math.floor(rows))),
        "rounded to the nearest, and at least 1: the next whole number above is the"
        " first that is enough": batching(whole=lambda rows: max(1, round(rows))),
        "where both take exactly as long, that many rows are enough: it is one too"
        " many": batching(whole=lambda rows: math.floor(rows) + 1),
        "where a row's own bytes take exactly as long as its FLOPs, no number of rows"
        " is enough, either: None": batching(even=1),
        "where no number of rows is enough, the answer is None, not 0": batching(
            never=0
        ),
        "peak / bandwidth alone is FLOPs for each byte: ask how many rows bring so many"
        " for the bytes of x, W and y": (
            lambda k, n, peak, bandwidth, *sizes: math.ceil(peak / bandwidth)
        ),
        "the search ends at 1000 rows: some chips need more": batching(
            whole=lambda rows: math.ceil(rows) if rows <= 1000 else None
        ),
        "only powers of two were tried": batching(
            whole=lambda rows: 2 ** max(0, math.ceil(math.log2(rows)))
        ),
        "rounded to the nearest: the next whole number above is the first that is"
        " enough": batching(whole=round),
        "where a row's own bytes take longer than its FLOPs, no number of rows is"
        " enough: None": batching(never=1),
    }


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=4,
    hints=(
        "Write both times as a function of m, and ask when the first is the longer.",
        (
            "2 m k n / π ≥ m (k bₓ + n b_y) / β + k n b_w / β. Bring m to one side:"
            " what stands before it?"
        ),
        (
            "`a_row = 2*k*n/peak - (k*x_bytes + n*y_bytes)/bandwidth`. If it is not"
            " above 0: None. Else the weights' time over `a_row`, rounded up."
        ),
    ),
)
def smallest_batch(answer):
    """From how many rows on a product is bound by arithmetic."""
    cases = len(BATCH_CASES)
    judge(
        answer,
        run_batch,
        cr.smallest_batch,
        wrong_batches(),
        cases,
        "smallest_batch(…)",
    )


# 4 ------------------------------------------------------------------------------------

# name → peak, bandwidth, memory
FOUR = {
    "wide": (100e12, 1e12, 80e9),
    "quick": (20e12, 4e12, 24e9),
    "small": (50e12, 40e12, 0.25e9),
    "even": (60e12, 2e12, 40e9),
}
# flops, moved, held, free
RANK_CASES = [
    (1e15, 1e10, 36e9, 0.9),
    (2e10, 16e9, 16e9, 0.9),
    (8e13, 1.7e12, 72e9, 1.0),
    (3e12, 9e10, 140e9, 0.8),
    (1e9, 1e6, 1e6, 0.5),
]


def run_rank(answer: Callable, n: int) -> Outcome:
    """Case n: names in order, how many of each, and chip-seconds."""
    flops, moved, held, free = RANK_CASES[n]
    found = answer(flops, moved, held, dict(FOUR), free)
    if not isinstance(found, list) or not all(
        isinstance(row, tuple) and len(row) == 3 for row in found
    ):
        raise Mistake("return a list of tuples (name, chips, chip-seconds)")
    if sorted(str(row[0]) for row in found) != sorted(FOUR):
        raise Mistake("each chip stands in the list once")
    table = {row[0]: row[1:] for row in found}
    return {
        "the number of chips": {name: told(table[name][0]) for name in FOUR},
        "chip-seconds": {name: told(table[name][1]) for name in FOUR},
        "the order": [row[0] for row in found],
    }


def ranking(
    time: Callable = max,
    free: Callable = lambda free: free,
    whole: Callable = math.ceil,
    shared: bool = True,
    group: bool = False,
    backwards: bool = False,
    order: Callable = lambda row: row[2],
    late: bool = False,
) -> Callable:
    """`rank`, and what comes out with one thing changed."""

    def way(flops, moved, held, chips, share):
        rows = []
        for name, (peak, bandwidth, memory) in chips.items():
            count = whole(held / (free(share) * memory))
            took = time(flops / peak, moved / bandwidth)
            took = took if shared else took * count
            rows.append((name, count, took / count if group else took))
        rows.sort(key=order, reverse=backwards)
        return [(*row[:2], row[2] / row[1]) for row in rows] if late else rows

    return way


def wrong_ranks() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "computing and reading were added up: they happen at the same time, and the"
        " longer counts": ranking(lambda a, b: a + b),
        "only computing was counted": ranking(lambda a, b: a),
        "only reading was counted": ranking(lambda a, b: b),
        "the shorter of the two times was taken: both must end": ranking(min),
        "only a part of each memory is free": ranking(free=lambda free: 1.0),
        "a part of a chip cannot be bought: round up": ranking(
            whole=lambda chips: max(1, math.floor(chips))
        ),
        "all chips share the work, so chip-seconds do not grow with their"
        " number": ranking(shared=False),
        "seconds times chips is asked for, not the seconds of the group": ranking(
            group=True
        ),
        "the order is right, and the seconds of the group stand in it: seconds times"
        " chips are asked for": ranking(late=True),
        "the order is by the seconds of the group: the fewest chip-seconds come"
        " first": ranking(order=lambda row: row[2] / row[1]),
        "where a number of chips holds it exactly, one more was taken: round"
        " up": ranking(whole=lambda chips: math.floor(chips) + 1),
        "one chip need not hold it: take as many as do": ranking(whole=lambda chips: 1),
        "`free` is the part that can be used, not the part that is taken": ranking(
            free=lambda free: max(1 - free, 0.01)
        ),
        "what is held was multiplied by `free`: it is the memory of which only a part"
        " can be used": ranking(free=lambda free: 1 / free),
        "the worst stands first": ranking(backwards=True),
        "the order is that of the names": ranking(order=lambda row: row[0]),
        "the order is by the number of chips": ranking(order=lambda row: row[1]),
    }


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=4,
    hints=(
        "Which of the two times of a chip counts? And what if two chips share both?",
        (
            "c chips take max(W/(c π), Q/(c β)) seconds: times c, the c goes away. The"
            " number of chips is held / (free · memory), rounded up."
        ),
        "`sorted(rows, key=lambda row: row[2])` with rows (name, chips, chip-seconds).",
    ),
)
def rank(answer):
    """Chips in the order of what a piece of work costs on them."""
    cases = len(RANK_CASES)
    judge(answer, run_rank, ranking(), wrong_ranks(), cases, "rank(…)")
