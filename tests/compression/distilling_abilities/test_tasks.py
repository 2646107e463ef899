"""The tasks and their graders, against enumeration and against Python's arithmetic."""

from __future__ import annotations

import random

import pytest

from llmlab.compression.distilling_abilities import exact_match, last_number, tasks


def test_chains_are_what_python_computes_from_the_left():
    for chain in tasks.draw(200, (1, 2, 5), random.Random(0)):
        value = int(chain[0])
        for step, found in zip(tasks.steps_of(chain), tasks.values(chain), strict=True):
            value = eval(f"{value}{step}") % 10
            assert found == value
        assert tasks.answer(chain) == value


def test_lengths_are_drawn_from_those_given():
    chains = tasks.draw(300, (2, 4), random.Random(1))
    assert {len(tasks.steps_of(chain)) for chain in chains} == {2, 4}
    assert all("0" not in chain for chain in chains)


def test_the_letter_agrees_as_often_as_asked():
    drawn = tasks.draw_comparisons(4000, 0.9, random.Random(0))
    agree = sum((q[0] == "a") == (label == "y") for q, label in drawn) / len(drawn)
    assert agree == pytest.approx(0.9, abs=0.02)
    assert all(tasks.compare(question) == label for question, label in drawn)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3+5=8;8*2=6#6", 6),
        ("the answer is 12, not 2.", 2),
        ("#-14", -14),
        ("5 and 007", 7),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_counts(text, number):
    assert last_number(text) == number


def test_exact_match_looks_at_the_last_number_alone():
    replies = ["3+5=8#8", "8#3", "12", "", "#2"]
    assert exact_match(replies, [8, 8, 2, 0, 2]) == 2 / 5


def test_encoding_comes_back_and_stops_at_the_end():
    assert tasks.decode(tasks.encode("3+5=8#8.__")) == "3+5=8#8"
    assert sorted(tasks.encode(tasks.CHARACTERS)) == list(range(len(tasks.CHARACTERS)))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: tasks.encode("3/5"), r"text='3/5' holds \['/'\]"),
        (lambda: tasks.steps_of("3+"), "chain='3\\+'"),
        (lambda: tasks.steps_of("31"), "chain='31'"),
        (lambda: tasks.draw_comparisons(1, 1.1, random.Random(0)), "agreement=1.1"),
        (lambda: exact_match([], []), "at least one"),
        (lambda: exact_match(["1"], [1, 2]), "1 and 2"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()
