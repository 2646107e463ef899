"""The page "Recomputing activations": its tables, its place, and the ways to it."""

from __future__ import annotations

import re

from llmlab.course.book import build, notebooks, pages, recomputation
from llmlab.course.syllabus import built_lessons, find
from tests.course.learner import ROOT

SEQUENCE = "notebooks/05-parallelism/06-sequence.ipynb"


def numbers(table: str) -> list[list[float]]:
    """The numbers in the last cells of each row."""
    found = []
    for row in table.splitlines()[2:]:
        cells = [cell.strip(" %") for cell in row.strip("|").split("|")]
        plain = [cell.replace(",", "") for cell in cells]
        found.append([float(x) for x in plain if re.fullmatch(r"[\d.]+", x)])
    return found


def test_the_layer_keeps_what_the_formula_says():
    rows = numbers(recomputation.counted())
    assert [row[-1] for row in rows] == [23.5, 16, 16, 8.5, 2]
    assert all(row[-1] == row[-2] for row in rows)


def test_large_models_keep_the_share_that_the_page_tells():
    selective, sequence, both, full = zip(
        *(row[1:] for row in numbers(recomputation.large())), strict=True
    )
    assert all(45 < share < 70 for share in (*selective, *sequence))
    assert sum(share > 20 for share in both) == 2, "the text says two of four"
    assert max(both) < 20.5 and max(full) < 10


def test_selective_recomputation_saves_what_was_published():
    for paper_saves, saves, paper_costs, costs in numbers(recomputation.price()):
        assert saves == paper_saves
        assert abs(paper_costs / costs - 3) < 0.3, "the text says three times"
        assert costs < 1, "the text says under one percent"


def test_the_page_stands_behind_its_lesson():
    lessons = [x for x in built_lessons(ROOT) if x.part == "05-parallelism"]
    part = next(
        part for part in pages.toc(lessons, ROOT)["parts"] if "5." in part["caption"]
    )
    files = [chapter["file"] for chapter in part["chapters"]]
    assert files.index("recomputation") == files.index(SEQUENCE[:-6]) + 1
    without = pages.toc([find("lora")], ROOT)
    assert "recomputation" not in str(without)


def test_links_lead_both_ways(tmp_path):
    stage = notebooks.Stage(ROOT, tmp_path, frozenset(build.references(ROOT)))

    def rewritten(text: str, page: str) -> str:
        return notebooks.rewrite(text, lambda match: notebooks.link(match, page, stage))

    there = "[it](../../jupyter-book/pages/recomputation.md)"
    assert rewritten(there, SEQUENCE) == "[it](../../recomputation.md)"
    assert there[4:] in (ROOT / SEQUENCE).read_text(encoding="utf-8")
    path = ROOT / "jupyter-book" / "pages" / "recomputation.md"
    text = build.fill(path, stage, [], {})
    assert f"]({SEQUENCE})" in text and "](exercises/05-parallelism" in text
    assert "](published.md)" in text and "llmlab:recomputation" not in text
    assert not stage.errors
    rewritten("[it](../../jupyter-book/pages/gone.md)", SEQUENCE)
    assert stage.errors
