"""A guess in the book: typed, kept, and compared with the answer as Python compares."""

from __future__ import annotations

import pytest

from llmlab.course.predicting import Guess, verdict

PAIRS = [
    ("49", 672.34),
    ("4,900", 672.34),
    ("650", 672.34),
    ("740", 672.0),
    ("750", 672.0),
    ("672", 672.0),
    ("0", 5.0),
    ("-3", 5.0),
    ("1234567", 2.5),
    (".004 GB", 0.0001),
]


@pytest.fixture
def page(chromium):
    page = chromium.new_page()
    yield page
    page.close()


def settled(guess: Guess, answer, monkeypatch) -> str:
    """The HTML of the answer, as it is stored."""
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda x, raw: shown.append(x))
    guess.settle(answer)
    return shown[0]["text/html"]


@pytest.mark.parametrize(("typed", "answer"), PAIRS)
def test_the_page_says_what_python_says(page, monkeypatch, typed, answer):
    guess = Guess("How many?", "GB")
    page.set_content(guess.html() + settled(guess, answer, monkeypatch))
    page.fill("input", typed)
    guess.say(typed)
    told = page.locator(".llmlab-settled span").inner_text()
    assert told == verdict(guess.value, answer)
    assert "Kept" in page.locator(".llmlab-said").inner_text()
    page.fill("input", "many")
    assert page.locator(".llmlab-settled span").inner_text() == ""
    assert "number" in page.locator(".llmlab-said").inner_text()


def test_choices_by_keyboard(page, monkeypatch):
    guess = Guess("Which?", choices=("INT4", "NF4"))
    page.set_content(guess.html() + settled(guess, "NF4", monkeypatch))
    page.locator("input").first.focus()
    page.keyboard.press("Space")
    assert "not so" in page.locator(".llmlab-settled").inner_text()
    page.keyboard.press("ArrowRight")
    assert "You said NF4: right." in page.locator(".llmlab-settled").inner_text()


def test_a_guess_in_the_book_outlives_a_reload(open_page):
    page = open_page("notebooks/01-start/01-welcome.html", fresh=True)
    field = page.locator(".llmlab-predict input")
    field.fill("49")
    page.reload()
    assert field.input_value() == "49"
    answer = page.locator(".llmlab-settled")
    assert not answer.is_visible(), "it is folded"
    page.locator("summary", has_text="Show the answer").first.click()
    assert "You said 49: the answer is 13.7 times as large." in answer.inner_text()
