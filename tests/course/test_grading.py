"""`llmlab check` on whatever a learner's notebook may be."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from llmlab.course.exercises import version
from llmlab.course.grading import graded_copy, grading, running
from tests.course.forked_pytest import ForkedPytest
from tests.course.learner import NAMES, ROOT, WELCOME, cell, code, index, notebook

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm")]  # each starts a kernel


@pytest.fixture(scope="module")
def pytest_ahead():
    """Starts the runs of all tests but one, without its imports in each."""
    forked = ForkedPytest()
    yield forked
    forked.close()


@pytest.fixture
def grade_from_the_start(tmp_path):
    """Marks a notebook (or the text of a file) that lies in a folder of its own."""

    def run(
        nb: dict | str | bytes, seconds: float = 60.0, stop: float = 15.0
    ) -> tuple[grading.LessonResult, dict[str, grading.Result]]:
        path = tmp_path / "01-welcome.ipynb"
        data = json.dumps(nb) if isinstance(nb, dict) else nb
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        result = grading.grade(WELCOME, ROOT, path, seconds, stop)
        return result, {e.name: e for e in result.exercises}

    return run


@pytest.fixture
def quick(pytest_ahead, monkeypatch):
    """What is graded starts as a fork."""
    monkeypatch.setattr(running, "subprocess", pytest_ahead)


@pytest.fixture
def grade(grade_from_the_start, quick):
    """The same, started as a fork."""
    return grade_from_the_start


def outcomes(by_name: dict[str, grading.Result]) -> list[str]:
    return [by_name[n].outcome for n in NAMES]


def kernels() -> list[int]:
    """The processes of this test's runs.

    A fork of the warm process does not show its folder.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(
                Path(tempfile.gettempdir()) / "llmlab-check-"
            ) in process.environ().get("LLMLAB_RECORD", ""):
                found.append(process.pid)
    return found


def test_solved_with_cells_and_magics_of_their_own(grade_from_the_start):
    def add(cells):
        cells.insert(
            1, code("%timeit -n1 -r1 1+1\n!echo shell\n%pylab_that_is_not\n", "a")
        )
        cells.insert(
            2,
            code(
                "# %matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1]);"
                " plt.show()",
                "b",
            ),
        )
        cells.insert(3, code("input('a question')", "c"))
        cells.insert(4, code("%%time\nscratch = 3", "d"))
        cells.append(code("1 / 0", "e"))
        cells.insert(5, code("for _ in range(30): print('y' * 1_000_000)", "megabytes"))
        cells.insert(6, code("import sys; sys.exit(0)", "exit"))

    result, by_name = grade_from_the_start(notebook(*NAMES, change=add))
    assert outcomes(by_name) == ["right"] * 3
    assert (result.points, result.ok) == (5, True)
    notes = "\n".join(result.notes)
    assert (
        "ZeroDivisionError" in notes and "input" in notes and "matplotlib" not in notes
    )


def test_half_solved_wrong_and_raising(grade):
    wrong = (
        "def tokens_per_second(weight_bytes, bandwidth, batch=1, cache_bytes=0.0):\n   "
        " return bandwidth / weight_bytes"
    )
    raising = "def softmax(x):\n    return x @ x.missing"
    result, by_name = grade(
        notebook(
            "weight_bytes", answers={"tokens_per_second": wrong, "softmax": raising}
        )
    )
    assert outcomes(by_name) == ["right", "wrong", "error"]
    assert result.points == 1
    assert "leave the cache out" in by_name["tokens_per_second"].message
    assert "AttributeError" in by_name["softmax"].message
    assert "return x @ x.missing" in by_name["softmax"].detail


def test_renamed_broken_and_leaving(grade):
    answers = {
        "weight_bytes": (
            "def weights_bytes(params, bits=16):\n    return params * bits // 8"
        ),
        "tokens_per_second": "def tokens_per_second(x:\n    return x",
        "softmax": "exit()\ndef softmax(x): return x",
    }
    _, by_name = grade(notebook(answers=answers))
    assert outcomes(by_name) == ["missing", "error", "error"]
    assert "rename it to `weights_bytes`" in by_name["weight_bytes"].message
    assert "SyntaxError" in by_name["tokens_per_second"].message
    assert "exit() ends the notebook" in by_name["softmax"].message


def test_endless_loop_in_an_answer_and_in_a_cell(grade):
    loops = {
        "weight_bytes": "def weight_bytes(params, bits=16):\n    while True: pass",
        "tokens_per_second": "while True:\n    print('x' * 1000)",
    }
    result, by_name = grade(notebook("softmax", answers=loops), seconds=8)
    assert outcomes(by_name) == ["timeout", "timeout", "right"]
    assert result.points == 2
    assert "8 seconds" in by_name["weight_bytes"].message


