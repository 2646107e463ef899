"""The command `llmlab`: its exit statuses, what it prints, what machines read."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from llmlab.course.grading import report
from llmlab.course.grading.grading import LessonResult, Result
from tests.course.learner import WELCOME, notebook


@pytest.fixture
def marked(monkeypatch):
    """A grader that gives what it is told, without a kernel."""

    def give(*outcomes: str, problem: str = ""):
        names = [("weight_bytes", 1), ("tokens_per_second", 2), ("softmax", 2)]
        made = [
            Result(
                n,
                p,
                o,
                p if o == "right" else 0,
                "" if o == "right" else "a <word> & a \x00",
                "line 1",
                "do this",
            )
            for (n, p), o in zip(names, outcomes, strict=True)
        ]
        result = LessonResult(
            WELCOME.slug,
            WELCOME.title,
            "work/x.ipynb",
            "v1",
            made,
            problem,
            ["a note"],
            1.5,
        )
        monkeypatch.setattr(
            "llmlab.course.grading.grade", lambda *args, **options: result
        )

    return give


def cpu_seconds() -> float:
    """Of the processes started so far: other programs do not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_names_every_command_and_is_quick():
    best = 9.0
    for _ in range(3):
        started = cpu_seconds()
        done = subprocess.run(
            [sys.executable, "-m", "llmlab.course.cli.main", "--help"],
            capture_output=True,
            text=True,
        )
        best = min(best, cpu_seconds() - started)
    assert done.returncode == 0
    for word in (
        "lab",
        "start",
        "reset",
        "check",
        "progress",
        "hint",
        "doctor",
        "model",
        "peer",
        "book",
        "new",
        "release",
        "First time here?",
    ):
        assert word in done.stdout
    assert "\x1b" not in done.stdout and "..." not in done.stdout.replace(
        "[ARGS]...", ""
    )
    assert best < 0.7


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from llmlab.course import cli\nprint({'torch', 'rich', 'nbformat',"
        " 'jupytext', 'IPython', 'numpy'} & set(sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True
        ).stdout.strip()
        == "set()"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["check", "no-such-lesson"],
        ["check"],
        ["check", "welcome"],
        ["start", "no-such-lesson"],
        ["reset", "no-such-lesson"],
        ["start", "welcome", "--use-new", "--restore-checks"],
        ["start", "welcome", "--use-new", "--solution"],
        ["hint", "welcome", "no-such-exercise"],
        ["hint", "05-capstone", "x"],
        ["release"],
        ["model", "fetch", "--source", "nowhere"],
    ],
)
def test_misuse_is_2_and_says_why(llmlab, words):
    done = llmlab(*words)
    assert done.exit_code == 2
    assert done.output.strip() and "Traceback" not in done.output


def test_start_says_what_happened(llmlab, root):
    done = llmlab("start", "welcome")
    assert (
        done.exit_code == 0 and "work/01-start/01-welcome.ipynb is yours" in done.output
    )
    assert llmlab("start", "welcome").output.strip().endswith("yours already")
    WELCOME.work(root).write_text("{")
    assert llmlab("start", "welcome").exit_code == 1
    assert llmlab("start", "welcome", "--restore-checks").exit_code == 1
    assert llmlab("start", "05-capstone").exit_code == 1


def test_start_and_reset_a_lesson(llmlab, root):
    lesson, copy = WELCOME.notebook(root), WELCOME.lesson_copy(root)
    lesson.write_text(WELCOME.exercise(root).read_text())
    done = llmlab("start", "welcome")
    assert done.exit_code == 0
    assert [line.split(" is yours")[0] for line in done.output.splitlines()] == [
        "work/lessons/01-start/01-welcome.lesson.ipynb",
        "work/01-start/01-welcome.ipynb",
    ]
    for path, words in ((copy, []), (WELCOME.work(root), ["--exercises"])):
        assert "as the course gives it" in llmlab("reset", "welcome", *words).output
        path.write_text("mine")
        done = llmlab("reset", "welcome", *words)
        old = path.with_suffix(".old-1.ipynb")
        assert done.exit_code == 0 and old.name in done.output
        assert old.read_text() == "mine"
        assert json.loads(path.read_text())["cells"]
    assert llmlab("reset", "05-capstone").exit_code == 1
    WELCOME.solution(root).write_text(WELCOME.exercise(root).read_text())
    assert not WELCOME.solution_copy(root).exists()
    assert llmlab("start", "welcome", "--solution").exit_code == 0
    assert WELCOME.solution_copy(root).is_file()


