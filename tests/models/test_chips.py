"""The file of chips: every figure has a source, a unit and a kind that are known."""

from __future__ import annotations

import csv
import math
from collections import Counter

import pytest

from llmlab.course.syllabus import course_root
from llmlab.models import chips as ch


def lines():
    with ch.FILE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("value", "unit", "kind", "wanted"),
    [
        (312, "TFLOP/s", "dense", 312e12),
        (1979, "TFLOP/s", "sparse 2:4", 989.5e12),
        (4.5, "PFLOP/s", "sparse 2:4", 2.25e15),
        (100, "TMAC/s", "dense", 200e12),
        (624, "TOPS", "dense", 624e12),
        (9, "POPS", "sparse 2:4", 4.5e15),
        (80, "GB", "", 80e9),
        (95, "GiB", "", 95 * 1024**3),
        (230, "MB", "", 230e6),
        (2575, "GiB/s", "", 2575 * 1024**3),
        (900, "GB/s", "both ways", 450e9),
        (400, "Gbit/s", "one way", 50e9),
        (23, "kW", "", 23e3),
        (125, "PFLOP/s", "unstated", None),
        (2563, "TFLOP/s", "sparse", None),
    ],
)
def test_units_and_kinds(value, unit, kind, wanted):
    found = ch.to_si(value, unit, kind)
    assert found == (None if wanted is None else pytest.approx(wanted, rel=1e-12))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, "GB"), "value=0 must be above 0"),
        ((math.nan, "GB"), "value=nan must be above 0"),
        ((-1, "GB"), "value=-1 must be above 0"),
        ((1, "gb"), "unit='gb' is not known"),
        ((1, "XFLOP/s"), "unit='XFLOP/s' is not known"),
        ((1, "TB/s", "twice"), "kind='twice' must be one of"),
    ],
)
def test_what_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        ch.to_si(*arguments)


def test_each_line_says_all_that_is_needed():
    base = {
        "flops": ("FLOP/s", "OPS", "MAC/s"),
        "memory": ("B",),
        "bandwidth": ("B/s",),
        "link": ("B/s", "bit/s"),
        "power": ("W",),
    }
    for number, (line, figure) in enumerate(zip(lines(), ch.figures(), strict=True)):
        where = f"line {number + 2}: {line}"
        assert None not in line.values() and None not in line, where
        assert figure.quantity in ch.QUANTITIES, where
        assert figure.unit.endswith(base[figure.quantity]), where
        assert line["read"] in ("own", "quoted"), where
        assert line["used"] in ("yes", "no"), where
        assert bool(figure.format) == (figure.quantity == "flops"), where
        kinds = {
            "flops": ("dense", "sparse 2:4", "sparse", "unstated"),
            "link": ("one way", "both ways", "unstated"),
        }
        assert figure.kind in kinds.get(figure.quantity, ("",)), where
        assert 2006 < int(line["year"]) < 2030, where
        assert figure.source, where


def test_each_source_is_in_the_bibliography():
    folder = course_root() / "jupyter-book" / "references"
    text = "".join(p.read_text(encoding="utf-8") for p in folder.glob("*.bib"))
    missing = {f.source for f in ch.figures() if f"{{{f.source}," not in text}
    assert not missing


def test_a_chip_takes_one_figure_of_each():
    used = Counter((f.chip, f.quantity, f.format) for f in ch.figures() if f.used)
    assert max(used.values()) == 1
    of = {}
    for line in lines():
        of.setdefault(line["chip"], set()).add((line["vendor"], line["year"]))
    assert all(len(each) == 1 for each in of.values())


def test_magnitudes_are_those_of_chips():
    """A factor of a thousand, or a bit taken for a byte, would leave these bounds."""
    bounds = {
        "flops": (1e13, 2e17),
        "memory": (1e8, 1e12),
        "bandwidth": (1e11, 1e17),
        "link": (5e10, 5e12),
        "power": (50, 3e4),
    }
    for figure in ch.figures():
        if figure.si is not None:
            low, high = bounds[figure.quantity]
            assert low < figure.si < high, figure


def test_a_chip_by_name():
    h100 = ch.chip("H100")
    assert (h100.vendor, h100.year, h100.link) == ("NVIDIA", 2022, 450e9)
    assert h100.speed("fp4", "fp8") == 1978.9e12
    with pytest.raises(ValueError, match="H100 has no clear figure for fp4: there is"):
        h100.speed("fp4")
    with pytest.raises(ValueError, match=r"'H10' is not in chips\.csv: try H100"):
        ch.chip("H10")
    with pytest.raises(ValueError, match=r"WSE-3 has no clear figure .* none at all"):
        ch.chip("WSE-3").speed("fp16")


def test_contradictions_are_found():
    found = {(g[0].chip, g[0].quantity): g for g in ch.contradictions()}
    assert [str(f) for f in found["TPU v5p", "memory"]] == ["95 GiB", "95 GB"]
    # the same in two units is none
    assert ("TPU v5p", "bandwidth") not in found
    # sparse and dense of one chip agree
    assert ("H100", "flops") not in found
    # what says too little cannot agree
    assert ("TPU v5p", "link") in found


def test_the_planner_plans_with_the_same_chips():
    from llmlab.parallelism.choosing import machine

    for name, of in (("h100-80gb", "H100"), ("v100-32gb", "V100")):
        known = ch.chip(of)
        assert machine(name).flops == known.speed("bf16", "fp16")
        assert machine(name).memory == known.memory
        assert machine(name).bandwidth == known.bandwidth
        assert machine(name).link == known.link
