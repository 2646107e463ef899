"""Occupancy: what NVIDIA's guides and its calculator say, and the calculator's rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.chips import nvidia_gpu as nv

KB = 1024
# capability, threads, registers, shared → blocks, warps
PUBLISHED = {
    # CUDA C++ Best Practices Guide, 11.1.1
    "37 registers, 128 threads: 75%": ("7.0", 128, 37, 0, 12, 48),
    "37 registers, 320 threads: 63%": ("7.0", 320, 37, 0, 4, 40),
    # CUDA C++ Programming Guide, multiprocessor level: registers and warps as of 6.x
    "64 registers, 512 threads: 32 warps": ("7.0", 512, 64, 0, 2, 32),
    "65 registers, 512 threads: 16 warps": ("7.0", 512, 65, 0, 1, 16),
    # CUDA Programming Guide, 2.3.7, compute capability 10.0
    "768 threads: 75%": ("10.0", 768, 40, 0, 2, 48),
    "32 threads: 50%": ("10.0", 32, 32, 0, 32, 32),
    "100 KB": ("10.0", 128, 32, 100 * KB, 2, 8),
    # Nsight Compute, as reported from an A800, an RTX 4060 and a B200
    "46 registers, 512 threads: 50%": ("8.0", 512, 46, 0, 2, 32),
    "56 registers, 1,024 threads: 66.7%": ("8.9", 1024, 56, 0, 1, 32),
    "98.4 KB, 255 registers: 12.5%": ("10.0", 128, 255, 98_400, 2, 8),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_examples(case):
    capability, threads, registers, shared, blocks, warps = PUBLISHED[case]
    found = nv.occupancy(threads, registers, shared, nv.limits(capability))
    assert (found.blocks, found.warps) == (blocks, warps)


def test_the_parts_of_an_sm_matter():
    """65,536 / (1,280 · 10) would be five blocks: but a warp takes from one part."""
    assert 65536 // (1280 * 10) == 5
    assert nv.occupancy(320, 37, 0, nv.limits("7.0")).room["registers"] == 4


@given(threads=st.integers(1, 1024), registers=st.integers(1, 255))
def test_registers_by_the_spreadsheets_rule(threads, registers):
    """NVIDIA's spreadsheet: warps by registers, down to a multiple of four. Before a
    launch, hardware asks whether four parts with as many warps each would fit.
    """
    per_warp = -(-registers * 32 // 256) * 256
    warps = -(-threads // 32)
    held = 65536 // per_warp // 4 * 4 // warps
    fits = per_warp * (-(-warps // 4) * 4) <= 65536
    found = nv.occupancy(threads, registers, 0, nv.limits("9.0"))
    assert found.room["registers"] == (held if fits else 0)


@given(
    threads=st.integers(1, 1024),
    registers=st.integers(1, 255),
    shared=st.integers(0, 260 * KB),
    capability=st.sampled_from([*nv.capabilities()]),
)
def test_what_is_held_fits_and_one_more_does_not(
    threads, registers, shared, capability
):
    sm = nv.limits(capability)
    found = nv.occupancy(threads, registers, shared, sm)
    assert found.warps <= sm.warps and found.blocks <= sm.blocks
    used = -(-(shared + sm.reserved) // sm.shared_unit) * sm.shared_unit
    assert found.blocks * used <= sm.shared
    assert found.share <= 1 and found.limit
    more = nv.occupancy(threads, min(255, registers + 8), shared, sm)
    assert more.blocks <= found.blocks


@pytest.mark.parametrize(
    ("capability", "shared", "blocks"),
    [
        ("7.0", 0, 32),  # nothing is reserved
        ("7.0", 3 * KB, 32),
        ("7.0", 3 * KB + 1, 29),  # a unit of 256 bytes more
        ("8.0", 4 * KB, 32),  # 164 KB / 5 KB
        ("8.0", 4 * KB + KB // 4, 31),
        ("8.0", 163 * KB, 1),
        ("8.0", 163 * KB + 1, 0),
        ("9.0", 113 * KB, 2),  # with 1 KB each: exactly 228
        ("9.0", 113 * KB + 1, 1),
        ("12.0", 99 * KB, 1),
    ],
)
def test_shared_memory_by_its_units(capability, shared, blocks):
    assert nv.occupancy(32, 16, shared, nv.limits(capability)).blocks == blocks


def test_a_block_may_ask_for_what_the_guide_prints():
    """CUDA Programming Guide, technical specifications; Volta Tuning Guide for 7.0."""
    printed = [96, 64, 163, 99, 99, 227, 227, 99]
    found = {name: sm.shared_block // KB for name, sm in nv.capabilities().items()}
    names = ["7.0", "7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
    assert found == dict(zip(names, printed, strict=True))
    for sm in nv.capabilities().values():
        assert nv.occupancy(32, 16, sm.shared_block, sm).blocks == 1
        assert nv.occupancy(32, 16, sm.shared_block + 1, sm).blocks == 0


def test_what_limits_is_named():
    sm = nv.limits("9.0")
    assert nv.occupancy(1024, 32, 0, sm).limit == "warps, registers"
    assert nv.occupancy(32, 16, 0, sm).limit == "blocks"
    assert nv.occupancy(128, 255, 0, sm).limit == "registers"
    assert nv.occupancy(128, 32, 200 * KB, sm).limit == "shared memory"
    none = nv.occupancy(1024, 255, 0, sm)  # too many resources requested for launch
    assert (none.blocks, none.share, none.limit) == (0, 0, "registers")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ((0, 32, 0), "threads=0"),
        ((1025, 32, 0), "threads=1025"),
        ((32, 0, 0), "registers=0"),
        ((32, 256, 0), "registers=256"),
        ((32, 32, -1), "shared=-1"),
    ],
)
def test_nonsense_is_refused(case, words):
    with pytest.raises(ValueError, match=words):
        nv.occupancy(*case, nv.limits("9.0"))


def test_an_unknown_capability_is_refused():
    with pytest.raises(ValueError, match=r"'9\.9' must be one of 7\.0"):
        nv.limits("9.9")
