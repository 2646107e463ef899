"""Where a learner stands: hints by topic, what was begun, what comes after."""

from __future__ import annotations

import json

import pytest

from llmlab.course import progress, standing, workspace
from llmlab.course.grading.grading import LessonResult, Result
from llmlab.course.syllabus import find, near_lessons
from tests.course.learner import WELCOME, cell, notebook

FIRST, SECOND, THIRD = "weight_bytes", "tokens_per_second", "softmax"


def result(*outcomes: str) -> LessonResult:
    """Welcome, marked without a kernel."""
    made = []
    for name, outcome in zip((FIRST, SECOND, THIRD), outcomes, strict=True):
        made.append(Result(name, 1, outcome, int(outcome == "right")))
    return LessonResult(WELCOME.slug, WELCOME.title, "work/x.ipynb", "v1", made)


@pytest.fixture
def marked(monkeypatch):
    """A grader that gives what it is told."""

    def give(*outcomes: str):
        monkeypatch.setattr(
            "llmlab.course.grading.grade", lambda *args, **options: result(*outcomes)
        )

    return give


def write(path, data) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("welcom", "01-welcome"),
        ("01-wellcome", "01-welcome"),
        ("loar", "05-lora"),
        ("fsdp", "03-zero-and-fsdp"),
        ("quantisation", "01-quantization-basics"),
        ("04-peft/06-adalroa", "06-adalora"),
    ],
)
def test_a_name_that_is_near(name, near):
    with pytest.raises(ValueError, match=f"Did you mean {near}"):
        find(name)


def test_names_are_found_whatever_their_case():
    assert find("LoRA").slug == "04-peft/05-lora"


@pytest.mark.parametrize("name", ["", "  ", "xyzzy", "05", "a"])
def test_a_name_that_is_near_to_none(name):
    assert near_lessons(name) == []


@pytest.mark.parametrize("command", ["start", "reset", "check", "hint", "new"])
def test_every_command_asks_about_a_near_name(llmlab, command):
    done = llmlab(command, "welcom")
    assert done.exit_code == 2
    assert "Did you mean 01-welcome?" in done.output


def test_a_hint_by_topic_alone(llmlab, root):
    assert f"01-welcome, {FIRST}:" in llmlab("hint", "welcome").output
    assert "hint 2 of" in llmlab("hint", "welcome").output
    progress.record(root, [result("right", "wrong", "right")])
    done = llmlab("hint", "welcome")
    assert done.exit_code == 0
    assert f"01-welcome, {SECOND}:" in done.output and "hint 1 of" in done.output


def test_a_hint_passes_over_what_the_notebook_shows_as_right(llmlab, root):
    def ran(cells):
        said = {"output_type": "stream", "text": [f"✓ {FIRST}: right (1 point)\n"]}
        cell(cells, f"check-{FIRST}")["outputs"] = [said]

    write(WELCOME.work(root), notebook(FIRST, change=ran))
    assert f"01-welcome, {SECOND}:" in llmlab("hint", "welcome").output


def test_a_hint_when_all_is_right(llmlab, root):
    progress.record(root, [result("right", "right", "right")])
    WELCOME.solution(root).write_text("{}")
    done = llmlab("hint", "welcome")
    assert done.exit_code == 0
    assert "Every exercise of 01-welcome is right" in done.output
    assert "work/solutions/01-start/01-welcome.solution.ipynb" in done.output


def test_a_hint_for_a_near_name(llmlab):
    done = llmlab("hint", "welcome", "softmx")
    assert done.exit_code == 2 and "Did you mean softmax?" in done.output


def test_a_hint_for_a_planned_lesson(llmlab):
    done = llmlab("hint", "05-capstone")
    assert done.exit_code == 2 and "planned" in done.output


def test_copies_that_were_laid_out_are_not_begun(llmlab, root, marked):
    workspace.start_all(root)
    assert WELCOME.work(root).is_file()
    assert not workspace.is_begun(WELCOME, root)
    marked("right", "wrong", "wrong")
    done = llmlab("check")
    assert done.exit_code == 2 and "nothing to mark yet" in done.output


def test_what_was_written_into_is_begun(llmlab, root, marked):
    workspace.start_all(root)
    copy = json.loads(WELCOME.work(root).read_text(encoding="utf-8"))
    cell(copy["cells"], f"exercise-{FIRST}")["source"] = "weight_bytes = 3"
    write(WELCOME.work(root), copy)
    assert workspace.is_begun(WELCOME, root)
    marked("right", "wrong", "wrong")
    assert "1 of 3 points" in llmlab("check").output


def test_outputs_alone_begin_nothing(root):
    workspace.start_all(root)
    copy = json.loads(WELCOME.work(root).read_text(encoding="utf-8"))
    for each in copy["cells"]:
        if each["cell_type"] == "code":
            each["execution_count"] = 7
    write(WELCOME.work(root), copy)
    assert not workspace.is_begun(WELCOME, root)


def test_asking_for_a_lesson_begins_it(llmlab, root):
    llmlab("start", "welcome")
    assert workspace.is_begun(WELCOME, root)


def test_a_file_that_cannot_be_read_is_told_of(root):
    workspace.start_all(root)
    WELCOME.work(root).write_text("{", encoding="utf-8")
    assert workspace.is_begun(WELCOME, root)


def test_after_full_marks(llmlab, root, marked):
    llmlab("start", "welcome")
    WELCOME.solution(root).write_text(WELCOME.exercise(root).read_text())
    later = find("02-the-course-models")
    for path in (later.notebook(root).with_suffix(".py"), later.exercise(root)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(WELCOME.exercise(root).read_text())
    marked("right", "right", "wrong")
    assert "is done" not in llmlab("check", "welcome").output
    marked("right", "right", "right")
    text = llmlab("check", "welcome").output
    assert "Welcome is done: every exercise is right." in text
    assert "work/solutions/01-start/01-welcome.solution.ipynb" in text
    assert "`llmlab start 01-welcome --solution` makes it" in text
    assert "next: The course models, work/lessons/01-start/02-the-course" in text
    llmlab("start", "welcome", "--solution")
    assert "makes it" not in llmlab("check", "welcome").output


def test_what_follows_stands_after_it_if_it_can(root):
    for slug in ("02-the-course-models", "05-lora"):
        lesson = find(slug)
        for path in (lesson.notebook(root).with_suffix(".py"), lesson.exercise(root)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(WELCOME.exercise(root).read_text())
    assert standing.following(root, after=find("02-the-course-models")) is find("lora")
    assert standing.following(root, after=find("lora")) is WELCOME
    assert standing.following(root) is WELCOME


def test_after_the_whole_course(llmlab, root, marked):
    llmlab("start", "welcome")
    marked("right", "right", "right")
    assert "nothing is left" in llmlab("check", "welcome").output


def test_marks_are_kept_when_the_table_cannot_be_printed(
    llmlab, root, marked, monkeypatch
):
    llmlab("start", "welcome")
    marked("right", "right", "right")

    def broken(*args):
        raise BrokenPipeError

    monkeypatch.setattr("llmlab.course.grading.report.print_check", broken)
    llmlab("check", "welcome")
    record, _ = progress.load(root)
    assert standing.standing(WELCOME, root, record).is_done
