"""The published numbers: ours are counted.

They say "same" only where they are, and explain where they are not.
"""

import re
from pathlib import Path

import pytest

from llmlab.course.book import published
from llmlab.course.book.published import Row

ROWS = published.rows()
BIB = Path(__file__).resolve().parents[2] / "jupyter-book" / "references"


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.what)
def test_a_number_is_the_same_or_says_why(row):
    assert row.ours > 0
    assert row.same or row.why
    assert abs(row.ours / float(row.published) - 1) < 0.6, (
        "not the same thing was counted"
    )


def test_most_are_the_same():
    assert len(ROWS) >= 20 and sum(row.same for row in ROWS) >= 16


def test_same_means_rounded_as_printed():
    row = dict(
        part="peft",
        what="",
        where="",
        paper="",
        rule="prompt",
        arguments="p=5 d=3",
        why="",
    )
    assert (
        Row(**row, published="15", unit="").same
        and not Row(**row, published="14", unit="").same
    )
    assert not Row(**row, published="20", unit="").same, (
        "an exact count is not rounded to tens"
    )


def test_sources_are_in_the_bibliography():
    keys = set(
        re.findall(
            r"^@\w+\{([^,]+),",
            "".join(p.read_text("utf-8") for p in BIB.glob("*.bib")),
            flags=re.M,
        )
    )
    assert {row.paper for row in ROWS} <= keys


def test_the_page_shows_each_number_beside_ours():
    text = published.page()
    lines = [line for line in text.splitlines() if "{cite:t}" in line]
    assert len(lines) == len(ROWS)
    (llama,) = [line for line in lines if "Llama 7B" in line]
    assert llama.count("4,194,304") == 2 and "| yes |" in llama
    (bert,) = [line for line in lines if "for questions" in line]
    assert "| 592,900 | 591,362 | no |" in bert
