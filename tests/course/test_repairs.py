"""The place in a learner's code where one change makes the answer right."""

from __future__ import annotations

import ast
import itertools
import math
import time

import pytest
import torch

from llmlab.course import exercises
from llmlab.course.grading import repairs
from llmlab.course.grading.changes import Code, changes
from llmlab.course.grading.checking import Checks, diagnose
from llmlab.course.grading.repairs import bounded, repaired, source_tree
from llmlab.course.syllabus import find

ONE = {"points": 1, "minutes": 1, "difficulty": 1, "importance": 1, "hints": ("-",)}
check = Checks("04-peft/05-lora")  # its worked answers do not know these exercises


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """The search goes to its end on a busy machine, too."""
    monkeypatch.setattr(repairs, "SECONDS", 60.0)


@check.exercise(**ONE)
def running(answer):
    """The running mean of `values`, of `n` at a time; `scale` times as large."""
    for n, scale in ((1, 2.0), (3, 0.5), (4, 3.0)):
        values = torch.randn(9).tolist()
        right = [
            scale * sum(values[max(0, i - n + 1) : i + 1]) / min(i + 1, n)
            for i in range(len(values))
        ]
        got = answer(values, n, scale)
        what = f"running(values, {n}, {scale})"
        diagnose(torch.tensor(got), right=torch.tensor(right), what=what)


def one_too_few(values, n, scale):
    out = []
    for i in range(len(values)):
        window = values[max(0, i - n) : i + 1]
        out.append(scale * sum(window) / min(i + 1, n))
    return out


def border(values, n, scale):
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value
        if i > n:
            total -= values[i - n]
        out.append(scale * total / min(i + 1, n))
    return out


def one_factor_more(values, n, scale):
    out = []
    for i in range(len(values)):
        window = values[max(0, i - n + 1) : i + 1]
        mean = sum(window) / len(window)
        out.append(scale * mean * scale)
    return out


def not_carried(values, n, scale):
    out = []
    total = 0.0
    for i, value in enumerate(values):
        total = value
        if i >= n:
            total -= values[i - n]
        out.append(scale * total / min(i + 1, n))
    return out


def other_variable(values, n, scale):
    out = []
    for i in range(len(values)):
        window = values[max(0, i - n + 1) : i + 1]
        out.append(scale * sum(values) / len(window))
    return out


def after_the_loop(values, n, scale):
    out = []
    for i in range(len(values)):
        window = values[max(0, i - n + 1) : i + 1]
    out.append(scale * sum(window) / len(window))
    return out


def two_at_once(values, n, scale):
    out = []
    for i in range(len(values)):
        window = values[max(0, i - n) : i + 1]
        out.append(scale * sum(window) / min(i + 2, n))
    return out


PLACES = {
    one_too_few: ["line 4, `max(0, i - n)`: it is one too small"],
    border: ["line 5, `i > n`: equality falls on the wrong side"],
    one_factor_more: ["line 6, `scale * mean * scale`: a factor is too much, `scale`"],
    not_carried: ["line 5, `total = value`: this is to be added up"],
    other_variable: ["line 5", "another variable belongs in the place of `values`"],
    after_the_loop: ["line 5", "it belongs into the loop"],
}


@pytest.mark.parametrize("answer", PLACES, ids=lambda f: f.__name__)
def test_the_place_is_named(answer):
    said = str(check.running.verdict(answer))
    assert "not right yet" in said
    for text in PLACES[answer]:
        assert text in said


def test_both_places_are_named():
    """Each mistake hides the other in some cases, not in all."""
    found = repaired(check.slug, "running", check.running.run, two_at_once)
    assert sorted(change.line for change in found) == [4, 5]
    assert "\n  and at line" in str(check.running.verdict(two_at_once))


def test_two_mistakes_in_a_formula_are_found_together():
    """Neither shows alone: with one of them mended, no case is right."""
    welcome = exercises.load_check(find("01-welcome"))

    def weight_bytes(params, bits=16):
        return math.ceil(params * bits * 8 + bits)

    said = str(welcome.weight_bytes.verdict(weight_bytes))
    assert "it is multiplied where it is to be divided" in said
    assert "a term is too much, `bits`" in said


def test_answers_that_may_be_right_in_many_ways_are_mended_too():
    """Two factors are right whatever their signs: the worked answer's are others."""
    lora = exercises.load_check(find("04-peft/05-lora"))

    def best_factors(delta, r, alpha):
        U, S, Vh = torch.linalg.svd(-delta)
        return -Vh[: r + 1], U[:, :r] * S[:r] * (r / alpha)

    said = str(lora.best_factors.verdict(best_factors))
    assert "line 3, `Vh[:r + 1]`: a term is too much, `1`" in said


