"""Cycles, tiles and traffic by counting one by one; peaks against printed figures."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.chips.ascend_and_other_accelerators import core as c
from llmlab.models.chips import chip

ASCEND = c.core("Ascend 910")
sizes = st.integers(1, 70)


@pytest.mark.parametrize(("format", "tolerance"), [("fp16", 0.025), ("int8", 0.025)])
def test_the_printed_peak_is_cores_times_cube_times_clock(format, tolerance):
    printed = chip("Ascend 910").flops[format]
    assert c.peak(ASCEND, format) == pytest.approx(printed, rel=tolerance)
    assert c.peak(ASCEND) == 32 * 8192 * 1e9
    assert c.peak(ASCEND, "int8") == 2 * c.peak(ASCEND)


def test_8192_mac_would_be_twice_the_printed_peak():
    doubled = 32 * 2 * 8192 * 1e9
    assert doubled > 2 * chip("Ascend 910").flops["fp16"]


def test_the_memory_that_the_cores_see_together():
    assert ASCEND.cores * ASCEND.memory_rate * ASCEND.hertz == 1.024e12


def test_the_vector_units_compute_a_64th():
    assert c.peak(ASCEND) / c.vector_peak(ASCEND) == 64
    assert c.peak(c.core("Ascend 910B")) / c.vector_peak(c.core("Ascend 910B")) == 32


@given(m=sizes, k=sizes, n=sizes, format=st.sampled_from(["fp16", "int8", "int4"]))
def test_cycles_of_the_cube_one_by_one(m, k, n, format):
    m0, k0, n0 = c.step(format)
    counted = sum(
        1 for _ in range(0, m, m0) for _ in range(0, k, k0) for _ in range(0, n, n0)
    )
    assert c.cube_cycles(m, k, n, format) == counted
    assert 0 < c.used(m, k, n, format) <= 1
    whole = m % m0 == k % k0 == n % n0 == 0
    assert (c.used(m, k, n, format) == 1) == whole


def test_one_row_uses_a_sixteenth():
    assert c.used(1, 576, 1536) == 1 / 16


@given(
    m=sizes,
    k=sizes,
    n=sizes,
    tile=st.builds(c.Tile, sizes, sizes, sizes),
    format=st.sampled_from(["fp16", "int8"]),
)
def test_traffic_and_cycles_tile_by_tile(m, k, n, tile, format):
    size = c.number_bytes(format)
    a = b = steps = 0
    for i in range(0, m, tile.m):
        for j in range(0, n, tile.n):
            for x in range(0, k, tile.k):
                rows = min(tile.m, m - i)
                cols = min(tile.n, n - j)
                deep = min(tile.k, k - x)
                a += rows * deep * size
                b += deep * cols * size
                steps += c.cube_cycles(rows, deep, cols, format)
    moved = c.product_bytes(m, k, n, tile, format)
    assert (moved["a"], moved["b"], moved["c"]) == (a, b, 2 * m * n)
    if not c.overflows(ASCEND, tile, format):
        assert c.product_cycles(ASCEND, m, k, n, tile, format)["M"] == steps


@pytest.mark.parametrize(
    ("tile", "over"),
    [
        ((128, 128, 128), []),  # 64 KB, 64 KB and 128 KB: to the last byte
        ((129, 128, 128), ["l0a"]),  # a row more is a fractal more
        ((128, 128, 129), ["l0b"]),
        ((256, 64, 128), []),
        ((256, 64, 129), ["l0c"]),
        ((256, 65, 256), ["l0a", "l0b", "l0c"]),
    ],
)
def test_what_fits_twice(tile, over):
    assert c.overflows(ASCEND, c.Tile(*tile)) == over


def test_once_is_half_as_much_and_int8_pads_to_32():
    tile = c.Tile(100, 20, 30)
    assert c.tile_bytes(tile) == {
        "l0a": 2 * 112 * 32 * 2,
        "l0b": 2 * 32 * 32 * 2,
        "l0c": 2 * 112 * 32 * 4,
    }
    assert c.tile_bytes(tile, "int8", double=False) == {
        "l0a": 112 * 32,
        "l0b": 32 * 32,
        "l0c": 112 * 32 * 4,
    }
    assert c.overflows(ASCEND, c.Tile(256, 64, 256)) == ["l0c"]
    assert c.overflows(ASCEND, c.Tile(256, 64, 256), double=False) == []


def test_the_smaller_sums_of_the_910b_hold_smaller_tiles():
    tile = c.Tile(256, 64, 128)
    assert c.overflows(c.core("Ascend 910B"), tile) == ["l0c"]
    assert c.tiles(c.core("Ascend 910B")) != c.tiles(ASCEND)


@pytest.mark.parametrize("shape", [(2048, 4096, 4096), (16, 576, 1536), (64, 64, 64)])
@pytest.mark.parametrize("feed", ["l2", "memory"])
def test_the_best_tile_is_the_best_of_all(shape, feed):
    tile, cycles = c.best_tile(ASCEND, *shape, feed=feed)
    assert not c.overflows(ASCEND, tile)
    all_of_them = [
        max(c.product_cycles(ASCEND, *shape, each, feed=feed).values())
        for each in c.tiles(ASCEND)
    ]
    assert max(cycles.values()) == min(all_of_them)


def test_a_core_alone_cannot_be_fed_from_memory():
    """It takes 256 FLOP per byte, and L0C allows 128 × 256 sums at a time."""
    _, cycles = c.best_tile(ASCEND, 2048, 4096, 4096, feed="memory")
    assert cycles["MTE2"] == pytest.approx(3 * cycles["M"])
    _, cycles = c.best_tile(ASCEND, 2048, 4096, 4096, feed="l2")
    assert max(cycles, key=cycles.get) == "M"


def test_when_the_road_to_l0_is_too_narrow():
    """1 ≥ 16/n + 32/m: squares of 32 wait for MTE1, squares of 64 do not."""
    for side, bound in ((32, True), (64, False)):
        cycles = c.product_cycles(ASCEND, 512, 512, 512, c.Tile(side, 64, side))
        assert cycles["MTE1"] / cycles["M"] == pytest.approx(48 / side)
        assert (cycles["MTE1"] > cycles["M"]) == bound


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: c.core("Ascend 7"), "name='Ascend 7'"),
        (lambda: c.Core("x", cores=0, hertz=1e9), "cores=0"),
        (lambda: c.Core("x", cores=1, hertz=1e9, l1=-1), "l1=-1"),
        (lambda: c.Core("x", cores=1, hertz=math.nan), "hertz=nan"),
        (lambda: c.peak(ASCEND, "bf17"), "format='bf17'"),
        (lambda: c.cube_cycles(0, 1, 1), "m=0"),
        (lambda: c.cube_cycles(1, 1, 2.5), "n=2.5"),
        (lambda: c.Tile(1, -2, 3), "k=-2"),
        (
            lambda: c.product_cycles(ASCEND, 1, 1, 1, c.Tile(512, 512, 16)),
            "does not fit twice into l0a",
        ),
        (
            lambda: c.product_cycles(ASCEND, 1, 1, 1, c.Tile(16, 16, 16), feed="disk"),
            "feed='disk'",
        ),
    ],
)
def test_nonsense_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
