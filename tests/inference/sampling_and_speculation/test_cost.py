"""The arithmetic of speed, against the chain that it sums up."""

from __future__ import annotations

import pytest

from llmlab.inference.sampling_and_speculation import (
    best_gamma,
    expected_tokens,
    speedup,
)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("gamma", [0, 1, 4])
def test_tokens_per_pass_by_going_through_where_it_stops(alpha, gamma):
    stops_at = [alpha**i * (1 - alpha) for i in range(gamma)]
    mean = sum((i + 1) * chance for i, chance in enumerate(stops_at))
    mean += (gamma + 1) * alpha**gamma
    assert expected_tokens(alpha, gamma) == pytest.approx(mean)
    if alpha < 1:
        closed = (1 - alpha ** (gamma + 1)) / (1 - alpha)
        assert expected_tokens(alpha, gamma) == pytest.approx(closed)


def test_the_papers_table_of_operations_and_speed():
    """Leviathan et al. 2022, table 1, where c = 0."""
    table = {
        (0.8, 5): 3.69,
        (0.9, 10): 6.86,
    }
    for (alpha, gamma), times in table.items():
        assert round(speedup(alpha, gamma, 0.0), 2) == times


def test_costs_of_draft_and_of_wide_passes():
    assert speedup(0.5, 1, 0.5) == pytest.approx(1.0)
    assert speedup(0.5, 1, 0.5, wide=2.0) == pytest.approx(0.6)
    assert best_gamma(0.3, 0.5) == 0  # it does not pay
    assert best_gamma(1.0, 0.1, most=8) == 8
    alpha, c = 0.7, 0.05
    best = best_gamma(alpha, c)
    assert all(speedup(alpha, best, c) >= speedup(alpha, g, c) for g in range(40))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expected_tokens(1.2, 3), "alpha=1.2"),
        (lambda: expected_tokens(0.5, -1), "gamma=-1"),
        (lambda: speedup(0.5, 1, -0.1), "c=-0.1"),
        (lambda: speedup(0.5, 1, 0.1, wide=0.0), "wide=0.0"),
    ],
    ids=["alpha", "gamma", "c", "wide"],
)
def test_bad_numbers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