def test_nothing_is_said_where_nothing_is_found():
    def far_off(values, n, scale):
        return [float(i) for i in range(len(values))]

    assert repaired(check.slug, "running", check.running.run, far_off) == []
    assert "comes out right" not in str(check.running.verdict(far_off))


def test_the_right_value_is_not_shown():
    said = str(check.running.verdict(one_too_few))
    assert "n + 1" not in said


def test_the_search_ends_in_time(monkeypatch):
    monkeypatch.setattr(repairs, "SECONDS", 0.2)

    def slow(values, n, scale):
        time.sleep(0.02)
        return [0.0 for _ in values]

    start = time.monotonic()
    assert repaired(check.slug, "running", check.running.run, slow) == []
    assert time.monotonic() - start < 5


def test_a_change_that_makes_a_loop_endless_is_left(monkeypatch):
    monkeypatch.setattr(repairs, "RUN", 0.05)

    def counts(values, n, scale):
        out, i = [], 0
        while i < len(values):
            window = values[max(0, i - n + 1) : i + 1]
            i += 1
            out.append(2 * scale * sum(window) / len(window))
        return out

    found = repaired(check.slug, "running", check.running.run, counts)
    assert [str(change) for change in found] == [
        "line 6, `2 * scale * sum(window)`: a factor is too much, `2`"
    ]


def all_orders(n):
    return len(set(itertools.permutations(range(n))))


def all_numbers(n):
    return sum(range(n**12))


@pytest.mark.parametrize("answer", [all_orders, all_numbers])
def test_what_is_taken_in_one_go_without_an_end_is_left(monkeypatch, answer):
    monkeypatch.setattr(repairs, "RUN", 0.05)
    judge = repairs._Judge(lambda answer: answer(11), answer, None)
    start = time.monotonic()
    assert judge.reached(repairs.source_tree(answer)) == 0
    assert time.monotonic() - start < 1


def _made(source: str, **names):
    tree = bounded(ast.parse(source).body[0])
    own = {"_times": repairs._times, "_power": repairs._power, "_tick": bool}
    own |= {"_ticking": lambda value: value, **names}
    exec(compile(ast.Module([tree], type_ignores=[]), "<test>", "exec"), own)
    return own["f"]


@pytest.mark.parametrize("result", ["[0] * 10**12", "10**6 ** 7", "(1,) * (n * n)"])
def test_what_is_too_large_is_not_made(result):
    function = _made(f"def f(n):\n    return {result}")
    with pytest.raises(repairs._TooLong):
        function(10**6)


def test_a_bounded_copy_computes_the_same():
    source = (
        "def f(a: int, *, b: float = 2.0) -> list:\n"
        "    out = [i * b for i in range(a) if i % 2]\n"
        "    while len(out) < 9:\n"
        "        out.append(a ** 2)\n"
        "    for i in range(3):\n"
        "        out += [i] * 2\n"
        "    return out"
    )
    names = {"__name__": "test"}
    exec(source, names)
    own = _made(source, _tick=lambda value=None: value)
    assert own(5, b=3.0) == names["f"](5, b=3.0)


def test_every_change_is_undone():
    tree = source_tree(border)
    worked = source_tree(one_too_few)
    before = ast.dump(tree)
    seen = {ast.dump(tree) for _ in changes(tree, worked)}
    assert ast.dump(tree) == before
    assert len(seen) > 200
    assert before not in seen


def test_options_that_are_too_much_are_named():
    tree = ast.parse("def f(x, more):\n    return g(x, scale=2, **more)").body[0]
    kinds = {change.kind for change in changes(tree)}
    assert {"`scale=` is too much", "`**more` is too much"} <= kinds


def test_the_code_around_a_short_part_is_quoted():
    code = Code(source_tree(one_too_few), None)
    ones = [n for n in code.nodes if isinstance(n, ast.Constant) and n.value == 1]
    assert {code.around(n) for n in ones} == {
        "values[max(0, i - n):i + 1]",
        "min(i + 1, n)",
    }


def test_numbers_of_the_worked_answer_are_tried():
    """What the formula's number is, nobody guesses by steps of one."""
    welcome = exercises.load_check(find("01-welcome"))

    def weight_bytes(params, bits=16):
        return math.ceil(params * bits / 10)

    said = str(welcome.weight_bytes.verdict(weight_bytes))
    assert "`params * bits / 10`: 10 is not the right number" in said
