"""The arithmetic of the first lesson."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmlab.course.syllabus import course_root
from llmlab.models.accounting import kv_cache_bytes, parameters
from llmlab.models.presets import preset
from llmlab.start import welcome


def test_weight_bytes():
    assert [
        welcome.weight_bytes(*a)
        for a in [(1000, 16), (7, 4), (11, 3), (1, 1), (1000, 4.5)]
    ] == [
        2000,
        4,
        5,
        1,
        563,
    ]
    assert welcome.weight_bytes(10**15 + 1, 8) == 10**15 + 1


@given(
    st.floats(1e6, 1e12), st.floats(1e9, 1e14), st.integers(1, 4096), st.floats(0, 1e11)
)
def test_tokens_per_second_lies_between_its_limits(W, beta, b, C):
    """One reader's speed ≤ it ≤ b times that, and never more than β / C."""
    speed = welcome.tokens_per_second(W, beta, b, C)
    one = welcome.tokens_per_second(W, beta, 1, C)
    assert one * (1 - 1e-9) <= speed <= b * one * (1 + 1e-9)
    assert C == 0 or speed * C <= beta * (1 + 1e-9)
    # tokens per second × bytes per step = b·β
    assert speed * (W + b * C) == pytest.approx(b * beta)


def test_dollars():
    assert welcome.dollars_per_million_tokens(3.6, 1000) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softmax_is_torchs(dtype):
    torch.manual_seed(0)
    x = 1000 * torch.randn(3, 5, 7, dtype=dtype)
    x[0, 0, 0] = -torch.inf
    x.requires_grad_()
    ours, theirs = welcome.softmax(x), torch.softmax(x, -1)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn(3, 5, 7, dtype=dtype)
    ours_grad = torch.autograd.grad((ours * weights).sum(), x)[0]
    theirs_grad = torch.autograd.grad((theirs * weights).sum(), x)[0]
    torch.testing.assert_close(ours_grad, theirs_grad)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: welcome.weight_bytes(0), "params=0"),
        (lambda: welcome.weight_bytes(1, -4), "bits=-4"),
        (lambda: welcome.tokens_per_second(0, 1), "weight_bytes=0"),
        (lambda: welcome.tokens_per_second(1, 1, batch=0), "batch=0"),
        (lambda: welcome.tokens_per_second(1, 1, 1, -1), "cache_bytes=-1"),
        (lambda: welcome.dollars_per_million_tokens(-1, 1), "dollars_per_hour=-1"),
        (lambda: welcome.dollars_per_million_tokens(1, 0), "tokens_per_second=0"),
    ],
)
def test_wrong_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_what_to_keep_is_what_the_formulas_give():
    """The numbers that the lesson's prose states."""
    root = course_root()
    prose = (
        (root / "notebooks/01-start/01-welcome.py")
        .read_text(encoding="utf-8")
        .split("## What to keep")[1]
    )
    llama = preset("llama-2-70b")
    W, C = welcome.weight_bytes(parameters(llama)), kv_cache_bytes(llama, 1, 4096)
    alone = welcome.tokens_per_second(W, 6.7e12)
    small = welcome.weight_bytes(parameters(llama), 4.5)
    most = int((160e9 - small) // C)
    cheap = welcome.dollars_per_million_tokens(
        6, welcome.tokens_per_second(small, 6.7e12, most, C)
    )
    dear = welcome.dollars_per_million_tokens(6, alone)
    together = welcome.tokens_per_second(W, 6.7e12, 16, C)
    said = [
        f"{W / 1e9:.0f} GB",
        f"{alone:.0f} tokens",
        f"{together / alone:.1f} times",
        f"{dear:.0f} dollars",
        f"{100 * cheap:.0f} cents",
        f"{dear / cheap:.0f} times",
    ]
    plain = re.sub(r"\s*\n#\s*", " ", prose)
    assert [s for s in said if s not in plain] == []
