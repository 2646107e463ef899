"""Fragments against PTX' words and part 08's matrices; peaks against data sheets."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from llmlab.chips import nvidia_gpu as nv
from llmlab.compilers.triton_kernels import Job, TensorCore, linear, stored
from llmlab.models.chips import chip


def ptx(matrix, lane, i):
    """The guide's own words, line by line."""
    group, in_group = lane >> 2, lane % 4
    if matrix == "A":
        row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
        col = in_group * 2 + (i & 1) if i < 4 else in_group * 2 + (i & 1) + 8
    elif matrix == "B":
        row = in_group * 2 + (i & 1) if i < 2 else in_group * 2 + (i & 1) + 8
        col = group
    else:
        row = group if i < 2 else group + 8
        col = in_group * 2 + (i & 1)
    return row, col


@pytest.mark.parametrize(
    ("matrix", "rows", "cols"), [("A", 16, 16), ("B", 16, 8), ("C", 16, 8)]
)
def test_fragments_are_those_of_the_guide(matrix, rows, cols):
    places = itertools.product(range(32), range(rows * cols // 32))
    found = {place: nv.element(matrix, *place) for place in places}
    assert found == {place: ptx(matrix, *place) for place in found}
    assert sorted(found.values()) == list(itertools.product(range(rows), range(cols)))
    for place, at in found.items():
        assert nv.owner(matrix, *at) == place


def test_the_instruction_multiplies():
    rng = np.random.default_rng(0)
    a, b = rng.random((16, 16), np.float32), rng.random((16, 8), np.float32)
    c = rng.random((16, 8), np.float32)
    held = [nv.fragments(name, m) for name, m in (("A", a), ("B", b), ("C", c))]
    assert [each.shape for each in held] == [(32, 8), (32, 4), (32, 4)]
    np.testing.assert_allclose(nv.gathered("C", nv.mma(*held)), a @ b + c, rtol=1e-6)


def test_part_08_reads_the_same_from_tritons_layouts():
    layout = linear(TensorCore(2, (1, 1), (16, 8)), (16, 8))
    for lane, i in itertools.product(range(32), range(4)):
        assert layout.element(i, lane, 0) == nv.element("C", lane, i)
    wide = linear(TensorCore(3, (4, 1), (16, 64, 16)), (64, 64))
    for thread, i in itertools.product(range(128), range(32)):
        at = wide.element(i, thread % 32, thread // 32)
        assert at == nv.wgmma_element(thread, i, 64)


@pytest.mark.parametrize("n", [8, 24, 256])
def test_wgmmas_result_has_each_element_once(n):
    found = [
        nv.wgmma_element(t, i, n) for t in range(128) for i in range(64 * n // 128)
    ]
    assert sorted(found) == list(itertools.product(range(64), range(n)))


@pytest.mark.parametrize(("target", "warps"), [("sm_80", 4), ("sm_90", 1)])
def test_compiled_products_add_up(target, warps):
    """What Triton made of 64 × 64 × 64: its instructions do all FLOPs, and no more."""
    products = stored.of(Job("one_dot", target))["products"]
    m, n, k = next(iter(products.values()))["shape"]
    count = sum(each["count"] for each in products.values())
    assert count * 2 * m * n * k * warps == 2 * 64**3


def test_tritons_swizzle_is_that_of_tma():
    """Part 08's tile of 64 × 64 in 16 bits, on sm_80: rows of 128 bytes."""
    layout = stored.of(Job("one_dot", "sm_80"))["layouts"]["#shared"]
    numbers = [int(n) for n in re.findall(r"(?:vec|perPhase|maxPhase) = (\d+)", layout)]
    vec, per_phase, phases = numbers
    row, col = np.divmod(np.arange(64 * 64), 64)
    piece = col // vec ^ row // per_phase % phases
    theirs = 2 * (64 * row + piece * vec + col % vec)
    np.testing.assert_array_equal(theirs, nv.swizzle(2 * (64 * row + col)))


@pytest.mark.parametrize("name", nv.generations())
def test_peaks_are_those_of_the_data_sheets(name):
    made = nv.generations()[name]
    assert made.peak == pytest.approx(chip(name).speed(made.format), rel=0.005)
    assert made.capability in nv.capabilities()


def test_each_source_is_in_the_bibliography():
    folder = Path(__file__).parents[3] / "jupyter-book" / "references"
    text = "".join(p.read_text(encoding="utf-8") for p in folder.glob("*.bib"))
    sources = {key for made in nv.generations().values() for key in made.sources}
    sources |= {sm.source for sm in nv.capabilities().values()}
    assert [key for key in sources if f"{{{key}," not in text] == []


def test_larger_instructions_ask_for_less():
    assert nv.fed(16, 8, 16, 2048) == 384
    assert nv.fed(64, 256, 16, 4096) == 80 < nv.SHARED_PER_CLOCK
    assert nv.fed(64, 256, 16, 8192) == 160 > nv.SHARED_PER_CLOCK
    assert nv.fed(128, 256, 16, 8192) == 96
    # k does not matter, half the width halves it
    assert nv.fed(128, 256, 32, 8192, width=1) == 48


def test_littles_law():
    assert nv.in_flight(900e9, 300e-9) == pytest.approx(270e3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: nv.element("D", 0, 0), "matrix='D'"),
        (lambda: nv.element("A", 32, 0), "lane=32"),
        (lambda: nv.element("B", 0, 4), "i=4"),
        (lambda: nv.owner("E", 0, 0), "matrix='E'"),
        (lambda: nv.owner("C", 0, 8), "outside of 16 × 8"),
        (lambda: nv.wgmma_element(0, 0, 12), "n=12"),
        (lambda: nv.wgmma_element(128, 0, 8), "thread=128"),
        (lambda: nv.wgmma_element(0, 4, 8), "i=4"),
        (lambda: nv.fed(0, 8, 16, 1), "m=0"),
        (lambda: nv.fed(16, 8, 16, 1, width=0), "width=0"),
        (lambda: nv.in_flight(1, 0), "latency=0"),
    ],
)
def test_nonsense_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
