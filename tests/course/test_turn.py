"""`your_turn` marks an answer inside a lesson and lets the lesson go on."""

from __future__ import annotations

import pytest

from llmlab.checks.start.welcome import check
from llmlab.course.turn import your_turn
from llmlab.start import welcome


def stub(x):
    raise NotImplementedError("yours")


def no_maximum(x):
    e = x.exp()
    return e / e.sum(-1, keepdim=True)


def test_right(capsys):
    your_turn(check.softmax, welcome.softmax)
    said = capsys.readouterr().out
    assert said.startswith("✓ softmax: right")
    assert "point" in said, "marks are for the exercises"


@pytest.mark.parametrize(
    ("answer", "said"), [(stub, "not done yet"), (no_maximum, "not right yet")]
)
def test_not_right_yet_does_not_stop_the_lesson(answer, said, capsys):
    your_turn(check.softmax, answer)
    out = capsys.readouterr().out
    assert said in out
    assert 'check.hint("softmax")' in out


def test_only_exercises_can_be_asked():
    with pytest.raises(ValueError, match=r"check\.merge"):
        your_turn(welcome.softmax, welcome.softmax)
