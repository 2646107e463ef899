"""`llmlab progress`: short, and counted in exercises."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from llmlab.course import lab, progress, workspace
from llmlab.course.cli.main import app
from llmlab.course.grading.grading import LessonResult, Result
from llmlab.course.syllabus import lessons
from tests.course.learner import WELCOME


def shown(*words: str) -> str:
    done = CliRunner().invoke(app, ["progress", *words])
    assert done.exit_code == 0
    return done.output


def keep(root, *outcomes: str) -> None:
    names = ("weight_bytes", "tokens_per_second", "softmax")
    made = []
    for name, outcome in zip(names, outcomes, strict=True):
        made.append(Result(name, 2, outcome, 2 * (outcome == "right")))
    result = LessonResult(WELCOME.slug, WELCOME.title, "work/x.ipynb", "v1", made)
    progress.record(root, [result])


def test_before_anything_it_is_a_line_a_part(root):
    workspace.start_all(root)
    text = shown()
    assert len(text.splitlines()) == 13
    assert " 1  Start here: 1 lesson not begun, 2 planned" in text
    assert " 2  Models: 7 planned" in text
    assert "0 of 3 exercises are right" in text
    assert "next: weight_bytes of Welcome, work/01-start/01-welcome.ipynb" in text


def test_what_was_begun_is_a_line_a_lesson(root):
    keep(root, "right", "wrong", "wrong")
    text = shown()
    line = next(x for x in text.splitlines() if "01-welcome " in x)
    assert line.split() == ["01-welcome", "●○○", "1", "of", "3"]
    assert "02-the-course-models" not in text
    assert "1 of 3 exercises are right" in text
    assert "next: tokens_per_second of Welcome" in text


def test_it_counts_as_start_here_does(root):
    """Right once is right, in both."""
    keep(root, "right", "right", "wrong")
    keep(root, "wrong", "right", "wrong")
    assert "2 of 3" in shown()
    WELCOME.notebook(root).write_text('{"cells": [], "metadata": {}, "nbformat": 4}')
    assert "| 2 of 3 |" in lab.landing(root)


def test_all_is_every_lesson(root):
    keep(root, "right", "right", "right")
    text = shown("--all")
    for lesson in lessons():
        assert lesson.topic in text
    assert "●●●   3 of 3  done" in text and "planned" in text
    assert "Every exercise of the course is right." in text


def test_what_passes_in_the_notebook_is_to_be_marked(root, monkeypatch):
    monkeypatch.setattr("llmlab.course.standing.first_open", lambda lesson, root: None)
    assert "`llmlab check 01-welcome` marks what you solved" in shown()


def test_machines_are_told_what_was_begun(root):
    CliRunner().invoke(app, ["start", "welcome"])
    data = json.loads(shown("--json", "-"))
    begun = {x["topic"]: x["begun"] for p in data["parts"] for x in p["lessons"]}
    assert begun.pop(WELCOME.slug) and not any(begun.values())
