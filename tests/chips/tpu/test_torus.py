"""The torus: formulas against shards that move, bounds, and Google's own figures."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.chips import tpu
from llmlab.chips.tpu import Torus

SIDES = st.lists(st.integers(2, 9), min_size=1, max_size=3).map(tuple)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("side", range(3, 10))
def test_shards_that_move_take_what_the_formula_says(side, wrapped):
    moved = tpu.gather(side, wrapped)
    assert all(len(has) == 2 * side for has in moved.holds)
    torus = Torus((side,), link=1.0, wrap=wrapped)
    assert tpu.all_gather_seconds(torus, float(side)) == moved.busiest
    slow = Torus((side,), link=1e30, hop=1.0, wrap=wrapped)
    assert tpu.all_gather_seconds(slow, 1.0) == pytest.approx(moved.steps)
    if wrapped:  # each chip sends what everybody else needs
        assert set(moved.sent) == {side - 1}


@given(sides=SIDES, wrap=st.booleans())
def test_nothing_beats_the_bound(sides, wrap):
    torus = Torus(sides, link=3.0, wrap=wrap)
    took, bound = (
        f(torus, 60.0) for f in (tpu.all_reduce_seconds, tpu.all_reduce_bound)
    )
    assert took >= bound * (1 - 1e-12)
    if len(set(sides)) == 1 and torus.wraps(sides[0]):
        assert took == pytest.approx(bound)


@given(sides=SIDES)
def test_collectives_add_up(sides):
    torus = Torus(sides, link=2.0, hop=0.5)
    gather = tpu.all_gather_seconds(torus, 7.0)
    assert tpu.reduce_scatter_seconds(torus, 7.0) == gather
    assert tpu.all_reduce_seconds(torus, 7.0) == 2 * gather
    hops = sum(math.ceil((max(sides) - 1) / 2) for _ in sides)
    assert gather <= 0.5 * 2 * hops + tpu.all_gather_seconds(Torus(sides, 2.0), 7.0)


def test_by_hand():
    # 4 × 4: each half of 64 bytes grows 2 → 8 → 32; 3/2 shards over each link.
    torus = Torus((4, 4), link=1.0)
    assert tpu.all_gather_seconds(torus, 64.0) == 2 * 1.5 + 8 * 1.5
    assert tpu.all_gather_seconds(Torus((4, 4), 1.0, hop=1.0), 64.0) == 15 + 4
    open_ends = Torus((4, 4), link=1.0, wrap=False)
    assert tpu.all_gather_seconds(open_ends, 64.0) == 2 * 3 + 8 * 3
    # 4 × 2: one half goes 4 → 16 → 32 over four, then two; the other two, then four.
    uneven = Torus((4, 2), link=1.0)
    assert tpu.all_gather_seconds(uneven, 64.0) == max(4 * 1.5, 4) + max(16, 8 * 1.5)


@pytest.mark.parametrize(
    ("name", "sides", "terabytes"),
    [("TPU v5e", (16, 16), 1.6), ("TPU v6e", (16, 16), 3.2), ("TPU v4", (16,) * 3, 24)],
)
def test_the_bisection_is_what_google_prints(name, sides, terabytes):
    torus = Torus.of(name, *sides)
    assert torus.bisection / 1e12 == pytest.approx(terabytes, rel=0.05)


def test_the_printed_bandwidth_of_an_all_reduce_counts_every_link():
    torus = Torus.of("TPU v5e", 16, 16)
    assert torus.chips * tpu.PORTS["TPU v5e"] * torus.link == pytest.approx(51.2e12)
    summed = torus.chips * 1e9 / tpu.all_reduce_seconds(torus, 1e9)
    assert summed == pytest.approx(51.2e12 / 2, rel=0.01)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Torus((), 1.0), r"sides=\(\) has no axis"),
        (lambda: Torus((4, 1), 1.0), "has an axis of one"),
        (lambda: Torus((1,), 1.0), "has an axis of one"),
        (lambda: Torus((4, 0), 1.0), r"sides\[1\]=0"),
        (lambda: Torus((4,), 0.0), "link=0.0 must be above 0"),
        (lambda: Torus((4,), float("nan")), "link=nan"),
        (lambda: Torus((4,), 1.0, hop=-1.0), "hop=-1.0 must not be negative"),
        (lambda: Torus.of("H100", 4), "name='H100' must be one of TPU v4"),
        (lambda: Torus.of("TPU v5e", 4, 4, 4), "has 4 links, two for each axis"),
        (lambda: Torus((3, 5), 1.0).bisection, "the longest axis is odd"),
        (lambda: tpu.all_gather_seconds(Torus((4,), 1.0), 0.0), "total=0.0"),
        (lambda: tpu.all_reduce_bound(Torus((4,), 1.0), -1.0), "total=-1.0"),
        (lambda: tpu.gather(1, False), "a line begins at 2"),
        (lambda: tpu.gather(2), "a ring at 3"),
    ],
)
def test_nonsense_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
