"""Proof that an exercise's check lets the solution through and nothing else.

    test_wrong_answers = rejects("04-peft/05-lora", [Wrong("lora_forward", scaled_by_r,
    "alpha / r"), …])

makes one test for each wrong answer (its diagnosis must contain the text), and for each
exercise: the solution passes, also with other seeds; the unsolved stub, zeros, ones and
a copy of the input fail; there are at least three wrong answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from llmlab.checks.judging import attempt
from llmlab.course import exercises
from llmlab.course.grading.checking import Checks, Verdict
from llmlab.course.syllabus import course_root, find

SEEDS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Wrong:
    """A plausible wrong answer to exercise `exercise`, and a text that its diagnosis
    must contain.
    """

    exercise: str
    answer: Any
    says: str


@cache
def solved(slug: str) -> dict[str, Any]:
    """The names that the solution notebook defines, its check cells left out."""
    return _namespace(exercises.read_solution(find(slug), course_root()))


@cache
def unsolved(slug: str) -> dict[str, Any]:
    """The names that the exercise notebook defines, its check cells left out."""
    return _namespace(exercises.exercise_notebook(find(slug), course_root()))


def _namespace(notebook: Any) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook.cells:
        if cell.cell_type == "code" and "check" not in cell.metadata.get("tags", []):
            exec(compile(cell.source, f"<{cell.id}>", "exec"), names)
    return names


def answers(slug: str, exercise: str, names: dict[str, Any]) -> list[Any]:
    """What the check cell hands to the check: [answer] or more."""
    cell = exercises.check_cells(exercises.read_solution(find(slug), course_root()))[
        exercise
    ]
    return list(eval(exercises.answers_expression(cell.source), names))


def verdict(check: Checks, exercise: str, answer: Any, seed: int = 0) -> Verdict:
    """The check's verdict when `answer` stands in the place of the first answer."""
    rest = answers(check.slug, exercise, solved(check.slug))[1:]
    return check.exercises[exercise].verdict(answer, *rest, seed=seed)


