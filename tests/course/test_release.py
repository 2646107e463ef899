"""The nbgrader course: its source, and nbgrader's own commands on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from llmlab.course import release, syllabus
from llmlab.course.grading.marking import hidden, replaced_functions
from tests.course.learner import NAMES, ROOT, WELCOME, cell, solved_sources

ASSIGNMENT = "01-start-01-welcome"
# nbgrader's commands, one a line: each is a fork of this process, which imports once.
NBGRADER = """
import json, os, sys
from llmlab.course.grammar import leave_out_grammar
leave_out_grammar()
from nbgrader.apps.nbgraderapp import main
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.dup2(2, 1)
        sys.argv[1:] = json.loads(line)
        sys.exit(main())
    status = os.waitpid(pid, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


def test_the_source_is_solved_and_has_hidden_tests(tmp_path):
    made = release.release(tmp_path, ROOT, [WELCOME])
    assert [str(p.relative_to(tmp_path)) for p in made] == [
        "nbgrader_config.py",
        f"source/{ASSIGNMENT}/01-welcome.ipynb",
    ]
    nb = nbformat.read(made[1], as_version=4)
    code = "\n".join(c.source for c in nb.cells if c.cell_type == "code")
    assert code.count("### BEGIN SOLUTION") == code.count("### BEGIN HIDDEN TESTS") == 3
    assert "Why" not in "\n".join(
        c.source
        for c in nb.cells
        if c.cell_type == "markdown" and "solution" in c.metadata.get("tags", [])
    )
    assert not any("../../" in c.source for c in nb.cells)


def test_settings_of_the_instructor_stay(tmp_path):
    release.release(tmp_path, ROOT, [WELCOME])
    (tmp_path / "nbgrader_config.py").write_text("# mine")
    release.release(tmp_path, ROOT, [WELCOME])
    assert (tmp_path / "nbgrader_config.py").read_text() == "# mine"


def test_all_lessons_can_be_released(tmp_path):
    made = release.release(tmp_path, ROOT)
    solved = [
        x for x in syllabus.lessons() if x.solution(ROOT).with_suffix(".py").is_file()
    ]
    assert len(made) == 1 + len(solved)


def test_hidden_tests_use_other_numbers():
    module = "llmlab.checks.start.welcome"
    names: dict = {}
    exec("import torch\n" + solved_sources()["softmax"], names)
    hidden(module, "softmax", names["softmax"])
    from llmlab.checks.start.welcome import check

    seen = []
    check.weight_bytes.verdict(
        lambda params, bits=16: seen.append((params, bits)) or -(-params * bits // 8)
    )

    def knows_the_open_numbers(params, bits=16):
        if params > 10**6 and all(params != p for p, _ in seen):
            return 0
        return int(-(-params * bits // 8))

    assert check.weight_bytes.verdict(knows_the_open_numbers).outcome == "right"
    with pytest.raises(AssertionError, match="weight_bytes"):
        hidden(module, "weight_bytes", knows_the_open_numbers)


def test_replaced_functions_are_found(monkeypatch):
    from llmlab.start import welcome

    assert replaced_functions() == []
    monkeypatch.setattr(welcome, "softmax", lambda x: x)
    assert replaced_functions() == ["llmlab.start.welcome.softmax"]
    with pytest.raises(
        AssertionError, match=r"replaces llmlab\.start\.welcome\.softmax"
    ):
        hidden("llmlab.checks.start.welcome", "softmax", lambda x: x)


@pytest.fixture(scope="module")
def graded(tmp_path_factory, warm):
    """An nbgrader course with two submissions, released, marked and with feedback."""
    pytest.importorskip("nbgrader")
    folder = tmp_path_factory.mktemp("nbgrader")
    release.release(folder, ROOT, [WELCOME])

    env = os.environ | {
        "JUPYTER_PLATFORM_DIRS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    log = folder / "log"
    with log.open("w") as stderr:
        program = subprocess.Popen(
            [sys.executable, "-c", NBGRADER],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=env,
        )

    def nbgrader(*words: str) -> None:
        print(json.dumps(words), file=program.stdin, flush=True)
        assert program.stdout.readline() == "0\n", log.read_text()[-3000:]

    nbgrader("generate_assignment", ASSIGNMENT, "--create")
    given = json.loads(
        (folder / "release" / ASSIGNMENT / "01-welcome.ipynb").read_text(
            encoding="utf-8"
        )
    )
    wrong = {
        "weight_bytes": solved_sources()["weight_bytes"],
        "softmax": "def softmax(x):\n    return x.softmax(0)",
    }
    for student, answers in (("right", solved_sources()), ("wrong", wrong)):
        nb = json.loads(json.dumps(given))
        for name, source in answers.items():
            cell(nb["cells"], f"exercise-{name}")["source"] = source
        if student == "wrong":
            # autograde puts the check back
            cell(nb["cells"], "check-softmax")["source"] = "pass"
        path = folder / "submitted" / student / ASSIGNMENT / "01-welcome.ipynb"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(nb), encoding="utf-8")
    nbgrader("autograde", ASSIGNMENT, "--create")
    nbgrader("generate_feedback", ASSIGNMENT)
    program.communicate()
    return folder, given


@pytest.mark.slow
def test_students_get_neither_solutions_nor_hidden_tests(graded):
    given = graded[1]
    code = "\n".join("".join(c["source"]) for c in given["cells"])
    assert "HIDDEN" not in code and "SOLUTION" not in code and "runpy" not in code
    # three stubs, and the sentence that speaks of them
    assert code.count("raise NotImplementedError") == 4
    assert all(f"check.{name}({name})" in code for name in NAMES)


@pytest.mark.slow
def test_its_points_are_ours(graded):
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{graded[0]}/gradebook.db") as book:
        points = {s: book.find_submission(ASSIGNMENT, s) for s in ("right", "wrong")}
        assert points["right"].max_score == 5
        assert {s: x.score for s, x in points.items()} == {"right": 5, "wrong": 1}


@pytest.mark.slow
def test_feedback_names_the_mistake(graded):
    page = (
        graded[0] / "feedback" / "wrong" / ASSIGNMENT / "01-welcome.html"
    ).read_text(encoding="utf-8")
    assert "you normalise over the first dimension" in page
