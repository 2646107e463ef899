"""Stored outputs: words exactly, numbers within a tolerance; what is wrong is seen."""

from __future__ import annotations

import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.course.numbers import (
    DEFAULT,
    EXACT,
    Tolerance,
    differences,
    tolerance_of,
)
from llmlab.course.printed import numbers_in

ROOT = Path(__file__).resolve().parents[2]
WIDE = tolerance_of(["numbers-within-5%"])
decimals = st.integers(1, 10**6).flatmap(
    lambda n: st.integers(1, 4).map(lambda d: Decimal(n).scaleb(-d))
)
words = st.text("abcdefghij klmnop", min_size=1, max_size=12).map(
    lambda text: f"w {text} w"
)

SAME = [
    ("loss 3.37", "loss 3.38"),  # one unit of the last digit
    ("perplexity 575.0", "perplexity 577.8"),  # 0.5 %
    ("8.1e+09 times", "8.2e+09 times"),
    ("1e-05 apart", "9.9e-06 apart"),
    ("4.2·10⁻⁶", "4.3·10⁻⁶"),
    ("x = 0.999", "x = 1"),  # as `g` prints them
    ("Δ −0.52", "Δ −0.53"),
    ("ends at -0.00", "ends at 0.00"),
    ("moved by −0.01", "moved by 0.00"),
    ("accuracy 65% ±1", "accuracy 66% ±2"),
    ("≈ 300 ms", "≈ 301 ms"),
    ("2.5x faster, 1.21 GB", "2.4x faster, 1.22 GB"),
    ("a   9.9  b\n--------\nc  99.9  d", "a  10.0  b\n-----------\nc 100.0  d"),
    ("tensor([ 9.9, 10.0])", "tensor([10.0, 10.0])"),
    ("( 9.9%)", "(10.0%)"),
    ("│  9.9 │\n└──────┘", "│ 10.0 │\n└───────┘"),
    ("[0.50,0.70]", "[0.51,0.70]"),
    ("1,000.0 tokens", "999.5 tokens"),
    ("0.5–0.7", "0.5–0.8"),
]
OTHER = [
    ("loss 3.37", "loss 3.40", "3.37 is stored, 3.40 came out: 0.03 apart"),
    ("3 of 14 agree", "4 of 14 agree", "whole numbers are compared exactly"),
    ("1,359,872 trained", "1,359,873 trained", "compared exactly"),
    ("Δ −0.52", "Δ 0.52", "the sign changed"),
    ("Δ +0.52", "Δ 0.52", "the sign changed"),
    ("Δ -0.52", "Δ −0.52", "the sign changed"),
    ("1e-05 apart", "1e-04 apart", "apart"),
    ("4.2·10⁻⁶", "4.2·10⁻⁵", "apart"),
    ("1.5 GB", "1.5 MB", "the text differs"),
    ("agrees: 0.5", "not here: 0.5", "the text differs"),
    ("0.5, 0.6", "0.5", "2 stored, 1 came out"),
    ("0.5", "0.5, 0.6", "1 stored, 2 came out"),
    ("0.5", "nan", "1 stored, 0 came out"),
    ("inf", "nan", "the text differs"),
    ("one\ntwo", "one", "line 2 is missing"),
    ("one", "one\ntwo", "line 2 is new"),
    ("torch 2.13.0", "torch 2.14.0", "the text differs"),
    ("q_proj.3 of layer0", "q_proj.4 of layer0", "the text differs"),
    ("Llama-3.1", "Llama-3.2", "the text differs"),
    ("run 2026-11-28", "run 2026-11-29", "the text differs"),
    ("at 12:30:01.5", "at 12:30:01.6", "the text differs"),
    ("commit 83e4567", "commit 83e4568", "the text differs"),
    ("at 0x7f3a", "at 0x7f3b", "the text differs"),
    ("a   0.5", "a 0.5", "the text differs"),  # no width changed: layout counts
    ("    return 0.5", "  return 0.5", "the text differs"),
    ("65% ±1", "65% ±4", "apart"),
]


@pytest.mark.parametrize(("stored", "found"), SAME)
def test_the_same_within_the_tolerance(stored, found):
    assert differences(stored, found) == []


@pytest.mark.parametrize(("stored", "found", "why"), OTHER)
def test_what_differs_is_said(stored, found, why):
    said = differences(stored, found)
    assert len(said) == 1 and why in said[0], said


def test_a_message_names_both_numbers_and_the_tolerance():
    (said,) = differences("a\nloss 500.0", "a\nloss 510.0")
    assert (
        said
        == "line 2: 500.0 is stored, 510.0 came out: 10 apart, 2.5 allowed (0.5 %, or"
        " one unit of the last digit)"
    )


