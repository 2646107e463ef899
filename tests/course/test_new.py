"""`llmlab new` lays out all files of a lesson, and never over another."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from llmlab.course import exercises, new, syllabus
from llmlab.course.syllabus import find, lessons
from tests.course.learner import ROOT, course

PLANNED = next(x for x in reversed(lessons()) if not x.is_built(ROOT))
HEADINGS = [
    "What it costs",
    "Predict",
    "By hand",
    "The idea",
    "Your turn",
    "The code",
    "Against the library",
    "The experiment",
    "Play",
    "At scale",
    "What to keep",
]


@pytest.mark.parametrize("room", [False, True])
def test_all_files_are_made_and_are_python(room, tmp_path):
    made = new.scaffold(PLANNED, tmp_path, room)
    names = {str(p.relative_to(tmp_path)) for p in made}
    part, module = PLANNED.package, PLANNED.module
    folder = f"{module}/" if room else ""
    wanted = {
        f"notebooks/{PLANNED.slug}.py",
        f"solutions/{PLANNED.slug}.py",
        f"llmlab/{part}/{folder}{module}.py",
        f"llmlab/checks/{part}/{module}.py",
        f"tests/{part}/{folder}test_{module}.py",
        f"tests/checks/{part}/test_{module}.py",
        f"jupyter-book/references/{PLANNED.part}.bib",
    }
    assert wanted <= names
    assert (f"llmlab/{part}/{module}/__init__.py" in names) == room
    for path in made:
        if path.suffix == ".py":
            ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("lesson", lessons(), ids=lambda x: x.slug)
def test_every_planned_lesson_can_be_laid_out(lesson, tmp_path):
    for path, text in new.files(lesson, tmp_path).items():
        if path.suffix == ".py":
            ast.parse(text)


@pytest.mark.parametrize("room", [False, True])
def test_it_is_formatted_and_clean(room, tmp_path):
    new.scaffold(PLANNED, tmp_path, room)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    # so that ruff knows whose they are
    for package in ("llmlab", "llmlab/course", "llmlab/checks"):
        (tmp_path / package).mkdir(parents=True, exist_ok=True)
        (tmp_path / package / "__init__.py").touch()
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_it_has_the_form_of_a_lesson_and_marks_every_place(tmp_path):
    made = new.scaffold(PLANNED, tmp_path)
    text = (tmp_path / f"notebooks/{PLANNED.slug}.py").read_text(encoding="utf-8")
    assert [
        line[5:] for line in text.splitlines() if line.startswith("# ## ")
    ] == HEADINGS
    unmarked = [
        p.name
        for p in made
        if p.name != "__init__.py" and "TODO" not in p.read_text(encoding="utf-8")
    ]
    assert unmarked == []


def test_the_solution_has_the_form_that_exercises_need(tmp_path, monkeypatch):
    new.scaffold(PLANNED, tmp_path)
    names = {}
    source = (
        tmp_path / f"llmlab/checks/{PLANNED.package}/{PLANNED.module}.py"
    ).read_text(encoding="utf-8")
    exec(
        source.replace(f"from llmlab.{PLANNED.package} import {PLANNED.module}", ""),
        names,
    )
    monkeypatch.setattr(exercises, "load_check", lambda lesson: names["check"])
    notebook = exercises.exercise_notebook(PLANNED, tmp_path)
    assert f"check-{PLANNED.module}_step" in [c.id for c in notebook.cells]


def test_nothing_is_overwritten(tmp_path):
    new.scaffold(PLANNED, tmp_path)
    path = PLANNED.solution(tmp_path).with_suffix(".py")
    path.write_text("an author's work")
    with pytest.raises(FileExistsError, match="nothing was written"):
        new.scaffold(PLANNED, tmp_path)
    assert path.read_text() == "an author's work"
    other = next(
        x for x in lessons() if x.part == PLANNED.part and x.slug != PLANNED.slug
    )
    bib = tmp_path / f"jupyter-book/references/{PLANNED.part}.bib"
    bib.write_text("@misc{a}")
    new.scaffold(other, tmp_path)
    assert bib.read_text() == "@misc{a}"


def test_a_built_lesson_is_refused(tmp_path):
    root = course(tmp_path)
    with pytest.raises(FileExistsError, match=r"notebooks/01-start/01-welcome\.py"):
        new.scaffold(find("01-welcome"), root)


def test_the_house_rule_finds_what_is_left(tmp_path):
    """The marker is the one that tests/test_house.py looks for."""
    assert 'marker = "TO" + "DO"' in (ROOT / "tests" / "test_house.py").read_text(
        encoding="utf-8"
    )
    assert syllabus.find(PLANNED.slug) is PLANNED
