"""Kinds of fault that any exercise can meet: each is told apart, in every lesson."""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

from llmlab.course import exercises, grading
from llmlab.course.grading import graded_copy, marking
from llmlab.course.grading.checking import Checks, Exercise, Mistake, diagnose, expect
from llmlab.course.grading.slips import slips, worked_answer
from llmlab.course.syllabus import course_root, find, lessons
from tests.checks.rejecting import answers, solved
from tests.course import learner

ONE = {"points": 1, "minutes": 1, "difficulty": 1, "importance": 1, "hints": ("-",)}
check = Checks("04-peft/05-lora")


@check.exercise(**ONE, grads={"x": 0, "A": 1})
def product(answer):
    """x A."""
    x = torch.randn(4, 3)
    A = torch.randn(3, 2)
    got = expect(answer(x, A), shape=(4, 2), dtype=torch.float32, what="product(x, A)")
    diagnose(got, right=x @ A, what="product(x, A)")


@cache
def exercises_with_gradients() -> list[tuple[str, str]]:
    """(lesson, exercise) wherever the result is trained through."""
    found = []
    for lesson in lessons():
        if not exercises.source_of(lesson, course_root()).exists():
            continue
        for name, exercise in exercises.load_check(lesson).exercises.items():
            if exercise.grads:
                found.append((lesson.slug, name))
    return found


def test_the_switch_is_on_wherever_a_result_is_trained_through():
    names = {name for _, name in exercises_with_gradients()}
    assert names == {
        *("next_token_loss", "prepend_prompt", "split_prefix", "prefix_attention"),
        *("encode_prompt", "labelling_loss", "last_token", "adapter", "fuse"),
        *("lora_forward", "svd_forward", "ia3_linear", "parallel", "gated_prefix"),
        *("route", "balance", "merge"),
        *("soft_label_loss", "soft_loss", "on_policy_loss", "jsd", "peqa_forward"),
        *("mt_cot_loss", "masked_linear"),
    }


def exercise_and_answers(slug: str, name: str) -> tuple[Exercise, Callable, list[Any]]:
    """The exercise, its right answer, and what else the check is handed."""
    right, *rest = answers(slug, name, solved(slug))
    return exercises.load_check(find(slug)).exercises[name], right, rest


def detached(right: Callable) -> Callable:
    """The right value without its gradient."""

    def answer(*args, **kwargs):
        return tree_map(lambda t: t.detach(), right(*args, **kwargs))

    return answer


def under_no_grad(right: Callable) -> Callable:
    """The right value, computed under no_grad."""

    def answer(*args, **kwargs):
        with torch.no_grad():
            return right(*args, **kwargs)

    return answer


def remade(right: Callable) -> Callable:
    """The right value as new tensors."""

    def answer(*args, **kwargs):
        return tree_map(lambda t: torch.tensor(t.tolist()), right(*args, **kwargs))

    return answer


@pytest.mark.parametrize("spoil", [detached, under_no_grad, remade])
@pytest.mark.parametrize(("slug", "name"), exercises_with_gradients())
def test_a_right_value_without_its_gradient_is_refused(slug, name, spoil):
    exercise, right, rest = exercise_and_answers(slug, name)
    verdict = exercise.verdict(spoil(right), *rest)
    assert verdict.outcome == "wrong"
    assert "no gradient" in verdict.message


@pytest.mark.parametrize(("slug", "name"), exercises_with_gradients())
def test_each_input_alone_is_looked_at(slug, name):
    exercise, right, rest = exercise_and_answers(slug, name)
    for argument, place in exercise.grads.items():

        def one_cut(*args, place=place):
            args = [a.detach() if i == place else a for i, a in enumerate(args)]
            return right(*args)

        verdict = exercise.verdict(one_cut, *rest)
        assert verdict.outcome == "wrong"
        if len(exercise.grads) > 1:
            assert f"no gradient reaches `{argument}`:" in verdict.message


def test_the_cure_names_what_stands_in_the_answer():
    message = check.product.verdict(lambda x, A: x @ A.data).message
    assert message == (
        "the value is right, but no gradient reaches `A`: training goes through this"
        " result. Take `.data` out of its way"
    )


