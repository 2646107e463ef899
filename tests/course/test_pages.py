"""Pages and titles, as they meet a reader."""

from __future__ import annotations

import re

import pytest

from llmlab.course.book import build, pages
from llmlab.course.syllabus import built_lessons, find, lessons
from tests.course.learner import ROOT


def test_coverage_has_what_is_built_first():
    text = pages.coverage([find("lora"), find("ia3")])
    states = re.findall(r"\| (built|planned) \|$", text, re.M)
    assert states == sorted(states), "built stands before planned"
    assert states.count("built") == 2
    built, planned = text.split("## Planned\n")
    assert "### PEFT principles" in built and "### PEFT principles" in planned
    assert "(notebooks/04-peft/05-lora.ipynb) | built |" in built
    assert "(parts/07-inference.md) | planned |" in planned


def test_coverage_without_a_planned_or_a_built_row():
    assert "## Planned" not in pages.coverage(list(lessons()))
    assert "## Built" not in pages.coverage([])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "Building the book: a minute or two.\n"),
        (["--serve"], "It is served once it is built."),
    ],
)
def test_the_book_says_that_it_builds(arguments, told, monkeypatch, capsys):
    said = []

    def stop(*args, **options):
        said.append(capsys.readouterr().out)
        raise build.BookError("enough")

    monkeypatch.setattr(build, "build", stop)
    assert build.main(arguments) == 1
    assert told in said[0], "said before it begins"


@pytest.mark.parametrize("lesson", built_lessons(ROOT), ids=lambda x: x.slug)
def test_solutions_are_called_so(lesson):
    script = lesson.solution(ROOT).with_suffix(".py").read_text(encoding="utf-8")
    heading = re.search(r"^# # (.+)$", script, re.M)
    assert heading[1] == f"Solutions: {lesson.title}"
