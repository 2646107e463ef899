"""Wrong answers to 09-chips/01-chips-and-roofline, each with its diagnosis."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from llmlab.checks.chips import chips_and_roofline as checks
from llmlab.checks.chips.chips_and_roofline import check
from llmlab.chips import chips_and_roofline as cr
from llmlab.models.chips import to_si
from tests.checks.rejecting import (
    ByCases,
    Wrong,
    accepts,
    all_foreseen,
    kept_apart,
    rejects,
)

SLUG = "09-chips/01-chips-and-roofline"

# Right, written otherwise ------------------------------------------------------------


def si_by_replacing(value, unit, kind=""):
    if kind == "unstated":
        return None
    powers = {"Gi": 2**30, "T": 10**12, "P": 10**15, "G": 10**9}
    first = next(prefix for prefix in powers if unit.startswith(prefix))
    result = value * powers[first]
    if unit.endswith("MAC/s"):
        result *= 2
    if unit.endswith("bit/s"):
        result /= 8
    if kind in ("sparse 2:4", "both ways"):
        result /= 2
    return result


def si_by_cases(value, unit, kind=""):
    table = {
        "TFLOP/s": 1e12,
        "PFLOP/s": 1e15,
        "TMAC/s": 2e12,
        "TOPS": 1e12,
        "GB": 1e9,
        "GiB": 1024**3,
        "GB/s": 1e9,
        "GiB/s": 1024**3,
        "TB/s": 1e12,
        "Gbit/s": 125e6,
        "Tbit/s": 125e9,
    }
    match kind:
        case "unstated":
            return None
        case "sparse 2:4" | "both ways":
            return np.float64(value * table[unit] * 0.5)
    return value * table[unit]


def product_as_list(m, k, n, x_bytes, w_bytes, y_bytes):
    return [2.0 * m * n * k, k * (m * x_bytes + n * w_bytes) + m * n * y_bytes]


def product_by_arrays(m, k, n, x_bytes, w_bytes, y_bytes):
    numbers = np.array([m * k, k * n, m * n], dtype=np.float64)
    return 2 * m * k * n, float(numbers @ [x_bytes, w_bytes, y_bytes])


def batch_by_fractions(k, n, peak, bandwidth, x_bytes, w_bytes, y_bytes):
    sizes = [Fraction(each) for each in (peak, bandwidth, x_bytes, w_bytes, y_bytes)]
    p, b, x, w, y = sizes
    a_row = 2 * k * n / p - (k * x + n * y) / b
    return math.ceil(k * n * w / b / a_row) if a_row > 0 else None


def batch_by_doubling(k, n, peak, bandwidth, x_bytes, w_bytes, y_bytes):
    def enough(m):
        moved = m * k * x_bytes + k * n * w_bytes + m * n * y_bytes
        return 2 * m * k * n * bandwidth >= moved * peak

    high = 1
    while not enough(high):
        high *= 2
        if high > 2**40:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def rank_by_group(flops, moved, held, chips, free):
    rows = []
    for name, (peak, bandwidth, memory) in chips.items():
        count = -int(-held // (free * memory))
        together = max(flops / (count * peak), moved / (count * bandwidth))
        rows.append((name, count, together * count))
    rows.sort(key=lambda row: row[-1])
    return rows


def rank_by_names(flops, moved, held, chips, free):
    cost = {c: max(flops / p, moved / b) for c, (p, b, _) in chips.items()}
    order = sorted(chips, key=cost.get)
    needed = {c: int(np.ceil(held / free / m)) for c, (*_, m) in chips.items()}
    return [(name, needed[name], cost[name]) for name in order]


RIGHT = {
    "to_si": (si_by_replacing, si_by_cases),
    "product": (product_as_list, product_by_arrays),
    "smallest_batch": (batch_by_fractions, batch_by_doubling),
    "rank": (rank_by_group, rank_by_names),
}


test_right_answers_written_otherwise = accepts(check, RIGHT)


# Wrong --------------------------------------------------------------------------------

KINDS = {
    "to_si": ByCases(checks.run_si, to_si, checks.wrong_si, checks.SI_CASES),
    "product": ByCases(
        checks.run_product,
        checks.right_product,
        checks.wrong_products,
        checks.PRODUCT_CASES,
    ),
    "smallest_batch": ByCases(
        checks.run_batch,
        cr.smallest_batch,
        checks.wrong_batches,
        checks.BATCH_CASES,
    ),
    "rank": ByCases(
        checks.run_rank,
        checks.ranking(),
        checks.wrong_ranks,
        checks.RANK_CASES,
    ),
}


test_no_two_mistakes_come_to_the_same = kept_apart(KINDS)


@pytest.mark.parametrize("case", checks.RANK_CASES)
def test_the_exercise_ranks_as_the_room_does(case):
    flops, moved, held, free = case
    chips = [
        cr_chip(name, peak, bandwidth, memory)
        for name, (peak, bandwidth, memory) in checks.FOUR.items()
    ]
    places = cr.rank(cr.Work("work", flops, moved), held, chips, "bf16", free=free)
    wanted = checks.ranking()(flops, moved, held, checks.FOUR, free)
    assert [(p.chip.name, p.chips) for p in places] == [row[:2] for row in wanted]
    found = [place.chip_seconds for place in places]
    assert found == pytest.approx([row[2] for row in wanted])


def cr_chip(name, peak, bandwidth, memory):
    from llmlab.models.chips import Chip

    return Chip(name, "nobody", 2026, {"bf16": peak}, memory, bandwidth)


def si_as_text(value, unit, kind=""):
    return f"{to_si(value, unit, kind)}"


def flops_only(*shape):
    return cr.product(*shape).flops


def batch_as_float(*case):
    found = cr.smallest_batch(*case)
    return None if found is None else float(found)


def batch_by_endless_doubling(*case):
    found = cr.smallest_batch(*case)
    return 2**57 if found is None else found


def best_only(*case):
    return checks.ranking()(*case)[0]


def lists(*case):
    return [list(row) for row in checks.ranking()(*case)]


def only_those_that_hold(flops, moved, held, chips, free):
    rows = checks.ranking()(flops, moved, held, chips, free)
    return [row for row in rows if row[1] == 1]


def drops_the_small(flops, moved, held, chips, free):
    chips.pop("small")
    return checks.ranking()(flops, moved, held, chips, free)


test_wrong_answers = rejects(
    SLUG,
    [
        *all_foreseen(KINDS),
        Wrong("to_si", si_as_text, "return a number"),
        Wrong("product", flops_only, "return FLOPs and bytes"),
        Wrong("smallest_batch", batch_as_float, "a whole number, or None"),
        Wrong("smallest_batch", batch_by_endless_doubling, "lost in rounding"),
        Wrong("rank", best_only, "a list of tuples"),
        Wrong("rank", lists, "a list of tuples"),
        Wrong("rank", only_those_that_hold, "stands in the list once"),
        Wrong("rank", drops_the_small, "in place: work on a copy"),
    ],
)
