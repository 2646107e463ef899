"""Wrong answers to 09-chips/03-tpu, each with its diagnosis."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmlab.checks.chips import tpu as checks
from llmlab.checks.chips.tpu import check
from llmlab.chips import tpu
from tests.checks.rejecting import (
    ByCases,
    Wrong,
    accepts,
    all_foreseen,
    kept_apart,
    rejects,
)

SLUG = "09-chips/03-tpu"

# Right, written otherwise ------------------------------------------------------------


def when_from_registers(rows, m, r, c):
    x = np.full((m + 1, rows), 1)
    x[m] = 2
    w = np.zeros((rows, c + 1), dtype=int)
    w[r, c] = 1
    meets = leaves = None
    for cycle in tpu.cycles(tpu.Array(rows, c + 1), x, w):
        if cycle.x[r][c] == 2 and meets is None:
            meets = cycle.number
        if any(place[:2] == (m, c) for place in cycle.left):
            leaves = cycle.number
    return meets, leaves


def when_as_list(rows, m, r, c):
    start = rows + m + c
    return [start + r, start + rows - 1]


def cycles_one_by_one(m, k, n, rows, columns, double):
    begins = rows
    end = 0
    for _ in range(0, k, rows):
        for _ in range(0, n, columns):
            end = begins + (m - 1) + (rows - 1) + (columns - 1) + 1
            begins = begins + max(m, rows) if double else end + rows
    return end


def cycles_from_registers(m, k, n, rows, columns, double):
    one = tpu.Array(rows, columns, "weight", double)
    x, w = np.ones((m, k), dtype=int), np.ones((k, n), dtype=int)
    return len([*tpu.cycles(one, x, w)])


def padded_by_filling(shape, itemsize):
    full = np.zeros(shape if len(shape) > 1 else (1, *shape), dtype=np.int8)
    *_, rows, lanes = full.shape
    widths = [(0, 0)] * (full.ndim - 2) + [(0, -rows % 8), (0, -lanes % 128)]
    return np.pad(full, widths).size * itemsize


def padded_by_counting(shape, itemsize):
    tiles = 0
    *others, rows, lanes = (1, *shape) if len(shape) == 1 else shape
    for _ in range(math.prod(others)):
        tiles += len(range(0, rows, 8)) * len(range(0, lanes, 128))
    return tiles * 1024 * itemsize


def all_reduce_backwards(total, sides, link, hop):
    axes = len(sides)
    seconds = 0.0
    for step in range(axes):
        took = []
        for part in range(axes):
            n = sides[(part + step) % axes]
            before = math.prod(sides[(part + s) % axes] for s in range(step))
            shard = total / axes / math.prod(sides) * before
            took.append(hop * (n // 2) + shard * (n - 1) / (2 * link))
        seconds += 2 * max(took)
    return seconds


def all_reduce_of_the_package(total, sides, link, hop):
    return tpu.all_reduce_seconds(tpu.Torus(sides, link, hop), total)


def all_reduce_part_by_part(total, sides, link, hop):
    axes, chips = len(sides), math.prod(sides)
    slowest = [0.0] * axes
    for part in range(axes):
        order = [*sides[part:], *sides[:part]]
        has = 1
        for step, n in enumerate(order):
            bytes_over_a_link = has * (n - 1) * total / (2 * axes * chips)
            seconds = bytes_over_a_link / link + hop * (n // 2)
            slowest[step] = max(slowest[step], seconds)
            has *= n
    return math.fsum(slowest) + math.fsum(slowest)


RIGHT = {
    "when": [when_from_registers, when_as_list],
    "cycles": [cycles_one_by_one, cycles_from_registers],
    "padded_bytes": [padded_by_filling, padded_by_counting],
    "all_reduce": [
        all_reduce_backwards,
        all_reduce_of_the_package,
        all_reduce_part_by_part,
    ],
}
test_written_otherwise = accepts(check, RIGHT)

# Wrong --------------------------------------------------------------------------------

KINDS = {
    "when": ByCases(
        checks.run_when, checks.right_when, checks.wrong_when, checks.WHEN_CASES
    ),
    "cycles": ByCases(
        checks.run_cycles,
        checks.right_cycles,
        checks.wrong_cycles,
        checks.CYCLES_CASES,
    ),
    "padded_bytes": ByCases(
        checks.run_padded, tpu.padded_bytes, checks.wrong_padded, checks.PADDED_CASES
    ),
    "all_reduce": ByCases(
        checks.run_torus, checks.right_torus, checks.wrong_torus, checks.TORUS_CASES
    ),
}
test_mistakes_differ = kept_apart(KINDS)

UNFORESEEN = [
    Wrong("when", lambda rows, m, r, c: rows + m, "return two cycles"),
    Wrong("when", lambda rows, m, r, c: (rows + m + r + c, None), "whole number"),
    Wrong("when", lambda rows, m, r, c: (rows + m + r + c, 0), "is not right in case"),
    Wrong("cycles", lambda *case: 7.5, "return a whole number"),
    Wrong("cycles", lambda *case: 100, "is not right in case 1"),
    Wrong("padded_bytes", lambda shape, itemsize: shape, "return a whole number"),
    Wrong("padded_bytes", lambda shape, itemsize: 4096, "is not right in case 2"),
    Wrong("all_reduce", lambda *case: None, "return seconds"),
    Wrong("all_reduce", lambda *case: 1.0, "is not right in case 1"),
]
test_wrong_answers = rejects(SLUG, all_foreseen(KINDS) + UNFORESEEN)


@pytest.mark.parametrize("case", checks.WHEN_CASES)
def test_the_reference_is_what_registers_do(case):
    assert checks.right_when(*case) == when_from_registers(*case)
