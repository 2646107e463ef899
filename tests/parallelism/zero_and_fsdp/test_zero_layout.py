"""How parameters are cut: cut and join undo each other, for uneven shapes and more
ranks than rows.
"""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.parallelism.zero_and_fsdp.layout import (
    LAYOUTS,
    cut_rows,
    padding,
    shard_bounds,
)

SHAPES = st.lists(
    st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple),
    min_size=1,
    max_size=5,
)


def numbered(shapes):
    """Tensors that hold 1, 2, 3, …: no number twice, no zero."""
    tensors, start = [], 1
    for shape in shapes:
        tensors.append(
            torch.arange(start, start + prod(shape), dtype=torch.float32).view(shape)
        )
        start += prod(shape)
    return tensors


@settings(deadline=None, max_examples=80)
@given(SHAPES, st.integers(1, 9), st.sampled_from(sorted(LAYOUTS)))
def test_join_undoes_cut(shapes, p, layout):
    cut, join = LAYOUTS[layout]
    tensors = numbered(shapes)
    pieces = cut(tensors, p)
    assert pieces.shape[0] == p
    again = join(pieces, shapes)
    assert all(
        torch.equal(a, b) and a.shape == b.shape
        for a, b in zip(again, tensors, strict=True)
    )
    total = sum(t.numel() for t in tensors)
    assert sorted(pieces.flatten().tolist())[pieces.numel() - total :] == [
        float(i) for i in range(1, total + 1)
    ]
    assert (
        pieces.numel() - total
        == padding(shapes, p, layout)
        == (pieces == 0).sum().item()
    )


def test_cut_takes_what_is_not_contiguous():
    x = torch.arange(15.0).view(3, 5)
    for cut, join in LAYOUTS.values():
        (again,) = join(cut([x.T], 4), [(5, 3)])
        assert torch.equal(again, x.T)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
def test_rows_are_torch_chunks(p):
    """FSDP2 keeps `torch.chunk(weight, p)[rank]`: ⌈rows/p⌉ rows each, the last ranks
    fewer or none.
    """
    w, b = numbered([(5, 3), (7,)])
    pieces = cut_rows([w, b], p)
    width = -(-5 // p) * 3
    for r in range(p):
        for whole, mine in ((w, pieces[r, :width]), (b, pieces[r, width:])):
            chunks = whole.chunk(p)
            chunk = chunks[r].flatten() if r < len(chunks) else whole.new_empty(0)
            assert (
                torch.equal(mine[: len(chunk)], chunk) and not mine[len(chunk) :].any()
            )


@pytest.mark.parametrize(("n", "p"), [(10, 4), (3, 8), (0, 2), (8, 8), (7, 1)])
def test_bounds_cover_each_element_once(n, p):
    owned = [i for r in range(p) for i in range(*shard_bounds(n, p, r))]
    assert owned == list(range(n))
    lengths = [
        stop - start for start, stop in (shard_bounds(n, p, r) for r in range(p))
    ]
    assert lengths == sorted(lengths, reverse=True) and max(lengths) == -(-n // p)


def test_flat_pads_less():
    shapes = [(5, 3), (5,), (3,)]
    assert padding(shapes, 8, "flat") == 1
    assert padding(shapes, 8, "rows") == 3 * 3 + 3 + 5


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="layout='columns'"):
        padding([(2,)], 2, "columns")
    with pytest.raises(ValueError, match="rank=2"):
        shard_bounds(4, 2, 2)
