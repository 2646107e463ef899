"""Energies: the file, the counting, and the counter of a processor."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.chips.precision_power_cost import carbon, energy, price, reliability
from llmlab.models.chips import chip

BOOK = Path(__file__).parents[3] / "jupyter-book" / "references"
COSTS = {
    "number_bytes": 2,
    "mac_pj": 0.59,
    "chip_pj_per_byte": 12.0,
    "memory_pj_per_byte": 155.0,
}


def test_the_printed_figures_come_in_one_unit():
    assert energy.printed("multiply", "fp32", "45 nm").pj == 3.7
    dram = energy.printed("read", "DRAM", "45 nm")  # 1.3 to 2.6 nJ for 8 bytes
    assert (dram.low_pj, dram.high_pj, dram.pj) == (162.5, 325.0, 243.75)
    assert energy.printed("read", "HBM2", "28 nm").pj == pytest.approx(8 * 3.92)
    assert energy.printed("read", "HBM2", "7 nm").low_pj == 250 / 8


def test_every_source_is_in_the_book():
    text = "".join(each.read_text(encoding="utf-8") for each in BOOK.glob("*.bib"))
    keys = set(re.findall(r"^@\w+\{(\S+),", text, re.M))
    used = {each.source for each in energy.figures()}
    used |= set(energy.costs_a100().sources) | set(energy.costs_45nm().sources)
    used |= {each.source for each in (*price.GPU_HOURS, price.DEEPSEEK_DAY)}
    used |= {each.source for each in (*reliability.RUNS, *carbon.TRAININGS)}
    assert used <= keys


def test_a_smaller_process_never_takes_more():
    for each in energy.figures():
        if each.node == "7 nm" and each.where != "HBM2":
            try:
                old = energy.printed(each.what, each.where, "45 nm")
            except ValueError:
                continue
            assert each.pj < old.pj, each


def test_a_mac_has_the_wider_sum():
    assert energy.macs_at("45 nm")["int8"] == pytest.approx(0.2 + 0.1)
    assert energy.macs_at("7 nm")["bf16"] == pytest.approx(0.21 + 0.38)
    assert "bf16" not in energy.macs_at("45 nm")


def test_a_byte_from_far_passes_what_is_near():
    costs = energy.costs_a100()
    assert costs.byte_pj["L1"] < costs.byte_pj["L2"] < costs.byte_pj["HBM"]
    assert costs.byte_pj["HBM"] == pytest.approx(8 * (1.59 + 4.71 + 13.11))


def test_memory_at_full_speed_stays_under_the_chips_power():
    """Antepara's increments, at the bandwidth of the data sheet of the same card."""
    a100, costs = chip("A100 40GB"), energy.costs_a100()
    watts = energy.joules(costs, "bf16", 0, {"HBM": a100.bandwidth}, seconds=1)
    assert 0.5 * a100.power < sum(watts.values()) < a100.power


def test_joules_by_hand():
    costs = energy.Costs("toy", {"fp32": 4.0}, {"near": 10.0, "far": 200.0}, 5.0)
    parts = energy.joules(costs, "fp32", 1e12, {"near": 1e11, "far": 1e10}, seconds=2)
    assert parts == pytest.approx(
        {"arithmetic": 4.0, "near": 1.0, "far": 2.0, "static": 10.0}
    )


def test_half_the_bits_save_no_static_power():
    costs = energy.costs_a100()
    whole = energy.joules(costs, "bf16", 1e9, {"HBM": 2e9}, seconds=1e-3)
    half = energy.joules(costs, "bf16", 1e9, {"HBM": 1e9}, seconds=1e-3)
    assert half["HBM"] == whole["HBM"] / 2
    assert (half["static"], half["arithmetic"]) == (
        whole["static"],
        whole["arithmetic"],
    )


@pytest.mark.parametrize(("m", "k", "n", "tile"), [(4, 6, 8, 2), (6, 3, 9, 3)])
def test_tiles_are_counted_one_by_one(m, k, n, tile):
    fetched = 0
    for _ in range(0, m, tile):
        for _ in range(0, n, tile):
            for _ in range(k):
                fetched += tile + tile  # a column of x's tile, a row of W's
    only_chip = COSTS | {"chip_pj_per_byte": 1e12, "memory_pj_per_byte": 0}
    parts = energy.product_joules(m, k, n, tile=tile, **only_chip)
    assert parts["chip"] == pytest.approx(2 * fetched)
    assert parts["memory"] == 0


