"""`predict(question)` asks for a guess; `guess.settle(answer)` says how good it was.

    guess = predict("How many tokens per second?", unit="tokens per second")
    ...
    guess.settle(together)

In JupyterLab the guess is a widget's field. The static book shows a field of its own,
keeps what is typed for as long as the tab is open, and tells the reader the same.
Nothing is sent anywhere.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmlab.course import inline

CLOSE = 0.1  # a guess within a tenth of the answer is called close
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?", re.IGNORECASE)


def predict(
    question: str, *, unit: str = "", choices: Sequence[str] | None = None
) -> Guess:
    """Shows a field for the reader's guess.

    Args:
        question: one question with one answer, as a sentence.
        unit: what the number counts, as in "tokens per second" or "%".
        choices: the answers to choose from, where the answer is no number.
    Returns:
        The guess. Its `settle` shows the answer beside it.
    Raises:
        ValueError: an empty question, fewer than two choices, or choices with a unit.
    """
    from IPython.display import display

    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question={question!r}: ask for something, in a sentence")
    if choices is not None and (len(set(choices)) < 2 or unit):
        raise ValueError(
            f"choices={choices!r}: give two different answers or more, and no unit"
        )
    guess = Guess(question.strip(), unit, None if choices is None else tuple(choices))
    bundle: dict[str, Any] = {
        "text/html": guess.html(),
        "text/plain": f"Predict: {guess.question}",
    }
    view = guess.widget()
    if view is not None:
        bundle["application/vnd.jupyter.widget-view+json"] = view
    display(bundle, raw=True)
    return guess


@dataclass
class Guess:
    """What a reader guessed.

    Attributes:
        question: as it was asked.
        unit: what the number counts; '' where it counts nothing.
        choices: the answers to choose from; None where a number is asked for.
        typed: what stands in the field.
    """

    question: str
    unit: str = ""
    choices: tuple[str, ...] | None = None
    typed: str = field(default="", repr=False)

    @property
    def uid(self) -> str:
        """An id that is the same for the same question."""
        return "g" + hashlib.sha256(self.question.encode()).hexdigest()[:10]

    @property
    def value(self) -> float | str | None:
        """The guess: a number, or one of the choices; None where there is none."""
        if self.choices is not None:
            return self.typed or None
        return number(self.typed)

    def say(self, guess: float | str) -> None:
        """Makes `guess` the guess, where there is no field to type into.

        Raises:
            ValueError: it is no number, or none of the choices.
        """
        text = str(guess)
        if self.choices is not None and text not in self.choices:
            raise ValueError(f"guess={guess!r} is none of {list(self.choices)}")
        if self.choices is None and number(text) is None:
            raise ValueError(f"guess={guess!r} is no number")
        self.typed = text

    def settle(self, answer: float | str, *, digits: int = 3) -> None:
        """Shows the answer, and how far from it the guess was.

        Args:
            answer: the number, in the unit that was asked for, or one of the choices.
            digits: how many digits of the answer count.
        Raises:
            ValueError: the answer is none of the choices.
        """
        from IPython.display import display

        if self.choices is not None:
            if answer not in self.choices:
                raise ValueError(f"answer={answer!r} is none of {list(self.choices)}")
            shown = str(answer)
        else:
            shown = rounded(float(answer), digits)
        told = "" if self.value is None else verdict(self.value, answer)
        unit = with_unit("", self.unit)
        script = "" if told else f"<script>{inline.script('predict.js')}</script>"
        page = (
            f'<p class="llmlab-settled" data-guess="{self.uid}">'
            f"{html.escape(self.question)} <strong>{html.escape(shown)}</strong>"
            f"{html.escape(unit)}. <span>{html.escape(told)}</span></p>{script}"
        )
        plain = f"{self.question} {shown}{unit}. {told}".rstrip()
        display({"text/html": page, "text/plain": plain}, raw=True)

    def html(self) -> str:
        """The field as a page without a kernel shows it."""
        question = html.escape(self.question)
        if self.choices is None:
            unit = html.escape(self.unit)
            asked = (
                f'<label for="{self.uid}">{question}</label>'
                f'<span><input id="{self.uid}" type="text" inputmode="decimal"'
                f' placeholder="your guess" autocomplete="off"> {unit}</span>'
            )
        else:
            boxes = "".join(
                f'<label><input type="radio" name="{self.uid}"'
                f' value="{html.escape(choice)}"> {html.escape(choice)}</label>'
                for choice in self.choices
            )
            asked = f"<fieldset><legend>{question}</legend>{boxes}</fieldset>"
        return (
            f"<style>{inline.style('predict.css')}</style>"
            f'<div class="llmlab-predict" data-guess="{self.uid}">{asked}'
            '<p class="llmlab-said" role="status"></p></div>'
            f"<script>{inline.script('predict.js')}</script>"
        )

    def widget(self) -> dict | None:
        """The field as an ipywidgets view; None where ipywidgets is missing."""
        try:
            import ipywidgets as widgets
        except ImportError:
            return None
        wide = {"width": "min(320px, 98%)"}
        if self.choices is None:
            entry = widgets.Text(placeholder="your guess", layout=wide)
            parts = [entry, widgets.Label(self.unit)]
        else:
            entry = widgets.ToggleButtons(options=self.choices, value=None)
            parts = [entry]
        entry.tooltip = self.question
        said = widgets.HTML()

        def read(_=None) -> None:
            self.typed = entry.value or ""
            said.value = html.escape(kept(self.typed, self.choices is None))

        entry.observe(read, names="value")
        style = inline.style("predict.css")
        question = html.escape(self.question)
        asked = widgets.HTML(f"<style>{style}</style>{question}")
        box = widgets.VBox([asked, widgets.HBox(parts), said])
        box.add_class("llmlab-predict")
        return {"version_major": 2, "version_minor": 0, "model_id": box.model_id}


def number(text: str) -> float | None:
    """The first number in a text: 1,000 tokens → 1000.0; None where there is none."""
    found = NUMBER.search(text.replace(",", ""))
    return float(found.group()) if found else None


def verdict(guess: float | str, answer: float | str) -> str:
    """How a guess compares with the answer, in a sentence."""
    if isinstance(guess, str) or isinstance(answer, str):
        return f"You said {guess}: {'right' if guess == answer else 'not so'}."
    said = f"You said {rounded(guess)}"
    if guess == answer:
        return f"{said}: exactly."
    if guess == 0 or answer / guess <= 0:
        return f"{said}."
    ratio = answer / guess
    if 1 - CLOSE <= ratio <= 1 + CLOSE:
        return f"{said}: within 10%."
    if ratio > 1:
        return f"{said}: the answer is {rounded(ratio)} times as large."
    return f"{said}: that is {rounded(1 / ratio)} times too large."


def kept(typed: str, wants_number: bool) -> str:
    """What stands under the field once something was typed."""
    if not typed.strip():
        return ""
    if wants_number and number(typed) is None:
        return "Please write a number, such as 49 or 0.5."
    return "Kept. The answer comes below."


def rounded(value: float, digits: int = 3) -> str:
    """A number to so many digits, with commas between thousands: 1,230."""
    short = float(f"{value:.{digits}g}")
    return f"{short:,.12g}" if abs(short) < 1e15 else f"{short:g}"


def with_unit(shown: str, unit: str) -> str:
    """'49%' and '49 tokens'."""
    space = "" if not unit or unit.startswith("%") else " "
    return f"{shown}{space}{unit}"