def test_many_differences_are_counted():
    stored = "\n".join(f"n = {i}" for i in range(9))
    found = "\n".join(f"n = {i + 1}" for i in range(9))
    said = differences(stored, found)
    assert len(said) == 6 and said[-1] == "and 4 more"


@settings(deadline=None)  # a busy machine is not a fault
@given(st.text(), st.text())
def test_any_text_equals_itself_alone(a, b):
    assert differences(a, a) == []
    assert differences(a, a, html=True) == []
    for tolerance in (DEFAULT, WIDE, EXACT):
        differences(a, b, tolerance)  # never raises
        differences(a, b, tolerance, html=True)
    assert (differences(a, b, EXACT) == []) == (a == b)


@settings(deadline=None)  # a busy machine is not a fault
@given(words, decimals, words)
def test_one_unit_of_the_last_digit_is_the_same(before, number, after):
    unit = Decimal(1).scaleb(number.as_tuple().exponent)
    stored = f"{before} {number:f} {after}"
    assert differences(stored, f"{before} {number + unit:f} {after}") == []


@settings(deadline=None)  # a busy machine is not a fault
@given(words, decimals, words, st.sampled_from([1, -1]))
def test_a_wrong_decimal_is_seen(before, number, after, way):
    unit = Decimal(1).scaleb(number.as_tuple().exponent)
    gap = max(2 * unit, (number * Decimal("0.006")).quantize(unit) + unit)
    wrong = number + way * gap
    said = differences(f"{before} {number:f} {after}", f"{before} {wrong:f} {after}")
    assert said and f"{number:f}" in said[0] and f"{abs(wrong):f}" in said[0]


@settings(deadline=None)  # a busy machine is not a fault
@given(words, st.integers(0, 10**9), st.integers(1, 10**9), words)
def test_a_wrong_count_is_seen(before, count, more, after):
    stored = f"{before} {count:,} {after}"
    assert differences(stored, f"{before} {count + more:,} {after}")
    assert not differences(stored, f"{before} {count:,} {after}")


@settings(deadline=None)  # a busy machine is not a fault
@given(words, decimals, words, decimals, st.integers(0, 2))
def test_a_changed_word_or_a_lost_number_is_seen(a, x, b, y, which):
    stored = f"{a} {x:f} {b} {y:f}"
    wrong = [f"{a} {x:f} {b}!{y:f}", f"{a} {x:f} {b}", f"{a}! {x:f} {b} {y:f}"][which]
    assert differences(stored, wrong)
    assert differences(wrong, stored)


@settings(deadline=None)  # a busy machine is not a fault
@given(decimals, words)
def test_a_changed_sign_is_seen(number, after):
    assert differences(f"-{number:f} {after}", f"{number:f} {after}", WIDE)


@settings(deadline=None)  # a busy machine is not a fault
@given(st.lists(decimals, min_size=1, max_size=5), st.integers(0, 4))
def test_aligned_columns_move_with_their_numbers(column, at):
    at %= len(column)
    column = [n.quantize(Decimal("0.01")) for n in column]
    nudged = list(column)
    nudged[at] *= Decimal("1.002")
    width = max(len(f"{n:.2f}") for n in column)
    wider = max(len(f"{n:.2f}") for n in nudged)
    stored = "\n".join(f"row {n:{width}.2f} end" for n in column)
    found = "\n".join(f"row {n:{wider}.2f} end" for n in nudged)
    assert differences(stored, found) == []


def test_numbers_inside_names_are_text():
    text = (
        "layer0 q_proj.3 Llama-3.1 2.13.0 2026-11-28 12:30 0x3fe 12ab34 12e34 3rd"
        " 1e999 x2"
    )
    assert [n.text for n in numbers_in(text)] == []


def test_numbers_with_units_are_numbers():
    text = "12GB 4.5GiB 1.5x 43% 2.3k 7M $2.48 (0.5) λ=0.25, 1.5s 3.0e-05 30ms −2.5 86."
    found = [f"{n.value.normalize():f}" for n in numbers_in(text)]
    assert " ".join(found) == "12 4.5 1.5 43 2.3 7 2.48 0.5 0.25 1.5 0.00003 30 -2.5 86"


HTML = '<table><tr><td style="width: 12.5px">{}</td><td>{}</td></tr></table>&#8239;'


