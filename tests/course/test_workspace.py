"""A learner's copy is made once, and never overwritten."""

from __future__ import annotations

import json
import os

import pytest

from llmlab.course import exercises, workspace
from tests.course.learner import WELCOME, cell, course, index


@pytest.fixture
def root(tmp_path):
    return course(tmp_path)


def change_course(root, text="A new sentence."):
    """A new version of the exercise, as an update of the course brings it."""
    path = WELCOME.exercise(root)
    nb = json.loads(path.read_text())
    nb["cells"].append(dict(nb["cells"][0], id="new", source=text))
    nb["metadata"]["llmlab"]["version"] = exercises.version(nb)
    path.write_text(json.dumps(nb))
    return nb["metadata"]["llmlab"]["version"]


def edit(root, change):
    path = WELCOME.work(root)
    nb = json.loads(path.read_text())
    change(nb)
    path.write_text(json.dumps(nb, indent=1))


def work_on_it(nb):
    cell(nb["cells"], "exercise-softmax")["source"] = "def softmax(x):\n    return x.softmax(-1)"


def test_made_then_kept(root):
    assert workspace.start(WELCOME, root).what == "made"
    assert WELCOME.work(root).read_text() == WELCOME.exercise(root).read_text()
    edit(root, work_on_it)
    before = WELCOME.work(root).read_bytes()
    assert workspace.start(WELCOME, root).what == "kept"
    assert WELCOME.work(root).read_bytes() == before


def test_running_the_cells_is_not_an_edit(root):
    workspace.start(WELCOME, root)
    edit(root, lambda nb: cell(nb["cells"], "check-softmax").update(outputs=[], execution_count=3))
    new = change_course(root)
    assert workspace.start(WELCOME, root).what == "renewed"
    assert json.loads(WELCOME.work(root).read_text())["metadata"]["llmlab"]["version"] == new


@pytest.mark.parametrize("drop_metadata", [False, True])
def test_an_edited_copy_stays_when_the_course_changes(root, drop_metadata):
    workspace.start(WELCOME, root)
    edit(root, work_on_it)
    if drop_metadata:
        edit(root, lambda nb: nb["metadata"].clear())
    mine = WELCOME.work(root).read_bytes()
    change_course(root)
    for _ in range(2):
        done = workspace.start(WELCOME, root)
        assert done.what == "new beside"
        assert "--use-new" in done.message and "01-welcome.new.ipynb" in done.message
        assert WELCOME.work(root).read_bytes() == mine
    assert workspace.new_path(WELCOME, root).read_text() == WELCOME.exercise(root).read_text()
    workspace.new_path(WELCOME, root).write_text("the learner works here already")
    workspace.start(WELCOME, root)
    assert workspace.new_path(WELCOME, root).read_text() == "the learner works here already"


def test_moving_over_keeps_both(root):
    workspace.start(WELCOME, root)
    edit(root, work_on_it)
    mine = WELCOME.work(root).read_bytes()
    change_course(root)
    workspace.start(WELCOME, root)
    done = workspace.use_new(WELCOME, root)
    assert done.what == "moved over"
    assert WELCOME.work(root).with_suffix(".old-1.ipynb").read_bytes() == mine
    assert workspace.start(WELCOME, root).what == "kept"
    with pytest.raises(workspace.Blocked, match="no work"):
        workspace.use_new(WELCOME, root)


def test_a_broken_copy_is_kept_and_told(root):
    workspace.start(WELCOME, root)
    WELCOME.work(root).write_text('{"cells": [')
    done = workspace.start(WELCOME, root)
    assert done.what == "unreadable" and "JSON is broken" in done.message
    assert WELCOME.work(root).read_text() == '{"cells": ['


def test_a_broken_record_is_survived(root):
    workspace.start(WELCOME, root)
    for text in ("{", "[]", '{"01-start/01-welcome": 3}'):
        (root / "work" / ".copies.json").write_text(text)
        assert workspace.start(WELCOME, root).what == "kept"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written(root):
    (root / "work").mkdir(mode=0o500)
    with pytest.raises(workspace.Blocked, match="cannot be written"):
        workspace.start(WELCOME, root)


def test_a_file_in_the_place_of_the_folder(root):
    (root / "work").write_text("")
    with pytest.raises(workspace.Blocked, match="cannot be written"):
        workspace.start(WELCOME, root)


def test_checks_are_put_back(root):
    workspace.start(WELCOME, root)
    assert workspace.restore_checks(WELCOME, root).what == "kept"

    def harm(nb):
        cells = nb["cells"]
        work_on_it(nb)
        cells.remove(cell(cells, "check-weight_bytes"))
        cell(cells, "check-tokens_per_second")["source"] = "print('right')"
        cells.append(dict(cell(cells, "check-softmax"), id="twice"))
        cells.append(
            {
                "cell_type": "code",
                "id": "mine",
                "metadata": {},
                "source": "mine = 1",
                "outputs": [],
                "execution_count": 1,
            }
        )

    edit(root, harm)
    harmed = WELCOME.work(root).read_text()
    done = workspace.restore_checks(WELCOME, root)
    assert done.what == "restored"
    assert all(name in done.message for name in ("weight_bytes", "tokens_per_second", "softmax"))
    cells = json.loads(WELCOME.work(root).read_text())["cells"]
    given = json.loads(WELCOME.exercise(root).read_text())["cells"]
    for name in ("weight_bytes", "tokens_per_second", "softmax"):
        there = [c for c in cells if c["id"] == f"check-{name}"]
        assert [c["source"] for c in there] == [cell(given, f"check-{name}")["source"]]
        assert index(cells, f"check-{name}") == index(cells, f"exercise-{name}") + 1
    assert "x.softmax(-1)" in "".join(cell(cells, "exercise-softmax")["source"])
    assert "mine = 1" in "".join(cell(cells, "mine")["source"])
    assert WELCOME.work(root).with_suffix(".before-restore-1.ipynb").read_text() == harmed


def test_restoring_needs_a_notebook(root):
    with pytest.raises(FileNotFoundError, match="llmlab start"):
        workspace.restore_checks(WELCOME, root)
    workspace.start(WELCOME, root)
    WELCOME.work(root).write_text("no")
    with pytest.raises(workspace.Blocked, match="JSON is broken"):
        workspace.restore_checks(WELCOME, root)


def test_all_built_lessons_are_started(root):
    assert [c.path for c in workspace.start_all(root)] == [WELCOME.work(root)]
