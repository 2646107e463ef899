"""Prices against published bills."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.chips.precision_power_cost import price
from llmlab.models.chips import chip
from llmlab.parallelism.choosing import planner

positive = st.floats(1e-3, 1e6)


def test_a_million_tokens_by_hand():
    # 10,000 tokens/s, half of them sold: 18 million an hour for 9 dollars
    cost = price.dollars_per_million_tokens(
        dollars_per_hour=9, tokens_per_second=10_000, utilisation=0.5
    )
    assert cost == pytest.approx(0.5)


@given(dollars=positive, speed=positive, used=st.floats(0.01, 1))
def test_half_used_is_twice_as_dear(dollars, speed, used):
    def cost(u):
        return price.dollars_per_million_tokens(
            dollars_per_hour=dollars, tokens_per_second=speed, utilisation=u
        )

    assert cost(used / 2) == pytest.approx(2 * cost(used))
    hour = cost(used) * speed * used * 3600 / 1e6
    assert hour == pytest.approx(dollars)


def test_owning_by_hand():
    # 8,766 dollars over two years are half a dollar an hour; 2 kW · 1.5 · 0.1 is 0.3
    hour = price.owned_dollars_per_hour(
        dollars=8766, years=2, watts=2000, pue=1.5, dollars_per_kwh=0.1
    )
    assert hour == pytest.approx(0.5 + 0.3)
    kept = price.owned_dollars_per_hour(
        dollars=8766,
        years=2,
        watts=0,
        pue=1,
        dollars_per_kwh=0,
        upkeep_per_year=0.1,
    )
    assert kept == pytest.approx(0.6)


def test_deepseeks_day_adds_up():
    day = price.DEEPSEEK_DAY
    assert day.cost_dollars == pytest.approx(87_072)
    reading, writing = day.nodes_from_tokens
    assert reading + writing == pytest.approx(226.75, rel=2e-3)
    revenue = day.revenue_dollars(found=0.14, read=0.55, written=2.19)
    assert revenue == pytest.approx(562_027, rel=5e-4)
    assert revenue / day.cost_dollars - 1 == pytest.approx(5.45, abs=0.01)


def test_deepseeks_training_in_fp8():
    used = price.implied_mfu(
        parameters=37e9,
        tokens=14.8e12,
        flops_per_second=chip("H100").speed("fp8"),
        gpu_hours=2.664e6,
    )
    assert 0.1 < used < 0.3


def test_llamas_hours_lie_under_its_printed_mfu():
    """The paper prints 38 to 43% while it runs; all hours paid for come to less."""
    used = price.implied_mfu(
        parameters=405e9,
        tokens=15.6e12,
        flops_per_second=chip("H100").speed("bf16"),
        gpu_hours=30.84e6,
    )
    assert 0.30 < used < 0.38


def test_hours_and_share_are_each_others_inverse():
    run = {"parameters": 8e9, "tokens": 1e12, "flops_per_second": 1e15}
    hours = price.training_gpu_hours(**run, mfu=0.4)
    assert price.implied_mfu(**run, gpu_hours=hours) == pytest.approx(0.4)
    assert hours == pytest.approx(6 * 8e9 * 1e12 / 4e14 / 3600)


def test_dollars_of_a_run_as_the_planner_counts_them():
    assert planner.dollars(1024, 10, 2.0) == pytest.approx(1024 * 10 * 24 * 2.0)


def test_the_widest_bar_stands_first():
    bars = price.tornado(
        lambda a, b: a / b, {"a": 2.0, "b": 1.0}, {"a": (1, 3), "b": (0.5, 4)}
    )
    assert [bar.name for bar in bars] == ["b", "a"]
    assert (bars[0].cost_at_low, bars[0].cost_at_high) == (4.0, 0.5)
    assert bars[1].width == 2.0


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (
            lambda: price.dollars_per_million_tokens(
                dollars_per_hour=-1, tokens_per_second=1
            ),
            "dollars_per_hour=-1",
        ),
        (
            lambda: price.dollars_per_million_tokens(
                dollars_per_hour=1, tokens_per_second=0
            ),
            "tokens_per_second=0",
        ),
        (
            lambda: price.dollars_per_million_tokens(
                dollars_per_hour=1, tokens_per_second=1, utilisation=1.2
            ),
            "utilisation=1.2",
        ),
        (
            lambda: price.owned_dollars_per_hour(
                dollars=1, years=1, watts=1, pue=0.9, dollars_per_kwh=1
            ),
            "pue=0.9",
        ),
        (
            lambda: price.owned_dollars_per_hour(
                dollars=1, years=0, watts=1, pue=1, dollars_per_kwh=1
            ),
            "years=0",
        ),
        (
            lambda: price.training_gpu_hours(
                parameters=1, tokens=1, flops_per_second=1, mfu=1.1
            ),
            "mfu=1.1",
        ),
        (lambda: price.tornado(lambda a: a, {"a": 1}, {"b": (0, 1)}), "'b'"),
        (lambda: price.tornado(lambda a: a, {"a": 1}, {"a": (2, 3)}), "leaves out"),
        (
            lambda: price.DEEPSEEK_DAY.revenue_dollars(found=-1, read=0, written=0),
            "found=-1",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(call, named):
    with pytest.raises(ValueError, match=named):
        call()