@pytest.mark.parametrize(
    ("stored", "found", "same"),
    [
        (HTML.format("3.37", "14"), HTML.format("3.38", "14"), True),
        (HTML.format("3.37", "14"), HTML.format("3.47", "14"), False),
        (HTML.format("3.37", "14"), HTML.format("3.37", "15"), False),
        (HTML.format("1", "2"), HTML.format("1", "2").replace("12.5", "12.6"), False),
        (HTML.format("1", "2"), HTML.format("1", "2").replace("8239", "8240"), False),
        ("<svg><path d='1.01'/>1.01</svg>", "<svg><path d='1.02'/>1.01</svg>", False),
        ("<svg><text>1.01</text></svg>", "<svg><text>1.02</text></svg>", False),
        ("<pre>│  9.9 │</pre>", "<pre>│ 10.0 │</pre>", True),
    ],
)
def test_html_compares_numbers_in_text_and_markup_exactly(stored, found, same):
    assert (differences(stored, found, html=True) == []) == same


def test_declared_tolerances():
    assert tolerance_of(["check"]) == DEFAULT
    assert tolerance_of(["check", "numbers-within-5%"]) == Tolerance(
        Decimal("0.05"), counts=True
    )
    assert differences("loss 3.37", "loss 3.50", WIDE) == []
    assert differences("loss 3.37", "loss 3.60", WIDE)
    assert differences("perplexity 575", "perplexity 560", WIDE) == []
    assert differences("3 of 14", "4 of 14", WIDE)  # 5 % of 3 is no whole one
    by_2 = tolerance_of(["numbers-within-2"])
    assert differences("step 42", "step 44", by_2) == []
    assert differences("step 42", "step 45", by_2)
    exact = tolerance_of(["numbers-exact"])
    assert differences("loss 3.370", "loss 3.371", exact)


@pytest.mark.parametrize(
    "tags",
    [
        ["numbers-within-60%"],
        ["numbers-within-0"],
        ["numbers-within"],
        ["numbers-roughly"],
        ["numbers-within-5%", "numbers-exact"],
    ],
)
def test_a_wrong_tag_is_refused(tags):
    with pytest.raises(ValueError, match="numbers-"):
        tolerance_of(tags)


# Through nbval: what is stored, what the cell prints, its tags, and whether it passes.
CELLS = [
    ("loss 3.37, 3 of 14\n", "print('loss 3.38, 3 of 14')", [], True),
    ("loss 3.37\n", "print('loss 3.47')", [], False),
    ("3 of 14\n", "print('4 of 14')", [], False),
    ("575\n", "print(560)", ["numbers-within-5%"], True),
    ("loss 3.37\n", "print('Loss 3.37')", [], False),
]


def write_notebook(path: Path, cells) -> None:
    nb = nbformat.v4.new_notebook()
    for count, (stored, source, tags, _) in enumerate(cells, 1):
        cell = nbformat.v4.new_code_cell(source, execution_count=count)
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=stored)]
        cell.metadata["tags"] = tags
        nb.cells.append(cell)
    table = "<b>{}</b>"
    source = f"from IPython.display import HTML\nHTML('{table.format('3.38')}')"
    html = nbformat.v4.new_code_cell(source, execution_count=len(cells) + 1)
    data = {
        "text/plain": "<IPython.core.display.HTML object>",
        "text/html": table.format("3.37"),
    }
    count = {"execution_count": len(cells) + 1}
    html.outputs = [nbformat.v4.new_output("execute_result", data, **count)]
    nb.cells.append(html)
    nbformat.write(nb, path)


# pytest without what takes three seconds to build: see `llmlab.course.grammar`.
PYTEST = """
import sys
from llmlab.course.grammar import leave_out_grammar
leave_out_grammar()
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def run_nbval(path: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PYTEST, "-p", "no:cacheprovider"]
    command += ["-c", os.devnull, "--rootdir", str(path.parent)]
    command += ["-p", "nbval.plugin", "-p", "scripts.nbval_plugin"]
    command += ["-v", "--nbval", str(path)]
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # the others only take time
    }
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def test_through_nbval_right_and_wrong_numbers(tmp_path):
    path = tmp_path / "lesson.ipynb"
    write_notebook(path, CELLS)
    said = run_nbval(path).stdout
    verdicts = [*[passes for *_, passes in CELLS], True]
    for number, passes in enumerate(verdicts):
        expected = "PASSED" if passes else "FAILED"
        assert f"Cell {number} {expected}" in said, said
    assert "3.37 is stored, 3.47 came out: 0.1 apart, 0.01685 allowed" in said
    assert "3 is stored, 4 came out: whole numbers are compared exactly" in said


def test_through_nbval_a_wrong_tag_stops_the_run(tmp_path):
    path = tmp_path / "lesson.ipynb"
    write_notebook(path, [("1\n", "print(1)", ["numbers-roughly"], True)])
    result = run_nbval(path)
    assert result.returncode == 4
    assert "cell 0: tag 'numbers-roughly' is not known" in result.stderr