def half_cut(x, A):
    return (x @ A + (x @ A).detach()) / 2


def by_hand(x, A):
    return torch.from_numpy(x.numpy() @ A.numpy())


def spoilt_in_place(x, A):
    # exp needs its result again on the way back
    e = (x @ A).exp()
    return e.add_(0).log()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (half_cut, "gradient of `x` and `A` is not"),
        (by_hand, "no gradient can be computed"),
        (spoilt_in_place, "change nothing in place"),
    ],
)
def test_other_ways_to_spoil_a_gradient(answer, says):
    verdict = check.product.verdict(answer)
    assert verdict.outcome == "wrong"
    assert says in verdict.message


def in_float32(x, A):
    return x.float() @ A.float()


def by_numbers_of_its_own(x, A):
    return x @ A @ torch.eye(2, dtype=torch.float32)


def renamed(p, q):
    return torch.einsum("ij,jk->ik", p, q)


@pytest.mark.parametrize("answer", [in_float32, by_numbers_of_its_own, renamed])
def test_right_gradients_are_accepted_however_they_are_written(answer):
    assert check.product.verdict(answer).outcome == "right"


# The stub, and what only looks like it.


def stub(x, A):
    raise NotImplementedError


def torchs_own(x, A):
    return x @ A.to(torch.uint16).softmax(0)


class Abstract:
    def value(self):
        raise NotImplementedError


def abstract_method(x, A):
    return Abstract().value()


def asks(x, A):
    raise_for_input()


def raise_for_input():
    raise NotImplementedError("raw_input was called, but there is no frontend")


def test_only_the_stub_is_not_done():
    assert check.product.verdict(stub).outcome == "not done"


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (torchs_own, "return x @ A.to(torch.uint16).softmax(0)"),
        (abstract_method, "return Abstract().value()"),
        (asks, "raise_for_input()"),
    ],
)
def test_another_not_implemented_error_is_an_error_with_its_line(answer, line):
    verdict = check.product.verdict(answer)
    assert verdict.outcome == "error"
    assert "NotImplementedError" in verdict.message
    assert line in verdict.detail


def test_an_earlier_stub_is_named():
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(
        "def scale(x):\n    raise NotImplementedError\n\n"
        "def product(x, A):\n    return scale(x) @ A\n",
        names,
    )
    verdict = check.product.verdict(names["product"])
    assert verdict.outcome == "not done"
    assert verdict.message == "it calls `scale`, which is not done yet"


# What the learner set before.


@contextmanager
def put_back() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    threads = torch.get_num_threads()
    grad = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        torch.set_default_device(None)
        torch.set_num_threads(threads)


def state() -> tuple[Any, ...]:
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_default_device(),
        torch.get_num_threads(),
        torch.initial_seed(),
        np.random.get_state()[1][0],
    )


def seeded_otherwise() -> None:
    torch.manual_seed(12)
    np.random.seed(12)


STATES = {
    "float64": lambda: torch.set_default_dtype(torch.float64),
    "float16": lambda: torch.set_default_dtype(torch.float16),
    "no gradients": lambda: torch.set_grad_enabled(False),
    "meta": lambda: torch.set_default_device("meta"),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "seed": seeded_otherwise,
}
QUICK = [
    ("01-start/01-welcome", "softmax"),
    ("04-peft/05-lora", "lora_forward"),
    ("04-peft/05-lora", "merge"),
    ("04-peft/07-qlora", "normal_float"),
    ("05-parallelism/05-tensor", "vocab_parallel_loss"),
    ("06-compression/01-quantization-basics", "int8_linear"),
]


@pytest.mark.parametrize("learners", STATES)
@pytest.mark.parametrize(("slug", "name"), QUICK)
def test_what_a_learner_set_before_does_not_reach_the_check(slug, name, learners):
    exercise, right, rest = exercise_and_answers(slug, name)
    with put_back():
        STATES[learners]()
        before = state()
        verdict = exercise.verdict(right, *rest)
        assert state() == before
    assert verdict.outcome == "right", str(verdict)


