"""The line on top of a lesson."""

from __future__ import annotations

import nbformat
import pytest

from llmlab.course import header
from llmlab.course.syllabus import Lesson, built_lessons, course_root, find, lessons

ROOT = course_root()
RUN = {"seconds": 16.4, "memory_gib": 1.07}


def notebook(*cells: tuple[str, str, list[str]]):
    """A notebook of (kind, source, tags)."""
    make = {
        "markdown": nbformat.v4.new_markdown_cell,
        "code": nbformat.v4.new_code_cell,
    }
    return nbformat.v4.new_notebook(
        cells=[make[kind](text, metadata={"tags": tags}) for kind, text, tags in cells]
    )


@pytest.mark.parametrize("lesson", built_lessons(ROOT), ids=lambda x: x.slug)
def test_what_a_lesson_needs_stands_before_it_or_is_built(lesson):
    built = built_lessons(ROOT)
    for other in header.needs(lesson):
        assert other in built
        assert lesson not in header.needs(other), "each needs the other"


def test_every_row_is_a_lesson():
    assert set(header.all_needs()) <= {x.slug for x in lessons()}


def test_a_lesson_without_a_row(monkeypatch):
    stray = Lesson("04-peft/99-stray", "Stray", "", "", "")
    with pytest.raises(ValueError, match=r"needs\.csv has no row for 04-peft/99-stray"):
        header.needs(stray)
    monkeypatch.setattr(header, "all_needs", lambda: {stray.slug: ("04-peft/nowhere",)})
    with pytest.raises(ValueError, match="04-peft/nowhere"):
        header.needs(stray)


def test_folded_code_takes_no_time_to_read():
    words = ("markdown", "word " * 100, [])
    code = ("code", "x = 1\n" * 120, [])
    folded = ("code", "x = 1\n" * 120, ["hide-input"])
    assert header.reading_minutes(notebook(words)) == 5
    assert header.reading_minutes(notebook(words, folded)) == 5
    assert header.reading_minutes(notebook(words, code)) == 15


def test_the_line_names_all():
    qlora = find("07-qlora")
    line = header.header(qlora, notebook(("markdown", "# QLoRA", [])), RUN, ROOT)
    assert "[LoRA](05-lora.ipynb)" in line
    assert "[Quantization basics](../06-compression/01-quantization-basics.ipynb)" in (
        line
    )
    assert "20 seconds and 1.5 GiB" in line, "rounded up"
    minutes = header.exercise_minutes(qlora.exercise(ROOT))
    assert minutes > 0
    assert f"{minutes} of exercises" in line


def test_it_replaces_the_one_that_was_there():
    nb = notebook(("markdown", "# Welcome", []), ("code", "1", []))
    welcome = find("01-welcome")
    header.put(nb, welcome, RUN, ROOT)
    header.put(nb, welcome, RUN | {"seconds": 2}, ROOT)
    assert [cell.source for cell in nb.cells][::2] == ["# Welcome", "1"]
    assert nb.cells[1].source.count("seconds") == 1
    assert "5 seconds" in nb.cells[1].source
    assert "You need** nothing" in nb.cells[1].source


def test_no_exercises(tmp_path):
    assert header.exercise_minutes(tmp_path / "none.ipynb") == 0
