"""Generations against the file of chips; shapes and tiles against counting."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmlab.chips import tpu
from llmlab.models.presets import preset

# the clock that is published, in GHz: Jouppi et al. 2017, Austin et al. 2025
PUBLISHED = {"TPU v1": 0.7, "TPU v5e": 1.5}


@pytest.mark.parametrize("name", PUBLISHED)
def test_peaks_are_units_times_clock(name):
    made = tpu.GENERATIONS[name]
    assert made.clock / 1e9 == pytest.approx(PUBLISHED[name], rel=0.005)


def test_two_units_of_v6e_would_need_twice_the_clock():
    v5e, v6e = tpu.GENERATIONS["TPU v5e"], tpu.GENERATIONS["TPU v6e"]
    assert v6e.clock / v5e.clock == pytest.approx(2.33, abs=0.01)
    assert v6e.array == tpu.Array(256, 256, "weight", True)


@pytest.mark.parametrize("tokens", [1, 7, 128])
def test_a_layer_is_its_seven_products(tokens):
    config, one = preset("smollm2-135m"), tpu.Array(128, 128, "weight", True)
    runs = tpu.layer_runs(config, tokens, one)
    assert len(runs) == 7
    down = runs["mlp.down_proj"]
    assert (down.m, down.k, down.n) == (tokens, 1536, 576)
    macs = sum(run.macs for run in runs.values())
    cells = sum(128 * 128 * run.cycles for run in runs.values())
    assert tpu.utilisation([*runs.values()]) == macs / cells
    with pytest.raises(ValueError, match="runs is empty"):
        tpu.utilisation([])


def test_edges_of_small_layers_waste_large_arrays():
    config = preset("smollm2-135m")
    for side, limit in ((128, 0.864), (256, 0.692)):
        one = tpu.Array(side, side, "weight", True)
        runs = [*tpu.layer_runs(config, 10**6, one).values()]
        assert tpu.mapping(runs) == pytest.approx(limit, abs=5e-4)
        assert tpu.utilisation(runs) == pytest.approx(tpu.mapping(runs), rel=1e-3)


@pytest.mark.parametrize("name", ["llama-7b", "smollm2-135m"])
@pytest.mark.parametrize(("side", "share"), [(128, 0.1), (128, 0.9), (256, 0.5)])
def test_the_fewest_tokens_by_trying(name, side, share):
    config, one = preset(name), tpu.Array(side, side, "weight", True)
    found = tpu.tokens_for(config, one, share)

    def part(tokens):
        runs = [*tpu.layer_runs(config, tokens, one).values()]
        return tpu.utilisation(runs) / tpu.mapping(runs)

    assert part(found) >= share > part(found - 1)
    if name == "llama-7b":  # nothing is lost at edges, little at both ends
        assert found == pytest.approx(share * side, rel=0.05)


@given(shape=st.lists(st.integers(1, 300), min_size=1, max_size=4))
def test_tiles_hold_the_array_and_no_tile_is_empty(shape):
    full = tpu.padded(shape)
    assert full[-1] % 128 == full[-2] % 8 == 0
    grown = torch.Size([1, *shape] if len(shape) == 1 else shape)
    assert full[:-2] == tuple(grown[:-2])
    for size, whole, unit in zip(grown[-2:], full[-2:], tpu.TILE, strict=True):
        assert size <= whole < size + unit
    assert tpu.padded_bytes(shape, 2) == 2 * math.prod(full)


def test_tiles_by_hand():
    assert tpu.padded((1, 4096)) == (8, 4096)
    assert tpu.padded((576,)) == (8, 640)
    assert tpu.padded((2, 3, 9, 64), (16, 128)) == (2, 3, 16, 128)
    with pytest.raises(ValueError, match=r"shape\[1\]=0"):
        tpu.padded((3, 0))
    with pytest.raises(ValueError, match="no dimension"):
        tpu.padded(())
    with pytest.raises(ValueError, match="itemsize=0"):
        tpu.padded_bytes((3, 3), 0)
    for share in (0, 1):
        with pytest.raises(ValueError, match=f"share={share} must lie between"):
            tpu.tokens_for(preset("llama-7b"), tpu.Array(8, 8), share)