def test_inference_mode_does_not_reach_the_check():
    exercise, right, rest = exercise_and_answers("04-peft/05-lora", "lora_forward")
    with torch.inference_mode():
        assert exercise.verdict(right, *rest).outcome == "right"
        assert torch.is_inference_mode_enabled()


def test_what_an_answer_sets_is_put_back():
    def restless(x, A):
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.manual_seed(3)
        return x @ A

    with put_back():
        before = state()
        check.product.verdict(restless)
        assert state() == before


def test_checks_that_are_read_anew_know_no_default_of_the_learners(monkeypatch):
    # what `fresh` deletes comes back, in the table and as its package's attribute

    for name in [n for n in sys.modules if n.startswith("llmlab.c")]:
        package, _, last = name.rpartition(".")
        monkeypatch.setitem(sys.modules, name, sys.modules[name])
        monkeypatch.setattr(sys.modules[package], last, sys.modules[name])
    with put_back():
        torch.set_default_dtype(torch.float64)
        module = marking.fresh("llmlab.checks.peft.qlora")
        right = solved("04-peft/07-qlora")["normal_float"]
        assert module.check.normal_float.verdict(right).outcome == "right"
        assert torch.get_default_dtype() == torch.float64


# Marks are written down, whatever becomes of the table.

TABLE = """
import sys
from llmlab.course.grading import report
from llmlab.course.grading.grading import LessonResult, Result

lines = [Result("f", 2, "right", 2), Result("g", 2, "wrong", 0, "a … ≤ 3 · ●")]
lesson = LessonResult("04-peft/05-lora", "LoRA", "work/x.ipynb", "1", lines)
report.print_check([lesson] * 200, report.console())
print("recorded", file=sys.stderr)
"""


def printed(encoding: str, stdout: Any) -> subprocess.CompletedProcess:
    """Runs the program above."""
    return subprocess.run(
        [sys.executable, "-c", TABLE],
        env=os.environ | {"PYTHONIOENCODING": encoding},
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=120,
    )


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_table_can_be_printed_without_our_signs(encoding):
    done = printed(encoding, subprocess.PIPE)
    assert (done.returncode, done.stderr.strip()) == (0, b"recorded")
    assert b"+ right" in done.stdout and b"x wrong" in done.stdout


def test_a_reader_that_went_away_does_not_cost_the_marks():
    read, write = os.pipe()
    os.close(read)
    done = printed("utf-8", write)
    os.close(write)
    assert (done.returncode, done.stderr.strip()) == (0, b"recorded")


def test_a_verdict_holds_no_lone_surrogate(monkeypatch):
    sent = []

    class Publisher:
        def publish(self, data, metadata):
            sent.append(data[marking.MIME])

    class Shell:
        display_pub = Publisher()

        @classmethod
        def instance(cls):
            return cls

    monkeypatch.setattr("IPython.core.interactiveshell.InteractiveShell", Shell)
    marking.publish({"outcome": "wrong", "message": "a \ud800", "seconds": 1})
    assert sent == [{"outcome": "wrong", "message": "a ?", "seconds": 1}]


# The classic mistakes, found by making them in the worked answer.


def adapter_with(middle: Callable) -> Callable:
    """svd_forward of another form."""
    return lambda x, W, P, lam, Q, alpha, r0: middle(x, W, P, lam, Q, alpha / r0)


def wrong_axis(x):
    e = (x - x.amax(dim=-1, keepdim=True)).exp()
    return e / e.sum(dim=1, keepdim=True)


def rounds_codes_down(X, W):
    s_x = X.abs().amax(dim=1, keepdim=True) / 127
    s_w = W.abs().amax(dim=1, keepdim=True) / 127
    return (torch.floor(X / s_x) @ torch.round(W / s_w).T) * s_x * s_w.T


def one_level_too_many(X, W):
    s_x = X.abs().amax(dim=1, keepdim=True) / 128
    s_w = W.abs().amax(dim=1, keepdim=True) / 127
    codes = (X / s_x).round() @ (W / s_w).round().T
    return codes * s_x * s_w.T


def sum_for_mean(logits, tokens, mask):
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    return (losses * mask[:, 1:]).mean() / mask[:, 1:].sum()


