"""`predict` asks for a guess, and `settle` compares it with the answer."""

from __future__ import annotations

import pytest

from llmlab.course import predicting
from llmlab.course.predicting import Guess, number, predict, verdict

QUESTION = "How many tokens per second?"


@pytest.fixture
def displayed(monkeypatch):
    """What was displayed, as mime bundles."""
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda x, raw: shown.append(x))
    return shown


def test_a_field_for_a_number(displayed):
    guess = predict(QUESTION, unit="tokens <per> second")
    (bundle,) = displayed
    assert bundle["text/plain"] == f"Predict: {QUESTION}"
    page = bundle["text/html"]
    assert f'<label for="{guess.uid}">{QUESTION}</label>' in page
    assert "tokens &lt;per&gt; second" in page
    assert guess.value is None


def test_the_same_question_has_the_same_page(displayed):
    predict(QUESTION, unit="%")
    predict(QUESTION, unit="%")
    assert displayed[0]["text/html"] == displayed[1]["text/html"]
    assert Guess("Another question?").uid != Guess(QUESTION).uid


def test_the_widget_is_read(displayed, monkeypatch):
    import ipywidgets

    made = []
    text = ipywidgets.Text

    def remember(*args, **settings):
        made.append(text(*args, **settings))
        return made[-1]

    monkeypatch.setattr(ipywidgets, "Text", remember)
    guess = predict(QUESTION)
    made[0].value = "about 1,200 tokens"
    assert guess.value == 1200
    made[0].value = "many"
    assert guess.value is None
    made[0].value = ""
    assert guess.value is None


def test_settled_without_a_guess_with_one_and_rounded(displayed):
    guess = Guess(QUESTION, "tokens per second")
    guess.settle(672.34)
    assert displayed[-1]["text/plain"] == f"{QUESTION} 672 tokens per second."
    assert "<script>" in displayed[-1]["text/html"], "the book compares by itself"
    guess.say(49)
    guess.settle(672.34, digits=4)
    told = "You said 49: the answer is 13.7 times as large."
    assert displayed[-1]["text/plain"].endswith(f"672.3 tokens per second. {told}")
    assert "<script>" not in displayed[-1]["text/html"], "it was told already"


def test_choices(displayed):
    guess = predict("Which is best?", choices=["INT4", "NF4"])
    assert 'value="NF4"' in displayed[-1]["text/html"]
    guess.say("INT4")
    guess.settle("NF4")
    assert displayed[-1]["text/plain"] == "Which is best? NF4. You said INT4: not so."
    guess.say("NF4")
    guess.settle("NF4")
    assert displayed[-1]["text/plain"].endswith("You said NF4: right.")


@pytest.mark.parametrize(
    ("guess", "answer", "told"),
    [
        (49, 672, "You said 49: the answer is 13.7 times as large."),
        (4900, 672, "You said 4,900: that is 7.29 times too large."),
        (650, 672, "You said 650: within 10%."),
        (740, 672, "You said 740: within 10%."),
        (750, 672, "You said 750: that is 1.12 times too large."),
        (672, 672, "You said 672: exactly."),
        (0, 672, "You said 0."),
        (-3, 672, "You said -3."),
        (5, 0, "You said 5."),
        (0, 0, "You said 0: exactly."),
    ],
)
def test_verdicts(guess, answer, told):
    assert verdict(guess, answer) == told


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("49", 49),
        ("1,000,000", 1e6),
        ("≈ 0.5 %", 0.5),
        (".5", 0.5),
        ("-2e3 GB", -2000),
        ("half", None),
        ("", None),
    ],
)
def test_numbers_in_what_people_type(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"question": "  "}, "question"),
        ({"question": QUESTION, "choices": ["one"]}, "choices"),
        ({"question": QUESTION, "choices": ["a", "b"], "unit": "%"}, "choices"),
    ],
)
def test_bad_questions(arguments, named):
    with pytest.raises(ValueError, match=named):
        predict(**arguments)


def test_bad_guesses_and_answers():
    with pytest.raises(ValueError, match="no number"):
        Guess(QUESTION).say("many")
    of_two = Guess(QUESTION, choices=("a", "b"))
    with pytest.raises(ValueError, match="none of"):
        of_two.say("c")
    with pytest.raises(ValueError, match="none of"):
        of_two.settle("c")


def test_without_ipywidgets_the_page_stays(displayed, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    predict(QUESTION)
    assert set(displayed[0]) == {"text/html", "text/plain"}


def test_what_is_said_under_the_field():
    assert predicting.kept("", True) == ""
    assert "number" in predicting.kept("many", True)
    assert predicting.kept("49", True) == predicting.kept("NF4", False)
