"""What a check says of an answer, whether its author foresaw the mistake or not."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from llmlab.course.grading.checking import (
    Checks,
    Failed,
    Mistake,
    close,
    diagnose,
    expect,
)

check = Checks("04-peft/05-lora")


@check.exercise(
    points=2, minutes=5, difficulty=2, importance=4, hints=("a nudge", "more")
)
def double(answer):
    """Twice x."""
    x = torch.randn(3, 4, 4)
    got = expect(answer(x), shape=(3, 4, 4), dtype=torch.float32, what="double(x)")
    diagnose(
        got,
        right=2 * x,
        mistakes={"you squared it": x * x, "you cubed it": lambda: x**3},
        what="double(x)",
    )


@check.exercise(
    points=1, minutes=1, difficulty=1, importance=1, hints=("-",), in_place=True
)
def double_in_place(answer):
    """Twice x, in x."""
    x = torch.ones(3)
    answer(x)
    diagnose(x, right=torch.full((3,), 2.0))


def in_place(x):
    return x.mul_(2)


def first_only(x):
    y = x.clone()
    y[0] *= 2
    return y


def last_column(x):
    y = 2 * x
    y[..., -1] = 0
    return y


def upper_wrong(x):
    return 2 * x + torch.triu(torch.ones(4, 4), 1)


def diagonal_wrong(x):
    return 2 * x + torch.eye(4)


def raises(x):
    y = x @ torch.ones(7, 7)
    return y


def leaves(x):
    raise SystemExit


def endless(x):
    return endless(x)


UNFORESEEN = {
    "a factor": (lambda x: 6 * x, "3 times too large"),
    "half": (lambda x: x, "2 times too small"),
    "units": (lambda x: 2e9 * x, "10⁹: GB for bytes?"),
    "summed over a dimension": (lambda x: 2 * x * x.shape[0], "dimension 0 has size 3"),
    "the square root of a dimension": (lambda x: 2 * x * 3**0.5, "square root of 3"),
    "sign": (lambda x: -2 * x, "wrong sign"),
    "offset": (lambda x: 2 * x + 1, "by the same 1 everywhere"),
    "inverse": (lambda x: 1 / (2 * x), "upside down"),
    "squared": (lambda x: (2 * x) ** 2, "square root missing"),
    "transposed": (lambda x: 2 * x.transpose(1, 2), "dimensions 1 and 2 are swapped"),
    "flipped": (lambda x: 2 * x.flip(0), "reverse order along dimension 0"),
    "rolled": (lambda x: 2 * x.roll(1, 2), "shifted by one along dimension 2"),
    "permuted": (lambda x: 2 * x[..., [2, 0, 3, 1]], "wrong order along dimension 2"),
    "reshaped": (
        lambda x: 2 * x.reshape(4, 4, 3).permute(2, 0, 1),
        "a reshape where a transpose belongs",
    ),
    "rows scaled": (
        lambda x: 2 * x * torch.tensor([2.0, 3, 4, 5])[:, None],
        "factor that differs",
    ),
    "first only": (first_only, "right only at the first of 3 along dimension 0"),
    "last column": (last_column, "wrong only at the last of 4 along dimension 2"),
    "above the diagonal": (upper_wrong, "above the diagonal"),
    "on the diagonal": (diagonal_wrong, "on the diagonal"),
    "zeros": (torch.zeros_like, "zero everywhere"),
    "one number": (lambda x: torch.full_like(x, 3.0), "same number everywhere"),
    "low precision": (lambda x: (2 * x).bfloat16().float(), "lower precision"),
    "nan": (lambda x: x / 0 * 0, "NaN in 48 of 48"),
    "infinity": (lambda x: x / 0, "infinity"),
    "something else": (lambda x: torch.rand(3, 4, 4), "differs in"),
    "None": (lambda x: None, "is there a `return`"),
    "an array": (lambda x: x.numpy(), "NumPy array"),
    "a float": (lambda x: 3.0, "a float, where a tensor"),
    "a list": (lambda x: [1, 2], "a list of 2, where a tensor"),
    "wide": (lambda x: (2 * x).double(), "float64, where float32"),
    "one dimension less": (lambda x: x[0], "one dimension is missing"),
    "one dimension more": (lambda x: x[None], "size 1 too many"),
    "flattened": (lambda x: x.flatten(), "their arrangement is not"),
    "in place": (in_place, "changes its argument `x` in place"),
    "two arguments": (lambda x, y: x, "cannot be called as"),
    "no argument": (lambda: 1, "cannot be called as"),
}


@pytest.mark.parametrize("case", UNFORESEEN)
def test_unforeseen_mistakes_get_a_useful_word(case):
    answer, says = UNFORESEEN[case]
    verdict = check.double.verdict(answer)
    assert verdict.outcome == "wrong"
    assert says in verdict.message
    assert verdict.points == 0


def test_an_infinity_that_is_missing_is_not_rounding():
    right = torch.tensor([1.0, -torch.inf, 3.0, -torch.inf])
    with pytest.raises(Mistake, match=r"infinite and finite .* in 1 of 4 places"):
        diagnose(torch.tensor([1.0, -torch.inf, 3.0, 0.0]), right=right)


@pytest.mark.parametrize(
    ("got", "right", "says"),
    [
        ([5, 3, 9, 8], [4, 3, 8, 8], "too large by 1 in 2 of 4 places"),
        ([3, 3, 7, 6, 2], [4, 3, 8, 8, 2], "differs in 3 of 5 places, by up to 2"),
        ([4, 4, 7, 8], [4, 3, 8, 8], "is off by 1 in 2 of 4 places"),
        (
            [True, True, False, False, True],
            [False, False, True, False, True],
            "1 (true) for 0 (false) in 2 of them, the other way round in 1",
        ),
    ],
)
def test_whole_numbers_are_not_rounded_ones(got, right, says):
    with pytest.raises(Mistake) as caught:
        diagnose(torch.tensor(got), right=torch.tensor(right))
    assert says in str(caught.value)
    assert "precision" not in str(caught.value)
    assert "square" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda a, b: a + 3 * b, "what: the path is 3 times too large"),
        (lambda a, b: a - b, "what: the path has the wrong sign"),
        (lambda a, b: b, "what: W x is missing"),
        (
            lambda a, b: -2 * a + b / 4,
            "what: W x is 2 times too large and has the wrong sign; the path is 4 times"
            " too small",
        ),
        (lambda a, b: a + b.flip(0), "differs in"),
        (lambda a, b: a + b / 0, "NaN or infinity"),
    ],
)
def test_a_wrong_term_of_a_sum_is_named(answer, says):
    torch.manual_seed(0)
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    terms = [{"W x": a, "the path": b}]
    with pytest.raises(Mistake) as caught:
        diagnose(answer(a, b), right=a + b, terms=terms, what="what")
    assert says in str(caught.value)
    diagnose(a + b, right=a + b, terms=terms)


def test_terms_that_are_one_another_tell_nothing():
    a = torch.randn(4, 3)
    with pytest.raises(Mistake, match=r"^your answer is 3 times too large"):
        diagnose(6 * a, right=2 * a, terms=[{"one": a, "another": a}])


def test_a_gap_of_nearly_nothing_has_a_size():
    with pytest.raises(Mistake, match=r"by less than 1%"):
        diagnose(2001, right=2000)


def test_swapped_shapes_are_named():
    with pytest.raises(Mistake, match="dimensions 0 and 1 are swapped"):
        expect(torch.zeros(2, 3), shape=(3, 2))


def test_right_and_foreseen():
    assert check.double.verdict(lambda x: 2 * x).points == 2
    assert check.double.verdict(lambda x: x * x).message == "you squared it"
    assert check.double.verdict(lambda x: x**3).message == "you cubed it"


def test_no_right_value_is_told():
    """Nothing in a diagnosis of an unrelated answer is a number from the right one."""
    torch.manual_seed(0)
    right = torch.randn(3, 4, 4) * 2
    message = check.double.verdict(lambda x: torch.rand(3, 4, 4)).message
    assert not any(f"{abs(v):.3g}" in message for v in right.flatten().tolist())


def test_an_error_is_shown_as_theirs():
    verdict = check.double.verdict(raises)
    assert verdict.outcome == "error"
    assert "RuntimeError" in verdict.message
    assert "y = x @ torch.ones(7, 7)" in verdict.detail
    assert "called as raises(x=float32 tensor of shape (3, 4, 4))" in verdict.detail
    assert "guard.py" not in verdict.detail
    assert check.double.verdict(leaves).outcome == "error"
    assert "RecursionError" in check.double.verdict(endless).message


def test_a_check_that_trips_over_an_answer_says_so():
    @(odd := Checks("04-peft/05-lora")).exercise(
        points=1, minutes=1, difficulty=1, importance=1, hints=("-",)
    )
    def trips(answer):
        """Anything."""
        answer.missing_attribute

    # as if it were ours
    trips.run.__code__ = trips.run.__code__.replace(
        co_filename=expect.__code__.co_filename
    )
    assert (
        "cannot work with what your answer returned"
        in odd.trips.verdict(type("A", (), {})).message
    )


def test_what_is_not_a_function():
    assert "where a function is asked" in check.double.verdict(3).message


def test_the_stub_is_not_done():
    def stub(x):
        raise NotImplementedError

    verdict = check.double.verdict(stub)
    assert (verdict.outcome, verdict.points) == ("not done", 0)
    assert str(verdict) == "✗ double: not done yet"


def test_calling_prints_or_fails_in_words(capsys):
    check.double(lambda x: 2 * x)
    assert capsys.readouterr().out == "✓ double: right (2 points)\n"
    with pytest.raises(Failed) as failed:
        check.double(lambda x: x * x)
    assert failed.value._render_traceback_() == [
        "✗ double: not right yet",
        "  you squared it",
        '  stuck? check.hint("double") shows a hint',
    ]


def test_inputs_are_seeded_and_the_learners_generators_untouched():
    seen = []

    def spy(x):
        seen.append(x.clone())
        torch.manual_seed(99)
        return 2 * x

    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    for seed in (0, 0, 1):
        check.double.verdict(spy, seed=seed)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


def test_in_place_may_be_asked():
    assert check.double_in_place.verdict(in_place).outcome == "right"


@pytest.mark.parametrize(
    "container", [lambda x: [x], lambda x: {"k": x}, lambda x: (x, [x])]
)
def test_changes_inside_containers_are_seen(container):
    marks = Checks("04-peft/05-lora")

    @marks.exercise(points=1, minutes=1, difficulty=1, importance=1, hints=("-",))
    def touch(answer):
        """Nothing."""
        answer(container(torch.ones(2)))

    def spoil(things):
        thing = things
        while not isinstance(thing, torch.Tensor):
            thing = thing["k"] if isinstance(thing, dict) else thing[0]
        thing.zero_()

    assert "changes its argument `things`" in marks.touch.verdict(spoil).message
    assert marks.touch.verdict(lambda things: things).outcome == "right"


def test_hints_come_in_tiers(capsys):
    for _ in range(3):
        check.hint("double")
    out = capsys.readouterr().out
    assert out.count("a nudge") == 1 and out.count("more") == 2 and "the last" in out
    with pytest.raises(AttributeError, match="this lesson has double"):
        check.hint("treble")


def test_the_object_describes_itself():
    assert (
        check.double.header
        == "●●○○○ difficulty · ●●●●○ importance · 5 minutes · 2 points"
    )
    assert check.double_in_place.header.endswith("1 minute · 1 point")
    assert "double" in dir(check) and "Twice x." in repr(check) and check.out_of == 3


@pytest.mark.parametrize(
    "change",
    [
        {"points": 0},
        {"minutes": 0},
        {"difficulty": 6},
        {"importance": 0},
        {"hints": ()},
        {"hints": "a"},
        {"hints": ("a",) * 4},
    ],
)
def test_wrong_data_are_named(change):
    data = {
        "points": 1,
        "minutes": 1,
        "difficulty": 1,
        "importance": 1,
        "hints": ("-",),
    } | change
    with pytest.raises(ValueError, match=next(iter(change))):

        @Checks("04-peft/05-lora").exercise(**data)
        def something(answer):
            """Anything."""


def test_names_are_taken_once_and_docstrings_wanted():
    marks = Checks("04-peft/05-lora")
    data = {
        "points": 1,
        "minutes": 1,
        "difficulty": 1,
        "importance": 1,
        "hints": ("-",),
    }
    with pytest.raises(ValueError, match="docstring"):
        marks.exercise(**data)(lambda answer: None)

    def hint(answer):
        """The name of a method."""

    with pytest.raises(ValueError, match="taken"):
        marks.exercise(**data)(hint)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (torch.ones(3), torch.ones(3) + 1e-7, True),
        (torch.ones(3), torch.ones(3) + 1e-3, False),
        (torch.ones(3), torch.ones(1, 3), False),
        # within 1e-5 of the mean size
        (torch.tensor([1e6, 1.0]), torch.tensor([1e6, 1.5]), True),
        (1e-6 * torch.ones(3), 2e-6 * torch.ones(3), False),
        (torch.full((3,), 1e-7), torch.zeros(3), True),
        (torch.tensor([torch.inf, 1]), torch.tensor([torch.inf, 1]), True),
        (torch.tensor([torch.nan, 1]), torch.tensor([1.0, 1]), False),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), False),
        (56_000_000_001.0, 56_000_000_001, True),
        (2**70, 2**70, True),
        (3, 3.5, False),
        ([1.0, "a"], [1.0, "a"], True),
        ([1.0], (1.0, 2.0), False),
        ({"a": 1.0}, {"a": 1.0}, True),
        ({"a": 1.0}, {"b": 1.0}, False),
        ("a", "b", False),
        (None, 1.0, False),
        (np.ones(2), torch.ones(2), True),
        (torch.tensor([True]), torch.tensor([False]), False),
    ],
)
def test_close(a, b, same):
    assert close(a, b) is same


@pytest.mark.parametrize(
    ("got", "right", "says"),
    [
        ([1.0, 2.0], [1.0, 3.0], r"answer\[1\]"),
        ([1.0], [1.0, 3.0], "holds 1 items, where 2"),
        ({"a": 1}, {"b": 1}, "1 of its keys missing"),
        ({"a": torch.zeros(2)}, {"a": torch.ones(2)}, r"\['a'\] is zero"),
        ("hello wurld", "hello world", "right up to character 7"),
        (16, 2, "8: bits for bytes"),
        (1.02, 1.0, "less than 10%"),
        (5, 3, "too large"),
        (None, 3, "None, where an int"),
    ],
)
def test_differences_of_other_things(got, right, says):
    with pytest.raises(Mistake, match=says):
        diagnose(got, right=right)


@pytest.mark.parametrize(
    ("value", "kind", "says"),
    [
        (torch.tensor(1.0), float, r"\.item\(\)"),
        (1.5, int, "math.ceil"),
        (True, int, "a bool, where an int"),
        ("1", (int, float), "where an int or float"),
        (float("nan"), float, "not a finite"),
        ([1.0, float("inf")], list, r"answer\[1\] is inf"),
    ],
)
def test_kinds(value, kind, says):
    with pytest.raises(Mistake, match=says):
        expect(value, kind=kind)


def test_kinds_that_will_do():
    for value, kind in [
        (1, float),
        (np.float32(1), float),
        (np.int64(3), int),
        (True, bool),
        ({}, dict),
    ]:
        assert expect(value, kind=kind) is value
