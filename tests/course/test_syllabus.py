"""The course as data."""

from __future__ import annotations

import pytest

from llmlab.course import syllabus
from llmlab.course.syllabus import PARTS, course_root, find, lessons
from tests.course.learner import ROOT, course


def test_slugs_are_unique_ordered_and_in_known_parts():
    slugs = [x.slug for x in lessons()]
    assert slugs == sorted(set(slugs))
    assert {x.part for x in lessons()} == set(PARTS)
    assert all(x.title and x.teaches and x.aha for x in lessons())


def test_one_name_everywhere():
    lora = find("04-peft/05-lora")
    assert (lora.part, lora.topic, lora.package, lora.module, lora.short) == (
        "04-peft",
        "05-lora",
        "peft",
        "lora",
        "05-lora",
    )
    assert str(lora.work(ROOT).relative_to(ROOT)) == "work/04-peft/05-lora.ipynb"


@pytest.mark.parametrize(
    "name",
    [
        "04-peft/05-lora",
        "05-lora",
        "lora",
        "notebooks/04-peft/05-lora.py",
        "work/04-peft/05-lora.ipynb",
        "04-peft/05-lora/",
    ],
)
def test_names_that_find_a_lesson(name):
    assert find(name).slug == "04-peft/05-lora"


def test_underscores_and_dashes_both_find():
    assert find("the_course_models") is find("the-course-models")


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("quantization", "06-compression/01-quantization-basics"),
        ("sequence-parallelism", "05-parallelism/06-sequence"),
        ("Sequence parallelism", "05-parallelism/06-sequence"),
        ("05", None),
        ("seq", None),
    ],
)
def test_the_first_words_of_one_name_alone_find_it(name, slug):
    if slug is None:
        with pytest.raises(ValueError, match="progress --all"):
            find(name)
    else:
        assert find(name).slug == slug


@pytest.mark.parametrize(
    "name", ["", "nothing", "04-peft", "05-lora-more", "03-training/05-lora"]
)
def test_names_that_find_none(name):
    with pytest.raises(ValueError, match="lesson"):
        find(name)


def test_a_short_name_finds_its_lesson():
    assert all(find(x.short) is x for x in lessons())


def test_the_course_is_found_from_within_and_from_outside(tmp_path):
    root = course(tmp_path / "course")
    inner = root / "work" / "01-start"
    inner.mkdir(parents=True)
    assert course_root(inner) == root.resolve()
    assert course_root(tmp_path) == ROOT


def test_without_notebooks_the_message_helps(tmp_path, monkeypatch):
    monkeypatch.setattr(syllabus, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    with pytest.raises(FileNotFoundError, match="change into your copy of the course"):
        course_root(tmp_path)


def test_built_lessons_have_a_notebook():
    assert "01-start/01-welcome" in [x.slug for x in syllabus.built_lessons(ROOT)]