def divided_twice(losses, text):
    n = len(text.encode())
    return losses.double().sum().item() / math.log(2) / n / n


def one_plus_lambda(x, W, P, lam, Q, scale):
    return x @ W.T + x @ ((1 + lam) * Q * scale).T @ P.T


def batch_for_weights(weight_bytes, bandwidth, batch=1, cache_bytes=0.0):
    return weight_bytes * bandwidth / (weight_bytes + batch * cache_bytes)


def relu_of_h_too(h, down, b_down, up, b_up):
    return h + torch.relu(h.relu() @ down.T + b_down) @ up.T + b_up


def scales_in_reverse(x, W, scale, ids):
    factor = torch.where(ids[:, None] >= 0, scale.flip(0)[ids], 1.0)
    return x @ W.T * factor[:, None]


WELCOME = "01-start/01-welcome"
MODELS = "01-start/02-the-course-models"
QUANTIZATION = "06-compression/01-quantization-basics"
CLASSICS = [
    (
        "04-peft/04-adapters",
        "adapter",
        relu_of_h_too,
        "there is an activation too many (`h`)",
    ),
    (
        "04-peft/08-ia3",
        "serve",
        scales_in_reverse,
        "something is in reverse order (`scale`)",
    ),
    (WELCOME, "softmax", wrong_axis, "the sum runs over another dimension"),
    (
        QUANTIZATION,
        "int8_linear",
        rounds_codes_down,
        "it is rounded down, not to the nearest (`X`)",
    ),
    (QUANTIZATION, "int8_linear", one_level_too_many, "a number is one too large"),
    (MODELS, "next_token_loss", sum_for_mean, "a mean is taken where a sum belongs"),
    (MODELS, "bits_per_byte", divided_twice, "it is divided twice (`text`)"),
    (
        "04-peft/06-adalora",
        "svd_forward",
        adapter_with(one_plus_lambda),
        "a factor is one too large, 1 + … for … (`lam`)",
    ),
    (
        WELCOME,
        "tokens_per_second",
        batch_for_weights,
        "`weight_bytes` stands where `batch` belongs",
    ),
]


@pytest.mark.parametrize(("slug", "name", "answer", "says"), CLASSICS)
def test_a_classic_mistake_that_no_check_foresaw_is_named(slug, name, answer, says):
    exercise, _, rest = exercise_and_answers(slug, name)
    verdict = exercise.verdict(answer, *rest)
    assert verdict.outcome == "wrong"
    assert f"his is what comes out when {says}" in verdict.message.replace("\n", " ")


def test_nothing_is_made_up_about_an_unrelated_answer():
    exercise, _, _ = exercise_and_answers(WELCOME, "softmax")
    torch.manual_seed(5)
    for answer in (torch.rand_like, torch.zeros_like, lambda x: x.tanh() / 7):
        message = exercise.verdict(lambda x, answer=answer: answer(x)).message
        assert "comes out when" not in message


def test_what_an_answer_prints_is_not_printed_again(capsys):
    exercise, _, _ = exercise_and_answers(WELCOME, "softmax")

    def chatty(x):
        print("here")
        return wrong_axis(x)

    exercise.verdict(chatty)
    assert capsys.readouterr().out.count("here") < 5


def test_every_worked_answer_can_be_read():
    for lesson in lessons():
        if not exercises.source_of(lesson, course_root()).exists():
            continue
        if lesson.slug == "04-peft/10-peft-library":  # it imports for seconds
            continue
        for name in exercises.load_check(lesson).exercises:
            found = worked_answer(lesson.slug, name)
            assert found is not None, name
            has_while = "While" in ast.dump(found[1])
            assert (next(slips(found[1]), None) is None) == has_while, name


def test_the_worked_answers_show_nothing_of_their_own(capsys):
    assert worked_answer("08-compilers/03-back-end", "tiles") is not None
    assert capsys.readouterr().out == ""


