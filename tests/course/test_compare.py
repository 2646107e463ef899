import numpy as np
import pytest
import torch

from llmlab.course import compare


@pytest.mark.parametrize(
    ("ours", "theirs", "line"),
    [
        (
            torch.zeros(2, 11, 97),
            torch.zeros(2, 11, 97) + 9e-6,
            "x: equal to within 1e-05 (2 × 11 × 97 values)",
        ),
        (
            torch.ones(3, requires_grad=True),
            np.ones(3),
            "x: equal to within 1e-05 (3 values)",
        ),
        (1.5, 1.5, "x: equal to within 1e-05 (one value)"),
        (torch.tensor(2.0), 2, "x: equal to within 1e-05 (one value)"),
        (
            [[1, 2], [3, 4]],
            torch.tensor([[1, 2], [3, 4]]),
            "x: equal to within 1e-05 (2 × 2 values)",
        ),
        (
            [torch.ones(2), torch.ones(2)],
            np.ones((2, 2)),
            "x: equal to within 1e-05 (2 × 2 values)",
        ),
        ([float("inf")], [float("inf")], "x: equal to within 1e-05 (1 values)"),
        (
            torch.tensor([True, False]),
            [True, False],
            "x: equal to within 1e-05 (2 values)",
        ),
        (
            torch.tensor([1.0], dtype=torch.bfloat16),
            [1.0],
            "x: equal to within 1e-05 (1 values)",
        ),
        ([], [], "x: equal to within 1e-05 (0 values)"),
    ],
)
def test_equal_things_give_one_stable_line(ours, theirs, line, capsys):
    compare(ours, theirs, "x")
    assert capsys.readouterr().out == line + "\n"


def test_tolerance_zero_asks_for_equality(capsys):
    compare([1, 2], [1, 2], "ids", tol=0)
    assert capsys.readouterr().out == "ids: equal (2 values)\n"
    with pytest.raises(AssertionError):
        compare([1.0], [1.0 + 1e-12], "ids", tol=0)


def test_a_difference_says_how_large_and_where():
    theirs = torch.zeros(2, 3)
    theirs[1, 2] = 0.25
    with pytest.raises(
        AssertionError,
        match=(
            r"logits: differ by 0.25 at \[1, 2\].*ours 0, theirs 0.25 \(2 × 3 values\)"
        ),
    ):
        compare(torch.zeros(2, 3), theirs, "logits")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_never_equals(bad):
    with pytest.raises(AssertionError):
        compare([1.0, bad], [1.0, 2.0])
    with pytest.raises(AssertionError):
        compare([1.0, 2.0], [1.0, bad], tol=1e9)


def test_two_nans_are_no_agreement():
    with pytest.raises(AssertionError):
        compare([float("nan")], [float("nan")])


def test_shapes_never_broadcast():
    with pytest.raises(AssertionError, match="shapes differ: ours 3, theirs 1 × 3"):
        compare(torch.ones(3), torch.ones(1, 3))
    with pytest.raises(AssertionError, match="ours a single number"):
        compare(1.0, [1.0])


def test_large_integers_are_compared_exactly():
    with pytest.raises(AssertionError):
        compare([2**60], [2**60 + 1], tol=0)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="tol"):
        compare(1, 1, tol=-1)
    with pytest.raises(ValueError, match="compare takes"):
        compare(["a", None], ["a", None])
