"""Sectors and bank cycles: NVIDIA's printed cases, and counting lane by lane."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.chips import nvidia_gpu as nv

LANE = np.arange(32)


def strided(stride, offset=0, width=4):
    return (LANE * stride + offset) * width


# CUDA C++ Best Practices Guide, 10.2.1 ------------------------------------------------


def test_adjacent_words_take_four_sectors():
    found = nv.global_memory(strided(1))
    assert (found.sectors, found.lines, found.efficiency) == (4, 1, 1.0)
    permuted = np.random.default_rng(0).permutation(strided(1))
    assert nv.global_memory(permuted).sectors == 4
    some = LANE % 8 == 0  # one lane of each sector: it is fetched whole
    assert nv.global_memory(strided(1), active=some).sectors == 4


@pytest.mark.parametrize("offset", range(33))
def test_misaligned_words_take_five_sectors(offset):
    expected = 4 if offset % 8 == 0 else 5
    assert nv.global_memory(strided(1, offset)).sectors == expected


@pytest.mark.parametrize(
    ("stride", "sectors"), [(1, 4), (2, 8), (3, 12), (4, 16), (8, 32), (32, 32)]
)
def test_strides_take_more_sectors_up_to_one_per_lane(stride, sectors):
    found = nv.global_memory(strided(stride))
    assert found.sectors == sectors
    # "throughput is divided by 8" where each lane takes a sector of its own
    assert found.efficiency == 4 / sectors


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
def test_wide_lanes_share_sectors(width):
    found = nv.global_memory(strided(1, width=width), width)
    assert (found.sectors, found.asked) == (width, 32 * width)
    assert nv.global_memory(strided(32, width=width), width).sectors == 32


def test_lines_are_four_sectors():
    assert nv.global_memory(strided(32)).lines == 32
    assert nv.global_memory(strided(8)).lines == 8
    assert nv.global_memory(strided(1, 1)).lines == 2


# CUDA Programming Guide, 2.2.4.2 ------------------------------------------------------


@pytest.mark.parametrize(("stride", "cycles"), [(1, 1), (2, 2), (3, 1), (32, 32)])
def test_strided_words_of_shared_memory(stride, cycles):
    assert nv.shared_memory(strided(stride)).cycles == cycles


def test_a_permutation_has_no_conflict():
    words = np.random.default_rng(1).permutation(strided(1))
    assert nv.shared_memory(words).conflicts == 0


def test_lanes_3_4_6_7_and_9_share_a_word_of_bank_5():
    words = LANE.copy()
    words[[3, 4, 6, 7, 9]] = 5
    assert nv.shared_memory(4 * words).cycles == 1
    words[9] = 5 + 32  # another word of bank 5
    assert nv.shared_memory(4 * words).cycles == 2


def test_one_word_for_all_is_a_broadcast():
    assert nv.shared_memory(np.full(32, 20)).cycles == 1


@pytest.mark.parametrize(("columns", "cycles"), [(32, 32), (33, 1)])
def test_a_column_of_a_tile(columns, cycles):
    assert nv.shared_memory(4 * columns * LANE).cycles == cycles


def test_wide_lanes_come_in_phases():
    assert nv.shared_memory(strided(1, width=8), 8) == nv.BankCycles(1, 2, 2)
    assert nv.shared_memory(strided(1, width=16), 16) == nv.BankCycles(1, 4, 4)
    # NVIDIA's forum, 339143: 32 lanes load 16 bytes each, all of the same four banks
    assert nv.shared_memory(128 * LANE, 16) == nv.BankCycles(1, 32, 4)


def test_bytes_of_one_word_are_no_conflict():
    assert nv.shared_memory(LANE, 1).cycles == 1
    assert nv.shared_memory(2 * LANE, 2).cycles == 1


# both, lane by lane -------------------------------------------------------------------


def by_hand(addresses, width, active):
    """Sectors, bytes and bank cycles, with sets."""
    lanes = [a for a, on in zip(addresses, active, strict=True) if on]
    touched = {byte for a in lanes for byte in range(a, a + width)}
    cycles = least = 0
    phase = 32 // max(1, width // 4)
    for start in range(0, 32, phase):
        banks = {}
        for a, on in list(zip(addresses, active, strict=True))[start : start + phase]:
            for byte in range(a, a + width):
                if on:
                    banks.setdefault(byte // 4 % 32, set()).add(byte // 4)
        worst = max(map(len, banks.values()), default=0)
        cycles += worst
        least += worst > 0
    return len({b // 32 for b in touched}), len(touched), cycles, least


@given(
    width=st.sampled_from([1, 2, 4, 8, 16]),
    numbers=st.lists(st.integers(0, 300), min_size=32, max_size=32),
    active=st.lists(st.booleans(), min_size=32, max_size=32),
)
def test_the_counts_by_hand(width, numbers, active):
    addresses = [width * n for n in numbers]
    found = nv.global_memory(addresses, width, active)
    banks = nv.shared_memory(addresses, width, active)
    expected = by_hand(addresses, width, active)
    assert (found.sectors, found.asked, banks.cycles, banks.least) == expected
    assert found.requests == banks.requests == any(active)


def test_many_warps_are_added_up():
    rows = np.stack([strided(1), strided(2), strided(8)])
    one_by_one = [nv.global_memory(row) for row in rows]
    together = one_by_one[0] + one_by_one[1] + one_by_one[2]
    assert nv.global_memory(rows) == together
    assert nv.shared_memory(rows).cycles == 1 + 2 + 8
    both = nv.shared_memory(rows[0]) + nv.shared_memory(rows[1])
    assert both == nv.shared_memory(rows[:2])


def test_nobody_active_takes_nothing():
    found = nv.global_memory(strided(1), active=np.zeros(32, bool))
    assert (found.requests, found.sectors, found.efficiency) == (0, 0, 1.0)
    assert nv.shared_memory(strided(1), active=np.zeros(32, bool)).cycles == 0


# PTX ISA, 5.5.7 -----------------------------------------------------------------------

TABLE = {
    32: ["01234567", "10325476"],
    64: ["01234567", "10325476", "23016745", "32107654"],
    128: [
        *("01234567", "10325476", "23016745", "32107654"),
        *("45670123", "54761032", "67452301", "76543210"),
    ],
}


@pytest.mark.parametrize("span", TABLE)
def test_swizzles_as_printed(span):
    for row, printed in enumerate(TABLE[span] * 2):
        pieces = 128 * row + 16 * np.arange(8)
        placed = nv.swizzle(pieces, span) % 128 // 16
        # the table says which piece lies in each place; exclusive or is its own inverse
        assert "".join(map(str, placed)) == printed
        assert (nv.swizzle(pieces + 5, span) == nv.swizzle(pieces, span) + 5).all()


def test_a_swizzled_column_has_no_conflict():
    column = 128 * np.arange(8) + 48  # 16 bytes of eight rows, as ldmatrix reads them
    assert nv.shared_memory(column, 16).cycles == 8
    assert nv.shared_memory(nv.swizzle(column), 16).cycles == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 3}, "width=3"),
        ({"addresses": strided(1) + 2}, "not a multiple of width=4"),
        ({"addresses": strided(1) - 4}, "is negative"),
        ({"addresses": strided(1) + 0.5}, "whole bytes"),
        ({"addresses": np.arange(33) * 4}, "1 to 32 lanes"),
        ({"active": np.ones(31, bool)}, "of shape"),
        ({"active": np.ones(32, int)}, "must be bool"),
    ],
)
@pytest.mark.parametrize("count", [nv.global_memory, nv.shared_memory])
def test_nonsense_is_refused(count, change, words):
    arguments = {"addresses": strided(1)} | change
    with pytest.raises(ValueError, match=words):
        count(**arguments)


def test_a_lane_that_is_off_may_point_anywhere():
    addresses, active = strided(1), LANE != 7
    addresses[7] = -1
    assert nv.global_memory(addresses, active=active).asked == 31 * 4


def test_other_swizzles_are_refused():
    with pytest.raises(ValueError, match="span=96"):
        nv.swizzle(0, 96)
