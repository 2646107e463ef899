"""Boxes and clusters, counted byte by byte, and the driver's rules."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.chips import nvidia_gpu as nv


@given(
    shape=st.tuples(st.integers(1, 5).map(lambda n: 8 * n), st.integers(1, 9)),
    box=st.tuples(st.sampled_from([8, 16, 32]), st.integers(1, 5)),
    start=st.tuples(st.integers(-20, 50), st.integers(-6, 12)),
    gap=st.sampled_from([0, 16, 48]),
)
def test_a_box_is_read_where_it_lies_in_the_tensor(shape, box, start, gap):
    stride = 2 * shape[0] + gap
    made = nv.TensorMap(shape, box, 2, (stride,))
    bytes_ = {
        y * stride + 2 * x + byte
        for x in range(start[0], start[0] + box[0])
        for y in range(start[1], start[1] + box[1])
        for byte in range(2)
        if 0 <= x < shape[0] and 0 <= y < shape[1]
    }
    assert made.read(start) == (len(bytes_), len({b // 32 for b in bytes_}))
    assert made.bytes == 2 * box[0] * box[1]


def test_a_box_over_the_edge_still_fills_shared_memory():
    made = nv.TensorMap((112, 70), (64, 64))
    assert made.bytes == 8192
    assert made.read((64, 64)) == (48 * 6 * 2, 6 * 3)
    assert made.read((200, 0)) == (0, 0)


def test_three_dimensions_of_a_cache():
    """Head 1 of 3, tokens 8 to 24 of 30: rows of 128 bytes, 384 apart."""
    made = nv.TensorMap((64, 3, 30), (64, 1, 16))
    assert made.steps == (128, 384)
    assert made.read((0, 1, 8)) == (16 * 128, 16 * 4)


@given(
    tile=st.tuples(*[st.integers(1, 4)] * 3),
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    cluster=st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (4, 2), (1, 8)]),
)
def test_clusters_read_each_tile_once(tile, blocks, cluster):
    m, n, k = tile
    down, right = blocks[0] * cluster[0], blocks[1] * cluster[1]
    read = set()
    for i, j, step in itertools.product(range(down), range(right), range(blocks[2])):
        group = (i // cluster[0], j // cluster[1])
        read.add(("A", group, i, step, m * k))
        read.add(("B", group, j, step, k * n))
    size = (down * m, right * n, blocks[2] * k)
    expected = 2 * sum(each[-1] for each in read)
    assert nv.multicast(size, tile, cluster) == expected


def test_uneven_products_have_whole_tiles():
    assert nv.multicast((100, 50, 30), (64, 64, 32)) == 2 * (64 + 64) * 32 * 2


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"box": (64,)}, "dimensions"),
        ({"shape": (), "box": ()}, "dimensions"),
        ({"shape": (8,) * 6, "box": (8,) * 6}, "dimensions"),
        ({"width": 3}, "width=3"),
        ({"shape": (64, 0)}, "must be positive"),
        ({"box": (64, 257)}, "from 1 to 256"),
        ({"box": (0, 8)}, "from 1 to 256"),
        ({"box": (60, 8)}, "rows of 120 bytes: they must be a multiple of 16"),
        ({"swizzle": 96}, "swizzle=96"),
        ({"box": (64, 8), "swizzle": 64}, "must not be longer"),
        ({"strides": (132,)}, "1 multiples of 16"),
        ({"strides": (128, 128)}, "1 multiples of 16"),
        ({"shape": (65, 64)}, "1 multiples of 16"),
    ],
)
def test_what_the_driver_refuses(case, words):
    with pytest.raises(ValueError, match=words):
        nv.TensorMap(**({"shape": (64, 64), "box": (64, 8)} | case))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"tile": (0, 1, 1)}, "must be positive"),
        ({"cluster": (4, 4)}, "more than 8"),
        ({"cluster": (3, 1)}, "must divide"),
        ({"cluster": (1, 3)}, "must divide"),
    ],
)
def test_impossible_clusters_are_refused(case, words):
    arguments = {"size": (64, 64, 64), "tile": (16, 16, 16), "cluster": (2, 2)} | case
    with pytest.raises(ValueError, match=words):
        nv.multicast(**arguments)


def test_a_start_of_another_rank_is_refused():
    with pytest.raises(ValueError, match="2 dimensions"):
        nv.TensorMap((64, 64), (64, 8)).read((0,))
