"""Fractals: back and forth, number by number, and as the documentation has them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmlab.chips.ascend_and_other_accelerators import layout

sizes = st.integers(1, 45)
layouts = st.sampled_from([*layout.ORDERS])


@given(h=sizes, w=sizes, which=layouts, rows=st.integers(1, 9), cols=st.integers(1, 9))
def test_there_and_back(h, w, which, rows, cols):
    x = torch.arange(2 * h * w).reshape(2, h, w)
    cut = layout.to_fractals(x, which, rows, cols)
    assert torch.equal(layout.from_fractals(cut, h, w, which), x)
    assert cut.is_contiguous()
    assert cut.sum() == x.sum()  # the rest is zeros


@given(h=sizes, w=sizes, rows=st.integers(1, 9), cols=st.integers(1, 9))
def test_every_number_lies_where_the_formula_says(h, w, rows, cols):
    x = 1 + torch.arange(h * w).reshape(h, w)
    flat = layout.to_fractals(x, "NZ", rows, cols).flatten()
    for row in range(h):
        for col in range(w):
            assert flat[layout.nz_offset(row, col, h, rows, cols)] == x[row, col]


def test_the_shapes_of_the_documentation():
    """CANN, TransdataOperation: {8, 100, 30} becomes {8, 2, 112, 16} in 16 bits."""
    x = torch.zeros(8, 100, 30)
    cut = layout.to_fractals(x)
    assert cut.flatten(2, 3).shape == (8, 2, 112, 16)
    assert layout.to_fractals(x, cols=32).flatten(2, 3).shape == (8, 1, 112, 32)


def test_four_by_four_in_fractals_of_two():
    x = torch.arange(16).reshape(4, 4)
    orders = {
        "NZ": [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15],
        "ZZ": [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15],
        "ZN": [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15],
    }
    for which, wanted in orders.items():
        found = layout.to_fractals(x, which, 2, 2).flatten().tolist()
        assert found == wanted, which


@given(m=sizes, k=sizes, n=sizes, seed=st.integers(0, 9))
def test_the_cubes_product_is_the_product(m, k, n, seed):
    draw = torch.Generator().manual_seed(seed)
    a = torch.randint(-9, 10, (m, k), generator=draw)
    b = torch.randint(-9, 10, (k, n), generator=draw)
    c = layout.cube_product(layout.to_fractals(a, "ZZ"), layout.to_fractals(b, "ZN"))
    assert torch.equal(layout.from_fractals(c, m, n), a @ b)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: layout.to_fractals(torch.ones(2, 2), "NN"), "layout='NN'"),
        (lambda: layout.to_fractals(torch.ones(2, 2), rows=0), "rows=0"),
        (lambda: layout.nz_offset(4, 0, 4), "row=4"),
        (lambda: layout.nz_offset(0, -1, 4), "col=-1"),
        (
            lambda: layout.from_fractals(torch.ones(1, 2, 16, 16), 33, 3),
            "height=33 does not take 2 fractals of 16",
        ),
        (
            lambda: layout.from_fractals(torch.ones(2, 1, 16, 16), 3, 16),
            "width=16 does not take 2 fractals",
        ),
        (
            lambda: layout.cube_product(
                torch.ones(1, 2, 16, 16), torch.ones(3, 1, 16, 16)
            ),
            "do not meet along k",
        ),
    ],
)
def test_nonsense_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
