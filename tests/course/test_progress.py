"""Progress: the best is kept, writers wait, a broken file is set aside."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llmlab.course import progress
from llmlab.course.grading import report
from llmlab.course.grading.grading import LessonResult, Result
from tests.course.learner import ROOT, WELCOME, course


def result(points=2, outcome="right", version="v1"):
    return LessonResult(
        WELCOME.slug,
        WELCOME.title,
        "work/…",
        version,
        [Result("softmax", 2, outcome, points)],
    )


def entry(root):
    return progress.load(root)[0]["lessons"][WELCOME.slug]["softmax"]


def test_the_best_result_is_kept(tmp_path):
    progress.record(tmp_path, [result(0, "wrong")])
    assert "first_right" not in entry(tmp_path)
    progress.record(tmp_path, [result(2, "right", "v2")])
    first = entry(tmp_path)["first_right"]
    progress.record(tmp_path, [result(0, "timeout", "v3")])
    last = entry(tmp_path)
    assert (last["points"], last["outcome"], last["attempts"], last["version"]) == (
        2,
        "timeout",
        3,
        "v2",
    )
    assert last["first_right"] == first


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"lessons": 3}', '{"schema": "another/1", "lessons": {}}', "\x00"],
)
def test_a_broken_record_is_set_aside(tmp_path, text):
    path = progress.file_of(tmp_path)
    path.parent.mkdir()
    path.write_text(text)
    warning = progress.record(tmp_path, [result()])
    assert "set aside as .progress.broken-" in warning
    assert entry(tmp_path)["points"] == 2
    assert [p.read_text() for p in path.parent.glob(".progress.broken-*")] == [text]


def test_odd_entries_are_survived(tmp_path):
    root = course(tmp_path)
    path = progress.file_of(root)
    path.parent.mkdir()
    lessons = {
        WELCOME.slug: {"softmax": 7, "weight_bytes": {"points": "many"}},
        "gone/lesson": 3,
    }
    path.write_text(json.dumps({"schema": "llmlab.progress/1", "lessons": lessons}))
    data, warning = report.course_as_data(root)
    assert (data["points"], warning) == (0, "")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "work").write_text("a file where the folder should be")
    with pytest.raises(progress.NotKept, match="cannot be written"):
        progress.record(tmp_path, [result()])


def test_writers_wait_for_one_another(tmp_path):
    """Eight processes each add ten attempts: none is lost."""
    code = (
        "import sys; from pathlib import Path; from tests.course.test_progress import"
        " result; from llmlab.course import progress\nfor _ in range(10):"
        " progress.record(Path(sys.argv[1]), [result()])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command, cwd=ROOT) for _ in range(4)]
    assert [p.wait() for p in running] == [0] * 4
    assert entry(tmp_path)["attempts"] == 40
    assert not list((tmp_path / "work").glob("*.tmp"))


def test_hints_go_on_where_they_were(tmp_path):
    assert [progress.next_hint(tmp_path, "a/b", "f", 3) for _ in range(5)] == [
        1,
        2,
        3,
        3,
        3,
    ]


def test_the_map_counts_what_is_there_to_earn(tmp_path):
    root = course(tmp_path)
    progress.record(root, [result()])
    data, _ = report.course_as_data(root)
    assert (data["points"], data["out_of"]) == (2, 5)
    topics = [x["topic"] for p in data["parts"] for x in p["lessons"]]
    assert len(topics) == len(set(topics)) > 50
    first = data["parts"][0]["lessons"][0]
    assert (first["built"], first["points"], first["out_of"]) == (True, 2, 5)
    assert not data["parts"][1]["lessons"][0]["built"]


def test_points_of_an_exercise_that_shrank(tmp_path):
    root = course(tmp_path)
    many = LessonResult(
        WELCOME.slug, WELCOME.title, "", "v", [Result("softmax", 9, "right", 9)]
    )
    progress.record(root, [many])
    assert report.course_as_data(root)[0]["points"] == 2