@given(m=st.integers(1, 64), k=st.integers(1, 64), n=st.integers(1, 64))
def test_a_product_is_the_same_transposed(m, k, n):
    one = energy.product_joules(m, k, n, tile=4, **COSTS)
    assert one == pytest.approx(energy.product_joules(n, k, m, tile=4, **COSTS))
    more = energy.product_joules(2 * m, k, n, tile=4, **COSTS)
    assert more["arithmetic"] == pytest.approx(2 * one["arithmetic"])
    assert more["memory"] < 2 * one["memory"]  # W is shared


def test_the_floor_of_a_chip():
    h100 = chip("H100")
    assert energy.floor_pj_per_flop(h100.power, h100.speed("bf16")) == pytest.approx(
        700 / 989.4, rel=1e-6
    )


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: energy.Costs("x", {"fp32": -1.0}, {}), r"mac_pj\['fp32'\]=-1"),
        (lambda: energy.Costs("x", {}, {"far": 0.0}), r"byte_pj\['far'\]=0"),
        (lambda: energy.Costs("x", {}, {}, -3.0), "static_watts=-3"),
        (lambda: energy.joules(energy.costs_a100(), "fp4", 1, {}), "format='fp4'"),
        (
            lambda: energy.joules(energy.costs_a100(), "bf16", 1, {"L9": 1}),
            "level='L9'",
        ),
        (
            lambda: energy.joules(energy.costs_a100(), "bf16", 1, {"HBM": -1}),
            r"moved_bytes\['HBM'\]=-1",
        ),
        (lambda: energy.joules(energy.costs_a100(), "bf16", -1, {}), "macs=-1"),
        (lambda: energy.product_joules(0, 1, 1, tile=1, **COSTS), "m=0"),
        (lambda: energy.product_joules(1, 1, 1, tile=0, **COSTS), "tile=0"),
        (lambda: energy.floor_pj_per_flop(0.0, 1.0), "watts=0"),
        (lambda: energy.floor_pj_per_flop(1.0, float("inf")), "flops_per_second=inf"),
        (lambda: energy.printed("read", "tape", "7 nm"), "no energy to read tape"),
    ],
)
def test_what_cannot_be_is_refused_by_name(call, named):
    with pytest.raises(ValueError, match=named):
        call()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"low": "-1"}, "low=-1"),
        ({"kind": "guess"}, "kind='guess'"),
        ({"per": "x"}, "per='x'"),
    ],
)
def test_a_wrong_line_in_the_file_is_refused(change, named):
    line = dict.fromkeys(["what", "where", "node", "source", "note"], "x")
    line |= {"low": "1", "high": "", "per": "bit", "kind": "device"} | change
    with pytest.raises(ValueError, match=named):
        energy._figure(line)


# The counter --------------------------------------------------------------------------


def processor(root, microjoules, limit=999):
    folder = root / "intel-rapl:0"
    folder.mkdir()
    (folder / "max_energy_range_uj").write_text(f"{limit}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder


def test_a_counter_counts_and_starts_again_when_it_is_full(tmp_path):
    folder = processor(tmp_path, 900)
    found = energy.counter(tmp_path)
    before = found.microjoules()
    (folder / "energy_uj").write_text("950")
    assert found.joules_since(before) == pytest.approx(50e-6)
    (folder / "energy_uj").write_text("20")  # 999 is followed by 0
    assert found.joules_since(before) == pytest.approx(120e-6)


def test_a_call_is_measured(tmp_path):
    folder = processor(tmp_path, 100)
    took, used, why = energy.measured(
        lambda: (folder / "energy_uj").write_text("400"), tmp_path
    )
    assert took > 0
    assert (used, why) == (pytest.approx(300e-6), "")


def test_without_a_counter_it_says_so(tmp_path):
    assert energy.counter(tmp_path / "nowhere") == energy.counter(tmp_path)
    took, used, why = energy.measured(lambda: None, tmp_path)
    assert took >= 0
    assert used is None
    assert "no energy counter" in why
    (processor(tmp_path, 1) / "energy_uj").unlink()
    assert "cannot be read" in energy.measured(lambda: None, tmp_path)[2]