def test_moving_over_takes_lesson_and_exercises(llmlab, root):
    WELCOME.notebook(root).write_text(WELCOME.exercise(root).read_text())
    llmlab("start", "welcome")
    for path in (WELCOME.lesson_copy(root), WELCOME.work(root)):
        path.with_suffix(".new.ipynb").write_text(path.read_text())
    done = llmlab("start", "welcome", "--use-new")
    assert done.exit_code == 0 and done.output.count("is the new version") == 2
    assert llmlab("start", "welcome", "--use-new").exit_code == 1


def test_check_prints_a_table_and_keeps_progress(llmlab, root, marked):
    llmlab("start", "welcome")
    marked("right", "wrong", "not done")
    done = llmlab("check")
    assert done.exit_code == 1
    lines = done.output.splitlines()
    assert [line.split() for line in lines if line.startswith("weight_bytes")] == [
        ["weight_bytes", "✓", "right", "1/1", "do", "this"]
    ]
    assert (
        "tokens_per_second: a <word>" in done.output and "note: a note" in done.output
    )
    assert "1 of 5 points" in done.output
    shown = llmlab("progress").output
    assert (
        "●○○   1 of 3" in shown
        and "planned" in shown
        and "llmlab check 01-welcome" in shown
    )
    marked("right", "right", "right")
    assert llmlab("check", "welcome").exit_code == 0
    assert "●●●   3 of 3  done" in llmlab("progress").output


def test_check_for_machines(llmlab, root, marked):
    llmlab("start", "welcome")
    marked("right", "timeout", "check edited")
    done = llmlab("check", "--json", "-", "--junit", root / "out" / "junit.xml")
    data = json.loads(done.stdout)
    assert (data["schema"], data["ok"], data["points"], data["out_of"]) == (
        "llmlab.check/1",
        False,
        1,
        5,
    )
    assert [e["outcome"] for e in data["lessons"][0]["exercises"]] == [
        "right",
        "timeout",
        "check edited",
    ]
    assert set(data["lessons"][0]["exercises"][0]) == {
        "name",
        "outcome",
        "points",
        "out_of",
        "message",
        "detail",
        "next",
    }
    suite = ElementTree.parse(root / "out" / "junit.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("time")) == (
        "3",
        "2",
        "1.5",
    )
    assert [c.find("failure") is None for c in suite] == [True, False, False]
    assert suite[1][0].get("type") == "timeout"


def test_progress_for_machines(llmlab, root):
    data = json.loads(llmlab("progress", "--json", "-").stdout)
    assert (data["schema"], data["points"], data["out_of"]) == ("llmlab.course/1", 0, 5)
    llmlab("progress", "--json", root / "p.json")
    assert json.loads((root / "p.json").read_text(encoding="utf-8")) == data


def test_a_broken_notebook_is_told(llmlab, root):
    llmlab("start", "welcome")
    WELCOME.work(root).write_text('{"cells": [', encoding="utf-8")
    done = llmlab("check", "welcome")
    assert done.exit_code == 1
    assert "JSON is broken" in done.output and "! unreadable" in done.output


def test_progress_that_cannot_be_kept_does_not_spoil_the_marks(
    llmlab, root, marked, monkeypatch
):
    from llmlab.course import progress

    llmlab("start", "welcome")
    marked("right", "right", "right")

    def no(*args):
        raise progress.NotKept("progress is not kept: disk full")

    monkeypatch.setattr(progress, "record", no)
    done = llmlab("check")
    assert (
        done.exit_code == 0
        and "disk full" in done.output
        and "5 of 5 points" in done.output
    )