def test_a_loop_that_cannot_be_interrupted(grade, tmp_path, monkeypatch):
    """In a plain kernel: it sees within a second that its parent is gone."""
    monkeypatch.setenv("LLMLAB_COLD", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stubborn = (
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"
    )
    seen = []
    watching = threading.Thread(target=lambda: seen.append(wait_for_kernels(True)))
    watching.start()
    _, by_name = grade(
        notebook("weight_bytes", "softmax", answers={"tokens_per_second": stubborn}),
        seconds=8,
        stop=2,
    )
    watching.join()
    assert outcomes(by_name) == ["right", "timeout", "right"]
    assert seen == [True] and wait_for_kernels(False)


def wait_for_kernels(there: bool, seconds: float = 60.0) -> bool:
    """Whether there were some, or none, before the time was up."""
    end = time.monotonic() + seconds
    while bool(kernels()) != there:
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def test_a_cell_that_ends_the_kernel(grade):
    ends = {
        "weight_bytes": "import os\nos._exit(3)",
        "tokens_per_second": "def tokens_per_second(*a):\n    import os; os._exit(3)",
    }
    result, by_name = grade(notebook("softmax", answers=ends))
    assert outcomes(by_name) == ["died", "died", "right"]
    assert "ended the kernel" in by_name["weight_bytes"].message
    assert result.points == 2


def test_deleted_and_edited_checks_earn_nothing(grade):
    def change(cells):
        cells.remove(cell(cells, "check-weight_bytes"))
        cell(cells, "check-tokens_per_second")["source"] = (
            "try:\n    check.tokens_per_second(tokens_per_second)\nexcept Exception:"
            " pass"
        )
        cell(cells, "check-softmax")["source"] = "print('✓ softmax: right (2 points)')"

    result, by_name = grade(notebook("weight_bytes", "softmax", change=change))
    assert outcomes(by_name) == ["check missing", "check edited", "check edited"]
    assert result.points == 0
    assert all(
        e.next == "llmlab start 01-welcome --restore-checks" for e in by_name.values()
    )
    assert "passes the course's own check" in by_name["softmax"].message
    assert "not done" in by_name["tokens_per_second"].message


def test_duplicated_moved_and_reformatted_checks_count_once(grade):
    def change(cells):
        check = cell(cells, "check-weight_bytes")
        cells.append(dict(check, id="copy-of-it"))
        moved = cells.pop(index(cells, "check-softmax"))
        cells.insert(1, moved)  # before the answer is defined, and before the import
        cell(cells, "check-tokens_per_second")["source"] = (
            "# is it right?\ncheck.tokens_per_second(\n    tokens_per_second\n)\n"
        )

    result, by_name = grade(notebook(*NAMES, change=change))
    assert outcomes(by_name) == ["right"] * 3
    assert result.points == 5


def test_a_notebook_that_went_through_other_hands(grade, tmp_path):
    """No ids, no metadata, sources as lists, and cells that are none.

    The learner's own module lies beside it.
    """

    def change(cells):
        for c in cells:
            del c["id"]
            c["metadata"] = {}
            c["source"] = (
                c["source"].splitlines(keepends=True)
                if isinstance(c["source"], str)
                else c["source"]
            )
        odd = [
            None,
            {"cell_type": "code"},
            {"source": 3},
            {"cell_type": "code", "metadata": {"nbgrader": 3}, "source": "x=1"},
        ]
        cells[:0] = odd

    (tmp_path / "helpers.py").write_text("factor = 8\n")
    own = (
        "from helpers import factor\nimport math\ndef weight_bytes(params, bits=16):\n"
        "    return math.ceil(params * bits / factor)"
    )
    nb = notebook(
        "tokens_per_second", "softmax", answers={"weight_bytes": own}, change=change
    )
    nb |= {"metadata": {}, "nbformat_minor": 4}
    assert grade(nb)[0].points == 5


def test_what_lies_beside_a_notebook_hides_no_library(grade, tmp_path):
    for name in ("torch", "llmlab"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    assert outcomes(grade(notebook(*NAMES))[1]) == ["right"] * 3


def test_a_verdict_that_comes_twice_is_none(grade):
    twice = """
from ipykernel.zmqshell import ZMQDisplayPublisher
publish = ZMQDisplayPublisher.publish
ZMQDisplayPublisher.publish = lambda *a, **k: (publish(*a, **k), publish(*a, **k))
"""
    changed = notebook("softmax", change=lambda cells: cells.insert(1, code(twice)))
    assert grade(changed)[1]["softmax"].outcome == "tampered"


def test_the_number_of_a_check_is_not_where_an_answer_looks(
    grade, tmp_path, monkeypatch
):
    monkeypatch.setattr(running.secrets, "token_hex", lambda n: "number-of-a-check")
    look = """
import os, pathlib, re
def softmax(*args):
    run = pathlib.Path(os.environ["LLMLAB_RECORD"]).parent
    texts = [path.read_text() for path in run.glob("*.*")]
    texts += [str(get_ipython().get_parent()), str(In), str(dict(os.environ))]
    found = re.findall("number-of" + "-a-check", " ".join(texts))
    pathlib.Path("found").write_text(" ".join(found))
"""
    grade(notebook(answers={"softmax": look}))
    assert (tmp_path / "found").read_text() == ""


FORGERIES = {
    "its own check, patched checking": (
        "class Always:\n    def __getattr__(self, name): return lambda *a, **k:"
        " print('right')\ncheck = Always()\nimport llmlab.course.grading.checking as c,"
        " llmlab.checks.start.welcome as w\nc.Exercise.verdict = lambda self, *a, **k:"
        " c.Verdict(self.name, 'right', 9, 9)\nfor e in w.check.exercises.values():"
        " e.run = lambda answer: None"
    ),
    "a patched reference": (
        "import llmlab.start.welcome as w\nw.weight_bytes = w.tokens_per_second ="
        " w.softmax = lambda *a: 1"
    ),
    "no exceptions, its own verdicts": (
        "get_ipython().set_custom_exc((Exception,), lambda *a, **k: None)\nfrom"
        " IPython.display import publish_display_data as"
        " p\nget_ipython().events.register('pre_run_cell', lambda *a: [\n   "
        " p({'application/vnd.llmlab.verdict+json': {'exercise': n, 'outcome': 'right',"
        " 'token': 't'}})\n    for n in ('weight_bytes', 'tokens_per_second',"
        " 'softmax')])"
    ),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_no_free_points(grade, forgery):
    constant = "weight_bytes = tokens_per_second = softmax = lambda *a: 1"
    result, by_name = grade(
        notebook(
            change=lambda cells: cells.insert(
                2, code(FORGERIES[forgery] + "\n" + constant)
            )
        )
    )
    assert result.points == 0
    assert not any(e.outcome == "right" for e in by_name.values())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"cells": [', "JSON is broken"),
        ("", "empty"),
        ("[1, 2]", "not a notebook"),
        ('{"worksheets": []}', "before 2015"),
        (b"\xff\xfe\x00", "not text"),
        ("<<<<<<< mine\n{}\n=======\n", "merge"),
    ],
)
def test_what_is_no_notebook(grade, text, why):
    result, by_name = grade(text)
    assert why in result.problem
    assert outcomes(by_name) == ["unreadable"] * 3
    assert result.points == 0 and not result.ok


def test_a_notebook_without_cells_of_an_older_version(grade):
    metadata = {"llmlab": {"version": "0" * 12}}
    result, by_name = grade(
        {"cells": [], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    )
    assert outcomes(by_name) == ["check missing"] * 3
    assert result.points == 0
    assert "llmlab start 01-welcome" in "\n".join(result.notes)


def test_an_exercise_notebook_fails_at_its_checks_and_nowhere_else(built, quick):
    """Each stub is "not done"; no other cell raises.

    One lesson of each part is run here; nbval runs all of them.
    """
    result = grading.grade(built, ROOT, built.exercise(ROOT))
    assert {e.outcome for e in result.exercises} == {"not done"}
    assert result.notes == []
    assert version(graded_copy.read_notebook(built.exercise(ROOT))) == result.version
    assert (result.points, result.ok) == (0, False)
    if built == WELCOME:
        assert [e.name for e in result.exercises] == list(NAMES)
        assert result.out_of == 5
        softmax = result.exercises[-1]
        assert softmax.next == "write it; llmlab hint 01-welcome softmax"


def pytest_generate_tests(metafunc):
    if "built" in metafunc.fixturenames:
        from llmlab.course.syllabus import lessons

        found = list(
            {
                x.part: x for x in reversed(lessons()) if x.exercise(ROOT).is_file()
            }.values()
        )
        metafunc.parametrize("built", found, ids=lambda x: x.slug)


def test_grading_needs_a_notebook(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"01-welcome\.ipynb does not exist"):
        grading.grade(WELCOME, ROOT, tmp_path / "01-welcome.ipynb")


def test_the_grader_does_not_import_torch():
    """So that `llmlab check` says quickly what it can say without a kernel."""
    code_ = "import sys, llmlab.course.grading.grading; print('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code_], capture_output=True, text=True
        ).stdout.strip()
        == "False"
    )


def test_the_grader_builds_no_grammar():
    """jsonschema builds one for three seconds where JupyterLab is installed."""
    code_ = (
        "import llmlab.course.grading.nbval_plugin, nbval.plugin, sys; print('nbformat'"
        " in sys.modules, 'lark' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code_], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr
