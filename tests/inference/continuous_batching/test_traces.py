"""Arrivals and lengths."""

from __future__ import annotations

import statistics

import pytest

from llmlab.inference.continuous_batching import (
    Request,
    bursts,
    lognormal,
    poisson,
    trace,
)


def test_arrivals_are_exponential():
    """Mean and deviation of the times between them are 1/rate."""
    times = poisson(4.0, 20_000, 1)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.03)
    assert min(gaps) > 0


def test_bursts_have_the_same_rate_and_come_together():
    times = bursts(4.0, 20_000, 10, 2)
    assert len(times) == 20_000
    assert len(set(times)) == 2_000
    assert times[-1] == pytest.approx(5_000, rel=0.06)
    assert bursts(1.0, 7, 3, 0) == sorted(bursts(1.0, 7, 3, 0))
    assert bursts(2.0, 5, 1, 9) == poisson(2.0, 5, 9)


def test_lengths_have_the_mean_and_the_spread():
    lengths = lognormal(400, 20_000, 0.5, longest=10**6, seed=3)
    assert statistics.mean(lengths) == pytest.approx(400, rel=0.02)
    # deviation of a log-normal: mean · √(exp(s²) − 1)
    wanted = 400 * (2.718281828**0.25 - 1) ** 0.5
    assert statistics.stdev(lengths) == pytest.approx(wanted, rel=0.05)


def test_lengths_are_cut_and_at_least_one():
    lengths = lognormal(3, 5_000, 2.0, longest=40, seed=1)
    assert min(lengths) == 1
    assert max(lengths) == 40
    assert lognormal(7, 4, 0.0) == [7] * 4


def test_seeds_decide():
    assert poisson(1.0, 5, 1) == poisson(1.0, 5, 1) != poisson(1.0, 5, 2)
    assert lognormal(50, 5, seed=1) == lognormal(50, 5, seed=1)
    assert lognormal(50, 5, seed=1) != lognormal(50, 5, seed=2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: poisson(0.0, 3), "rate=0.0"),
        (lambda: bursts(1.0, 3, 0), "size=0"),
        (lambda: lognormal(0.5, 3), "mean=0.5"),
        (lambda: lognormal(50, 3, longest=40), "mean=50"),
        (lambda: trace([0.0], [1, 2], [1]), "1, 2 and 1"),
        (lambda: trace([1.0, 0.0], [1, 2], [1, 1]), "order of time"),
        (lambda: Request(0.0, 0, 1), "prompt=0"),
        (lambda: Request(0.0, 1, 0), "output=0"),
        (lambda: Request(0.0, 4, 1, stored=4), "stored=4"),
        (lambda: Request(0.0, 4, 1, stored=-1), "stored=-1"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()
