"""The model that ranks tiles."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from llmlab.compilers.triton_kernels import stored, tuning
from llmlab.compilers.triton_kernels.tuning import A100, H100, Problem

SMALL = {"ROWS": 64, "COLS": 64, "DEPTH": 32, "GROUP": 8}
NEEDS = {"shared": 24 * 1024, "registers": 64, "warps": 4, "spilled": 0}
NEEDS |= {"constants": SMALL}
LARGE = Problem(4096, 4096, 4096)


@pytest.mark.parametrize(
    ("change", "tiles", "limit"),
    [
        ({}, 6, "shared memory"),  # 164 // 25
        ({"shared": 0}, 8, "registers"),  # 65536 // (64 · 128)
        ({"shared": 0, "registers": 73}, 6, "registers"),  # 80: given by eights
        ({"shared": 0, "registers": 16}, 16, "warps"),
        ({"shared": 0, "registers": 16, "warps": 1}, 32, "tiles"),
        # 5 warps of 3,072 registers in each of four parts; a whole would hold 21
        ({"shared": 0, "registers": 96, "warps": 1}, 20, "registers"),
        ({"shared": 164 * 1024}, 0, "shared memory"),
        ({"registers": 255, "warps": 16}, 0, "registers"),
    ],
)
def test_occupancy(change, tiles, limit):
    assert tuning.occupancy(NEEDS | change, A100) == (tiles, limit)


def test_what_a_tile_may_have_is_less_than_what_there_is():
    needs = NEEDS | {"shared": int(163.5 * 1024) - 1024, "registers": 8}
    assert tuning.occupancy(needs, A100)[0] == 1
    # one tile may have 163 KB, although a processor has 164
    assert tuning.occupancy(needs | {"shared": 163 * 1024 + 1}, A100)[0] == 0


def test_refusals():
    def words(**change):
        return tuning.refusal(NEEDS | change, A100, LARGE)

    assert words() == ""
    assert words(shared=200 * 1024) == "too little of shared memory"
    assert words(spilled=64).startswith("64 bytes of registers per thread")
    narrow = Problem(16, 4096, 4096)
    assert "half of its rows" in tuning.refusal(NEEDS, A100, narrow)
    assert "half of its columns" in tuning.refusal(NEEDS, A100, Problem(4096, 64, 32))
    assert tuning.refusal(NEEDS, A100, Problem(33, 64, 33)) == ""


def test_one_wave_and_two():
    """Twice as many tiles as there is room for take twice as long, one more as well."""
    room = A100.processors * 6
    one = tuning.seconds(NEEDS, A100, Problem(64, 4096, 64 * room))
    more = tuning.seconds(NEEDS, A100, Problem(64, 4096, 64 * (room + 1)))
    two = tuning.seconds(NEEDS, A100, Problem(64, 4096, 128 * room))
    assert one < more == two == pytest.approx(2 * one)


def test_the_model_is_the_roofline_where_all_processors_work():
    """A full wave of products takes FLOPs over peak, unless bytes take longer."""
    room = A100.processors * 6
    problem = Problem(64 * 8, 8192, 64 * room // 8)
    flops = 2 * problem.T * problem.d * problem.f
    fast = replace(A100, cache=math.inf)
    assert tuning.seconds(NEEDS, fast, problem) == pytest.approx(flops / A100.flops)
    # each tile loads 64 rows and 64 columns
    loads = 2 * room * problem.d * 128 / A100.cache
    assert tuning.seconds(NEEDS, A100, problem) == pytest.approx(loads)
    slow = replace(A100, bandwidth=A100.bandwidth / 1e4)
    assert tuning.seconds(NEEDS, slow, problem) > 10 * flops / A100.flops
    assert tuning.seconds(NEEDS | {"shared": 1 << 20}, A100, problem) == math.inf


def test_larger_tiles_win_where_there_is_much_and_small_ones_where_there_is_little():
    def best(target, gpu, problem):
        fit = [
            c for c in stored.candidates(target) if not tuning.refusal(c, gpu, problem)
        ]
        return min(fit, key=lambda c: tuning.seconds(c, gpu, problem))["constants"]

    for target, gpu in (("sm_80", A100), ("sm_90", H100)):
        many, few = best(target, gpu, LARGE), best(target, gpu, Problem(16, 4096, 4096))
        assert many["ROWS"] * many["COLS"] >= 128 * 128
        assert few["ROWS"] == 16


def test_candidates_that_spill_or_do_not_fit_are_among_those_kept():
    for target, gpu in (("sm_80", A100), ("sm_90", H100)):
        refused = [tuning.refusal(c, gpu, LARGE) for c in stored.candidates(target)]
        assert "" in refused and any(refused)