def constant(answer: Callable, make: Callable[[Any], Any]) -> Callable:
    """`answer`, every number of whose result is replaced by `make`'s: the right type
    and shape, without the work.
    """

    def fill(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return make(value.detach())
        if isinstance(value, np.ndarray):
            kind = float if value.dtype == object else value.dtype
            return make(torch.zeros(value.shape)).numpy().astype(kind)
        if isinstance(value, bool | int | float):
            return type(value)(make(torch.tensor(value)).item())
        if isinstance(value, str | Path):
            return type(value)(str(make(torch.tensor(0.5)).item()))
        if isinstance(value, dict):
            return {k: fill(v) for k, v in value.items()}
        if is_dataclass(value) and not isinstance(value, type):
            return replace(
                value, **{f.name: fill(getattr(value, f.name)) for f in fields(value)}
            )
        return (
            type(value)(fill(v) for v in value)
            if type(value) in (list, tuple)
            else value
        )

    if isinstance(answer, type):
        return lambda *args, **kwargs: make(torch.tensor(0.5))
    return lambda *args, **kwargs: fill(answer(*args, **kwargs))


def copy_of_input(*args: Any, **kwargs: Any) -> Any:
    """The first tensor among the arguments (else the first argument), untouched."""
    values = [*args, *kwargs.values()]
    first = next(
        (v for v in values if isinstance(v, torch.Tensor)),
        values[0] if values else None,
    )
    return first.clone() if isinstance(first, torch.Tensor) else first


def foreseen(exercise: str, wrongs: Mapping[str, Callable]) -> list[Wrong]:
    """Every mistake that a check foresees, as a wrong answer with its own words."""
    return [Wrong(exercise, wrong, words[:60]) for words, wrong in wrongs.items()]


def told_apart(
    does: Callable[[Callable], Any], right: Callable, wrongs: Mapping[str, Callable]
) -> None:
    """No two mistakes come to the same on a check's inputs, and none to what is right.

    Args:
        does: function → what it does on them, None where it breaks down.
    """
    outcomes = {"right": does(right)}
    for words, wrong in wrongs.items():
        outcomes[words] = does(wrong)
        assert outcomes[words] is not None, f"breaks down: {words}"
    for (a, x), (b, y) in itertools.combinations(outcomes.items(), 2):
        assert x != y, f"{a!r} and {b!r} come to the same"


class ByCases(NamedTuple):
    """How an exercise is marked by cases: what its check hands to `judge`.

    Attributes:
        run: what a function does in case n.
        right: the reference.
        wrongs: diagnosis → a wrong way.
        cases: all of them, or what makes them.
    """

    run: Callable[[Callable, int], Any]
    right: Callable
    wrongs: Callable[[], Mapping[str, Callable]]
    cases: Sized | Callable[[], Sized]


def all_foreseen(kinds: Mapping[str, ByCases]) -> list[Wrong]:
    """Every mistake that the checks of these exercises foresee."""
    return [
        wrong for name, kind in kinds.items() for wrong in foreseen(name, kind.wrongs())
    ]


def kept_apart(kinds: Mapping[str, ByCases]) -> Callable[[str], None]:
    """A parametrised test: no two mistakes come to the same; its name begins with
    `test_`.
    """

    @pytest.mark.parametrize("exercise", kinds)
    def test(exercise: str) -> None:
        kind = kinds[exercise]
        count = len(kind.cases() if callable(kind.cases) else kind.cases)
        told_apart(lambda way: attempt(kind.run, way, count), kind.right, kind.wrongs())

    return test


def accepts(
    check: Checks, right: Mapping[str, Sequence[Callable]], seeds: Iterable[int] = (0,)
) -> Callable[[str, Any], None]:
    """A parametrised test: answers written otherwise pass; its name begins with
    `test_`.
    """
    seeds = tuple(seeds)
    cases = [(name, answer) for name, answers in right.items() for answer in answers]

    @pytest.mark.parametrize(("exercise", "answer"), cases)
    def test(exercise: str, answer: Any) -> None:
        for seed in seeds:
            result = verdict(check, exercise, answer, seed=seed)
            assert result.outcome == "right", str(result)

    return test


def rejects(
    slug: str, wrongs: list[Wrong], drawing_nothing: Sequence[str] = ()
) -> Callable[[str, Any], None]:
    """A parametrised test for the checks of lesson `slug`; assign it to a name that
    starts with `test_`.

    Args:
        drawing_nothing: exercises whose checks are slow and the same for every seed.
    """
    lesson = find(slug)
    check = exercises.load_check(lesson)
    unknown = {w.exercise for w in wrongs} - check.exercises.keys()
    if unknown:
        raise ValueError(
            f"wrongs names exercises that {slug} does not have: {sorted(unknown)}; it"
            f" has {[*check.exercises]}"
        )
    cases: list[tuple[str, Any]] = [
        (kind, name)
        for name in check.exercises
        for kind in ("solution", "stub", "zeros", "ones", "input", "enough")
    ]
    ids = [f"{name}-{kind}" for kind, name in cases]
    for wrong in wrongs:
        cases.append(("wrong", wrong))
        ids.append(
            f"{wrong.exercise}-wrong-{getattr(wrong.answer, '__name__', 'answer')}"
        )

    @pytest.mark.parametrize(("kind", "case"), cases, ids=ids)
    def test(kind: str, case: Any) -> None:
        if kind == "wrong":
            _assert_diagnosed(check, case)
        elif kind == "enough":
            n = sum(w.exercise == case for w in wrongs)
            assert n >= 3, (
                f"{case} has {n} wrong answers; each exercise needs at least three"
            )
        elif kind == "solution":
            right = answers(slug, case, solved(slug))
            for seed in SEEDS[:1] if case in drawing_nothing else SEEDS:
                result = check.exercises[case].verdict(*right, seed=seed)
                assert result.outcome == "right", (
                    f"the solution fails with seed {seed}:\n{result}"
                )
        elif kind == "stub":
            result = check.exercises[case].verdict(*answers(slug, case, unsolved(slug)))
            assert result.outcome == "not done", (
                f"the unsolved stub must be 'not done':\n{result}"
            )
        else:
            _assert_empty_answer_fails(check, kind, case)

    return test


def _assert_diagnosed(check: Checks, wrong: Wrong) -> None:
    result = verdict(check, wrong.exercise, wrong.answer)
    assert result.outcome in ("wrong", "error"), f"a wrong answer passed: {wrong}"
    assert wrong.says.lower() in result.message.lower(), (
        f"expected {wrong.says!r} in the diagnosis, which is:\n{result}"
    )
    assert "cannot work with what your answer returned" not in result.message, (
        f"the check crashed:\n{result}"
    )


def _assert_empty_answer_fails(check: Checks, kind: str, name: str) -> None:
    right = answers(check.slug, name, solved(check.slug))[0]
    fake = {
        "zeros": constant(right, torch.zeros_like),
        "ones": constant(right, torch.ones_like),
        "input": copy_of_input,
    }[kind]
    result = verdict(check, name, fake)
    assert result.outcome != "right", f"{name} accepts {kind}"
