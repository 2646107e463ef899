"""Fronts by brute force, ties, both directions; budgets."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmlab.compression import compression_compared as compared
from llmlab.models import language_model
from llmlab.peft.best_practice import comparison

POINTS = st.integers(1, 3).flatmap(
    lambda k: st.lists(
        st.lists(st.integers(0, 3), min_size=k, max_size=k), min_size=1, max_size=9
    )
)


def beats(a, b, larger) -> bool:
    """Whether a dominates b, coordinate by coordinate."""
    better = False
    for k, (x, y) in enumerate(zip(a, b, strict=True)):
        if k in larger:
            x, y = -x, -y
        if x > y:
            return False
        better = better or x < y
    return better


@given(POINTS, st.sets(st.integers(0, 2)))
def test_by_brute_force(points, larger):
    larger = [k for k in larger if k < len(points[0])]
    found = compared.pareto(torch.tensor(points, dtype=torch.float), larger)
    want = [not any(beats(a, b, larger) for a in points) for b in points]
    assert found.tolist() == want


@given(POINTS)
def test_what_is_beaten_is_beaten_by_one_of_the_front(points):
    front = compared.pareto(torch.tensor(points, dtype=torch.float)).tolist()
    best = [p for p, on in zip(points, front, strict=True) if on]
    assert best
    for point, on in zip(points, front, strict=True):
        assert on or any(beats(a, point, ()) for a in best)


@given(POINTS)
def test_larger_is_a_change_of_sign(points):
    x = torch.tensor(points, dtype=torch.float)
    every = range(x.shape[1])
    assert torch.equal(compared.pareto(x, every), compared.pareto(-x))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1))
def test_in_two_coordinates_it_is_the_front_of_the_peft_part(points):
    x = torch.tensor(points, dtype=torch.float)
    assert torch.equal(compared.pareto(x), comparison.pareto(x[:, 0], x[:, 1]))


def test_by_hand():
    #             on    beaten  on     on, twice       beaten by a tie in one
    points = [[1, 9], [2, 9], [2, 5], [4, 1], [4, 1], [4, 5]]
    found = compared.pareto(torch.tensor(points, dtype=torch.float))
    assert found.tolist() == [True, False, True, True, True, False]


def test_what_is_refused():
    with pytest.raises(ValueError, match="must be \\(n, k\\)"):
        compared.pareto(torch.ones(3))
    with pytest.raises(ValueError, match="holds NaN"):
        compared.pareto(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(ValueError, match="no coordinate 2 among 2"):
        compared.pareto(torch.ones(3, 2), larger=(2,))


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1),
    st.integers(-1, 6),
)
def test_the_best_within_a_budget(points, budget):
    size, loss = torch.tensor(points, dtype=torch.float).T
    found = compared.best_within(size, loss, budget)
    fits = [p for p in points if p[0] <= budget]
    if not fits:
        assert found is None
        return
    assert points[found][0] <= budget
    assert points[found][1] == min(p[1] for p in fits)
    on_front = compared.pareto(torch.stack([size, loss], 1))
    assert on_front[found]  # a choice by one number of the two is on the front


def test_errors_of_a_difference():
    assert compared.combined(3.0, 4.0) == 5.0


def test_bits_per_byte_are_those_of_the_evaluation_harness():
    """`bits_per_byte` of lm-eval, EleutherAI/lm-evaluation-harness at 001722b:
    −weighted_mean(items) / ln 2, an item being (log-likelihood in nats, bytes).
    """
    texts = ["Mr. Speaker,", "naïve — Ωραία"]
    losses = [torch.rand(5).double() * 4, torch.rand(9).double() * 4]
    items = []
    for text, loss in zip(texts, losses, strict=True):
        items.append((-loss.sum().item(), len(text.encode())))
    likelihood, sizes = (sum(column) for column in zip(*items, strict=True))
    theirs = -likelihood / sizes / math.log(2)
    ours = language_model.bits_per_byte(torch.cat(losses), sizes)
    assert ours == pytest.approx(theirs, rel=1e-12)
