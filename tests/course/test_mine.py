"""`from mine import …`, and the pieces that `llmlab serve --mine` collects."""

from __future__ import annotations

import importlib
import json
import shutil
import sys

import pytest

from llmlab.course import mine, served
from llmlab.course.mine import Own
from llmlab.course.syllabus import find
from tests.course.learner import ROOT, WELCOME, cell, code, notebook

PAGED = find("07-inference/03-paged-attention")


@pytest.fixture
def write(root):
    """Saves a learner's notebook of Welcome."""

    def write_(*solved: str, **options) -> None:
        path = WELCOME.work(root)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(notebook(*solved, **options)))

    return write_


@pytest.fixture
def front():
    """The module `mine`, imported anew."""
    sys.modules.pop("mine", None)
    return importlib.import_module("mine")


# From the notebook


def test_a_function_that_passed_is_theirs(write, front):
    write(answers={"softmax": "import torch\n\ndef softmax(x):\n    return _soft(x)"})
    write(
        answers={
            "softmax": (
                "import torch\n"
                "MARK = 'mine'\n"
                "def softmax(x):\n"
                "    e = (x - x.max(-1, keepdim=True).values).exp()\n"
                "    return e / e.sum(-1, keepdim=True)\n"
            )
        }
    )
    from mine import softmax

    assert softmax.__globals__["MARK"] == "mine"
    assert "code cell" in softmax.__code__.co_filename


def test_it_is_what_the_notebook_says_now(write, front):
    write("weight_bytes")
    assert front.weight_bytes(2, 16) == 4
    write()
    with pytest.raises(ImportError, match="weight_bytes of 01-start/01-welcome is not"):
        from mine import weight_bytes  # noqa: F401


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def weight_bytes(n, bits):\n    return 7", "not right yet"),
        ("def weight_bytes(n, bits):\n    return n / 0", "ZeroDivisionError"),
        ("def weight_bytes(n, bits):\n    raise NotImplementedError", "not done yet"),
        ("weight_byte = 1", "not in the notebook"),
        ("1 / 0", "not in the notebook"),
        ("from nowhere import weight_bytes", "ModuleNotFoundError"),
        ("def weight_bytes(n, bits):", "not in the notebook"),
    ],
)
def test_what_is_not_right_is_not_given(write, front, source, words):
    write(answers={"weight_bytes": source})
    with pytest.raises(ImportError, match=words) as error:
        front.weight_bytes
    assert "llmlab check 01-welcome" in str(error.value)


def test_who_has_not_begun_is_told_how(root, front):
    with pytest.raises(ImportError, match=r"not begun.*llmlab start 01-welcome"):
        from mine import softmax  # noqa: F401


def test_a_notebook_that_is_none_is_named(root, front):
    WELCOME.work(root).parent.mkdir(parents=True)
    WELCOME.work(root).write_text("{")
    with pytest.raises(ImportError, match=r"cannot be read.*JSON is broken"):
        from mine import softmax  # noqa: F401


def test_an_unknown_name_brings_near_ones(root, front):
    with pytest.raises(ImportError, match=r"no exercise is called 'sofmax'.*softmax"):
        from mine import sofmax  # noqa: F401
    with pytest.raises(AttributeError):
        front.__wrapped__


def test_two_lessons_with_the_same_name_are_told_apart(write, front, monkeypatch):
    write("softmax")
    monkeypatch.setattr(mine, "asking", lambda root: {"softmax": [WELCOME, PAGED]})
    with pytest.raises(ImportError, match=r'mine\.lesson\("01-welcome"\)\.softmax'):
        from mine import softmax  # noqa: F401
    assert callable(front.lesson("01-welcome").softmax)
    with pytest.raises(AttributeError, match="asks for weight_bytes"):
        front.lesson("01-welcome").other


# What is run of a notebook


def test_only_what_defines_is_run():
    source = (
        "import math\n"
        "print('no')\n"
        "x: int = 2; y = 3\n"
        "for i in range(10**9):\n"
        "    pass\n"
        "@staticmethod\n"
        "def f():\n"
        "    return x + y\n"
        "f()\n"
    )
    kept = mine.only_definitions(source)
    assert "print" not in kept and "for i" not in kept and not kept.endswith("f()")
    assert kept.splitlines()[6] == "def f():"  # on its own line
    names, complaint = mine.run((("<a>", kept),))
    assert names["f"]() == 5 and not complaint
    assert mine.only_definitions("%time x = 1") == ""
    assert mine.only_definitions("print(1)") == ""