def test_without_worked_answers_a_check_says_what_it_can(monkeypatch):
    exercise, _, _ = exercise_and_answers(WELCOME, "softmax")
    monkeypatch.setattr("llmlab.course.grading.slips.worked_answer", lambda *_: None)
    assert "differs in 18 of 18 places" in exercise.verdict(wrong_axis).message


# Sentences that would mislead.


@pytest.mark.parametrize(
    ("spoil", "is_precision"),
    [
        (lambda x: x.bfloat16().float(), True),
        (lambda x: x.half().float(), True),
        (lambda x: x * (1 + 1e-4 * torch.randn(8, 8)), True),
        (lambda x: x * 127.5 / 127 + 1e-3 * x**2, False),
        (lambda x: x + 4e-3 * x.roll(1, 0), False),
    ],
)
def test_precision_is_blamed_only_for_what_rounding_does(spoil, is_precision):
    torch.manual_seed(0)
    right = torch.randn(8, 8)
    with pytest.raises(Mistake) as caught:
        diagnose(spoil(right), right=right)
    assert ("a lower precision" in str(caught.value)) is is_precision


def test_no_dimension_of_a_tensor_that_the_check_joined():
    torch.manual_seed(0)
    right = torch.randn(2, 3, 3)
    got = right.clone()
    got[1, 2] += 1
    with pytest.raises(
        Mistake, match=r"^B is wrong only at the last of 3 along dim.* 0"
    ):
        diagnose(got, right=right, parts={"A": 0, "B": 1})


@pytest.mark.parametrize(
    ("slug", "name", "answer"),
    [
        ("04-peft/06-adalora", "importance", lambda s, u, *_: (s, 2 * u)),
        (
            "04-peft/09-mam-and-unipelt",
            "gated_prefix",
            lambda x, w, b, mask, K, V: (
                torch.zeros(3, 2, 4, 5),
                torch.ones(3, 2, 4, 5),
            ),
        ),
    ],
)
def test_joined_results_are_spoken_of_one_by_one(slug, name, answer):
    exercise, _, rest = exercise_and_answers(slug, name)
    message = exercise.verdict(answer, *rest).message
    assert "(Ī, Ū)" not in message and "stacked" not in message
    assert message.startswith(("Ī", "your tensor of keys"))


def test_numbers_are_counted_not_their_bytes():
    exercise, right, rest = exercise_and_answers(
        "05-parallelism/05-tensor", "vocab_parallel_loss"
    )

    def in_float64(comm, logits, targets):
        return right(comm, logits.double(), targets).float()

    assert exercise.verdict(in_float64, *rest).outcome == "right"


# A notebook that went through other hands.


def test_a_byte_order_mark_is_no_broken_notebook(tmp_path):
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps(learner.notebook()), encoding="utf-8-sig")
    assert graded_copy.read_notebook(path)["cells"]


def test_another_lessons_notebook_is_named(tmp_path):
    nb = learner.notebook()
    nb["metadata"]["llmlab"]["lesson"] = "04-peft/05-lora"
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps(nb), encoding="utf-8")
    result = grading.grade(learner.WELCOME, learner.ROOT, path)
    assert "the exercises of another lesson, 04-peft/05-lora" in result.problem
    assert {e.outcome for e in result.exercises} == {"unreadable"}


def test_half_a_character_becomes_a_whole_one(tmp_path):
    path = tmp_path / "a.ipynb"
    cells = [learner.code("x = '\ud83d'")]
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    source = graded_copy.read_notebook(path)["cells"][0]["source"]
    assert source == "x = '\ufffd'"


def test_an_answer_in_a_new_cell_is_marked_there(tmp_path):
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps(learner.notebook()), encoding="utf-8")
    cells = graded_copy.read_notebook(path)["cells"]
    own = learner.index(cells, "check-softmax")
    answer = learner.solved_sources()["softmax"]
    assert graded_copy.place_of_check(cells, "softmax", [own]) == own
    cells.append(learner.code(answer))
    assert graded_copy.place_of_check(cells, "softmax", [own]) == len(cells) - 1
    # an answer where it belongs stays there, whatever is tried later
    learner.cell(cells, "exercise-softmax")["source"] = answer
    assert graded_copy.place_of_check(cells, "softmax", [own]) == own