def test_hints_go_on(llmlab):
    tiers = [llmlab("hint", "welcome", "softmax").output for _ in range(4)]
    assert (
        "hint 1 of 3" in tiers[0]
        and "hint 2 of 3" in tiers[1]
        and "the last" in tiers[2]
    )
    assert tiers[3] == tiers[2] and "keepdim" not in tiers[0]


def test_new_lays_out_and_refuses(llmlab, root):
    done = llmlab("new", "05-capstone")
    assert (
        done.exit_code == 0
        and "made notebooks/10-applications/05-capstone.py" in done.output
    )
    assert llmlab("new", "05-capstone").exit_code == 1


@pytest.mark.parametrize(
    ("command", "module", "function"),
    [
        (["lab", "--no-browser", "--port", "9"], "lab", "run"),
        (["doctor"], "doctor", "run"),
        (["book"], "book.build", "main"),
    ],
)
def test_thin_commands_pass_on_the_status(
    llmlab, monkeypatch, command, module, function
):
    from importlib import import_module

    seen = []
    monkeypatch.setattr(
        import_module(f"llmlab.course.{module}"),
        function,
        lambda *a, **k: seen.append((a, k)) or 1,
    )
    assert llmlab(*command).exit_code == 1
    assert len(seen) == 1
    if module == "lab":
        assert seen[0][1]["port"] == 9 and seen[0][1]["browser"] is False


def test_model_commands(llmlab, monkeypatch, tmp_path):
    from llmlab.models import real_model

    def missing():
        raise FileNotFoundError("fetch it with: llmlab model fetch")

    monkeypatch.setattr(real_model, "path", missing)
    assert llmlab("model", "info").exit_code == 1
    monkeypatch.setattr(real_model, "verify", lambda: {"model.safetensors": False})
    done = llmlab("model", "verify")
    assert done.exit_code == 1 and "BROKEN" in done.output and "--force" in done.output
    monkeypatch.setattr(real_model, "fetch", lambda source, force: tmp_path / source)
    assert f"{tmp_path}/hub" in llmlab("model", "fetch", "--source", "hub").output


def test_output_in_a_pipe_is_plain(root, capsys):
    result = LessonResult(
        "a/b",
        "B",
        "work/b.ipynb",
        "v",
        [Result("f" * 30, 2, "wrong", 0, "m" * 300, "", "n" * 40)],
    )
    report.print_check([result], report.console())
    out = capsys.readouterr().out
    assert "\x1b" not in out and "m" * 300 in out and "n" * 40 in out


def test_on_a_terminal_it_fits_and_has_colour(monkeypatch):
    from io import StringIO

    from rich.console import Console

    out = Console(
        file=StringIO(), force_terminal=True, width=70, highlight=False, markup=False
    )
    result = LessonResult(
        "a/b",
        "B",
        "work/b.ipynb",
        "v",
        [Result("f", 2, "wrong", 0, "[bold]", "", "n" * 80)],
    )
    report.print_check([result], out)
    assert "\x1b[31m" in out.file.getvalue() and "[bold]" in out.file.getvalue()


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_whole_way_of_a_learner(llmlab, root):
    """start → wrong → right, by the real grader."""
    llmlab("start", "welcome")
    WELCOME.work(root).write_text(
        json.dumps(
            notebook(
                "weight_bytes",
                answers={"softmax": "def softmax(x): return x.softmax(0)"},
            )
        )
    )
    done = llmlab("check", "01-welcome")
    assert done.exit_code == 1
    assert (
        "you normalise over the first dimension" in done.output
        and "1 of 5 points" in done.output
    )
    WELCOME.work(root).write_text(
        json.dumps(notebook("weight_bytes", "tokens_per_second", "softmax"))
    )
    assert llmlab("check", "01-welcome").exit_code == 0
    assert SimpleNamespace(**report.course_as_data(root)[0]).points == 5
