"""exercises/ is made from solutions/, the same each time.

A source that is not well formed is refused.
"""

from __future__ import annotations

import json
import re

import nbformat
import pytest

from llmlab.course import exercises
from llmlab.course.grading import solutions
from llmlab.course.syllabus import lessons
from tests.course.learner import NAMES, ROOT, WELCOME, course


@pytest.fixture
def root(tmp_path):
    return course(tmp_path)


@pytest.fixture
def inside(root, monkeypatch):
    monkeypatch.chdir(root)
    return root


def rewrite(root, old, new, count=1):
    path = WELCOME.solution(root).with_suffix(".py")
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, count), encoding="utf-8")


def test_every_exercise_notebook_is_up_to_date():
    assert {str(p.relative_to(ROOT)) for p in exercises.stale(ROOT)} == set()


def test_it_is_valid_unsolved_and_the_same_each_time(root):
    first, second = (
        exercises.as_text(exercises.exercise_notebook(WELCOME, root)) for _ in range(2)
    )
    assert first == second
    nb = nbformat.reads(first, as_version=4)
    nbformat.validate(nb)
    ids = [c.id for c in nb.cells]
    assert len(ids) == len(set(ids)) and all(
        re.fullmatch(r"[\w-]{1,64}", i) for i in ids
    )
    code = "\n".join(c.source for c in nb.cells if c.cell_type == "code")
    assert code.count("raise NotImplementedError") == 3
    for word in ("SOLUTION", "amax", "math.ceil(", "batch * bandwidth"):
        assert word not in code
    assert not any("solution" in c.metadata.get("tags", []) for c in nb.cells)
    assert all(
        not c.get("outputs") and c.get("execution_count") is None for c in nb.cells
    )


def test_its_opening_and_its_end_lead_somewhere(root):
    cells = exercises.exercise_notebook(WELCOME, root).cells
    links = re.findall(r"\]\((\.\./\.\./[^)]*)\)", cells[0].source + cells[-1].source)
    assert links == [
        f"../../notebooks/{WELCOME.slug}.ipynb",
        f"../../solutions/{WELCOME.slug}.ipynb",
    ]
    assert f"llmlab check {WELCOME.slug}" in cells[-1].source
    assert "import check" in cells[1].source


def test_what_the_solution_says_of_symbols_is_told_the_learner():
    lesson = next(x for x in lessons() if x.slug == "06-compression/05-gptq")
    opening = exercises.exercise_notebook(lesson, ROOT).cells[0].source
    assert "$W$ has shape (out, in)" in opening
    assert "Solutions" not in opening
    assert opening.count("Stuck?") == 1  # how hints are shown is said once


def test_what_nbgrader_needs(root):
    cells = exercises.exercise_notebook(WELCOME, root).cells
    graded = {
        c.metadata.nbgrader.grade_id: c.metadata.nbgrader
        for c in cells
        if "nbgrader" in c.metadata
    }
    assert {k for k, v in graded.items() if v.solution} == {
        f"exercise-{n}" for n in NAMES
    }
    assert {k: v.points for k, v in graded.items() if v.grade} == {
        f"check-{n}": p for n, p in zip(NAMES, (1, 2, 2), strict=True)
    }
    assert all(v.locked == v.grade for v in graded.values())


def test_the_version_is_what_the_cells_say(root):
    nb = exercises.exercise_notebook(WELCOME, root)
    assert (
        nb.metadata.llmlab.version
        == solutions.version(nb)
        == solutions.version(json.loads(exercises.as_text(nb)))
    )
    nb.cells[2].source += " more"
    assert nb.metadata.llmlab.version != solutions.version(nb)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("5 minutes · 1 point", "6 minutes · 1 point", "must hold the line"),
        (
            '# %% tags=["check"]\ncheck.softmax',
            "# %%\ncheck.softmax",
            'needs `tags=["check"]`',
        ),
        ("check.softmax(softmax)", "print(check.softmax(softmax))", "one call"),
        ('# %% tags=["check"]\ncheck.softmax(softmax)\n', "", "check cells mark"),
        (
            '# %% tags=["exercise"]\ndef softmax',
            "# %%\ndef softmax",
            'needs `tags=["exercise"]`',
        ),
        ("    # END SOLUTION\n", "", "END SOLUTION` is missing"),
        ("    # BEGIN SOLUTION\n", "", "without its partner"),
        (
            "from llmlab.checks.start.welcome import check",
            "import llmlab",
            "first code cell must hold",
        ),
        ("check.softmax(softmax)", "check.weight_bytes(softmax)", "check cells mark"),
    ],
)
def test_a_malformed_solution_is_refused_in_words(root, old, new, says):
    rewrite(root, old, new)
    with pytest.raises(exercises.Malformed, match=re.escape(says)):
        exercises.exercise_notebook(WELCOME, root)


def test_an_exercise_without_a_check_is_refused(root):
    path = WELCOME.solution(root).with_suffix(".py")
    extra = (
        '\n# %% tags=["exercise"]\ndef more():\n    # BEGIN SOLUTION\n    return 1\n   '
        " # END SOLUTION\n"
    )
    path.write_text(path.read_text(encoding="utf-8") + extra, encoding="utf-8")
    with pytest.raises(exercises.Malformed, match="no check cell after it"):
        exercises.exercise_notebook(WELCOME, root)


def test_the_command_checks_and_writes(inside, capsys):
    assert exercises.main(["--check"]) == 0
    rewrite(inside, "rounded up.", "rounded upwards.")
    left_over = inside / "exercises" / "01-start" / "99-gone.ipynb"
    left_over.write_text("{}")
    assert exercises.main(["--check"]) == 1
    told = capsys.readouterr().err
    assert (
        "01-welcome.ipynb is stale" in told and "99-gone.ipynb has no solution" in told
    )
    assert left_over.exists()
    assert exercises.main([]) == 0
    assert not left_over.exists()
    assert "rounded upwards." in WELCOME.exercise(inside).read_text(encoding="utf-8")
    assert exercises.main(["--check", "welcome"]) == 0


def test_the_command_refuses_nonsense(inside, capsys):
    assert exercises.main(["--frobnicate"]) == 2
    assert exercises.main(["no-such-lesson"]) == 2
    rewrite(inside, "5 minutes", "50 minutes")
    assert exercises.main([]) == 1
    assert "●○○○○ difficulty" in capsys.readouterr().err


def test_stubs():
    two = (
        "class A:\n    def f(self):\n        # BEGIN SOLUTION\n        return 1\n      "
        "  # END SOLUTION\n\n    def g(self):\n        # BEGIN SOLUTION\n        x ="
        " 2\n        return x\n        # END SOLUTION"
    )
    stub = (
        "class A:\n    def f(self):\n        raise NotImplementedError\n\n    def"
        " g(self):\n        raise NotImplementedError"
    )
    assert solutions.clear_solution(two) == stub


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("check.f(f)", "f"),
        ("# is it?\ncheck.f(f, g)  # yes", "f"),
        ("check.f()", None),
        ("check.f(f, seed=3)", None),
        ("x = check.f(f)", None),
        ("check.f(f)\ncheck.g(g)", None),
        ("other.f(f)", None),
        ("check.f(", None),
    ],
)
def test_what_a_check_cell_is(source, name):
    assert solutions.checked_name(source) == name


def test_answers_expression():
    assert solutions.answers_expression("check.f(f, g)") == "(f,g,)"
    with pytest.raises(ValueError, match="one call"):
        solutions.answers_expression("f")