def test_statements_that_share_a_line_are_taken_apart():
    kept = mine.only_definitions("print('no'); y = 3")
    assert mine.run((("<a>", kept),))[0]["y"] == 3 and "print" not in kept


def test_a_cell_that_fails_ends_there_and_the_others_run():
    cells = (("<a>", "a = 1\nb = 1 / 0\nc = 3"), ("<b>", "d = a"), ("<c>", "e = f"))
    names, complaint = mine.run(cells)
    assert names["d"] == 1 and "c" not in names
    assert complaint == "<a> raised ZeroDivisionError: division by zero"


def test_checks_and_prints_of_the_notebook_do_not_run(write, capsys, front):
    def change(cells):
        cells.insert(0, code("print('loud')"))

    write("weight_bytes", change=change)
    assert front.weight_bytes(1, 8) == 1
    assert capsys.readouterr().out == ""


def test_a_function_is_made_again_elsewhere(write, root):
    write("weight_bytes")
    found = mine.look(WELCOME, root, "weight_bytes")
    assert found.is_right and found.seconds >= 0
    assert mine.function(found)(3, 8) == 3
    with pytest.raises(ValueError, match="not begun"):
        mine.function(Own("a", "b", "no copy"))


# In a process of its own


def test_a_process_of_its_own_survives_what_the_learner_wrote(write, root):
    """One is right, one ends the process, one does not end: each is said."""
    endless = "import time\ndef tokens_per_second(*a):\n    time.sleep(999)"
    ending = "import os\ndef softmax(x):\n    os._exit(1)"
    loud = "print('a')\nimport sys; sys.stdout.write('b')"
    write(
        "weight_bytes",
        answers={"tokens_per_second": endless, "softmax": ending},
        change=lambda cells: cells.insert(0, code(loud)),
    )
    names = ["weight_bytes", "softmax", "tokens_per_second"]
    told = []
    found = mine.collect(
        [(WELCOME.slug, name) for name in names], root, seconds=4, told=told.append
    )
    assert [own.outcome for own in found] == ["right", "error", "slow"]
    assert found == told
    assert "ended the process" in found[1].why
    assert "over 4 seconds" in found[2].why
    assert mine.function(found[0])(2, 8) == 2


# The pieces of the engine


def test_the_pieces_are_the_engines_and_have_exercises():
    from llmlab.inference.engine import Pieces

    fields = set(Pieces.__dataclass_fields__)
    for slug, names in served.PIECES.items():
        assert set(names) <= fields
        asked = mine.standing.exercise_names(find(slug), ROOT)
        assert not asked or set(names) <= set(asked), slug


def test_whose_pieces_they_are(root, monkeypatch):
    """Right ones are the learner's; of the others it is said why not."""
    given = PAGED.exercise(root)
    given.parent.mkdir(parents=True)
    shutil.copy(PAGED.exercise(ROOT), given)
    learners = json.loads(given.read_text())
    answer = (
        "from llmlab.inference.paged_attention import Pool\n"
        "def free(pool: Pool, table):\n"
        "    gone = []\n"
        "    for b in table[::-1]:\n"
        "        pool.counts[b] -= 1\n"
        "        if not pool.counts[b]:\n"
        "            gone.append(b)\n"
        "    pool.available.extend(gone)\n"
        "    return gone\n"
    )
    cell(learners["cells"], "exercise-free")["source"] = answer
    PAGED.work(root).parent.mkdir(parents=True)
    PAGED.work(root).write_text(json.dumps(learners))
    # in this process, which has imported what marks
    monkeypatch.setattr(
        mine,
        "collect",
        lambda wanted, root, told: [mine.look(find(s), root, n) for s, n in wanted],
    )
    rows, own = served.whose(root)
    found = {row["piece"]: (row["whose"], row["why"]) for row in rows}
    assert found["free"] == ("yours", "")
    assert found["allocate"] == ("ours", "not done yet")
    assert found["schedule"][0] == found["accept"][0] == "ours"
    assert found["accept"][1] == "the exercise is not written yet"  # in this course
    assert [each.name for each in own] == ["free"]
