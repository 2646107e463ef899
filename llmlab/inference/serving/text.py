"""Between text and tokens: the chat template, text that grows, where it stops.

    ModelText    a model's folder as far as text goes: tokenizer, template, end tokens
    Growing      tokens in, text out, never half a character
    Stops        holds back what may be the beginning of a stop string

A token is some bytes, and a character up to four of them. What one token adds is
therefore the difference of two decoded texts, and where the longer one ends in "�", the
character is not whole yet.

Nothing here needs torch: the process that speaks HTTP stays small.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

HALF = "\ufffd"  # what decoding puts in place of bytes that are no character


class TemplateError(ValueError):
    """A chat template does not take this conversation; the text says why."""


class ModelText:
    """The tokenizer and the template of a folder.

    Raises:
        FileNotFoundError: it has no tokenizer.json.
    """

    def __init__(self, folder: str | Path) -> None:
        from tokenizers import Tokenizer

        self.folder = Path(folder)
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist: a model without it cannot read text"
            )
        self.tokenizer = Tokenizer.from_file(str(file))
        self.settings = self._json("tokenizer_config.json")

    def _json(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        if not file.is_file():
            return {}
        return json.loads(file.read_text(encoding="utf-8"))

    @cached_property
    def template(self) -> str | None:
        """The source of the chat template, if there is one."""
        file = self.folder / "chat_template.jinja"  # where newer folders keep it
        if file.is_file():
            return file.read_text(encoding="utf-8")
        source = self.settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {each["name"]: each["template"] for each in source}
            return named.get("default")
        return source

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text, by generation_config.json or config.json."""
        for name in ("generation_config.json", "config.json"):
            found = self._json(name).get("eos_token_id")
            if found is not None:
                return tuple(found) if isinstance(found, list) else (found,)
        token = self._special().get("eos_token", "")
        number = self.tokenizer.token_to_id(token)
        return () if number is None else (number,)

    @cached_property
    def context(self) -> int | None:
        """Tokens that the model was made for."""
        shape = self._json("config.json") or self._json("engine.json").get("model", {})
        return shape.get("max_position_embeddings")

    def _special(self) -> dict[str, str]:
        """'eos_token' and the like, as text."""
        out = {}
        for name, token in self.settings.items():
            if name.endswith("_token"):
                content = token.get("content") if isinstance(token, dict) else token
                if isinstance(content, str):
                    out[name] = content
        return out

    def encode(self, text: str) -> list[int]:
        """A plain text, with what the tokenizer puts around it."""
        return self.tokenizer.encode(text).ids

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """A conversation with the assistant's turn opened.

        Raises:
            TemplateError: there is no template, or it refuses these messages.
        """
        text = self.chat_text(messages)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def chat_text(self, messages: Sequence[dict[str, str]]) -> str:
        """The same as text.

        Raises:
            TemplateError: as above.
        """
        if not self.template:
            raise TemplateError(
                "this model has no chat template: it continues text. Use"
                " /v1/completions"
            )
        try:
            return self._compiled.render(
                messages=list(messages),
                add_generation_prompt=True,
                **self._special(),
            )
        except Exception as error:  # whatever a template may raise
            raise TemplateError(
                f"messages do not fit this model's chat template: {error}"
            ) from None

    @cached_property
    def _compiled(self):
        """As transformers renders it: it reads no file and runs no code."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        environment.filters["tojson"] = _as_json
        return environment.from_string(self.template)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _as_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


class Growing:
    """Tokens in, text out.

    tokens   all of them so far
    shown    tokens whose text was given out
    before   where decoding begins: a few tokens before `shown`, for a tokenizer may
             decode a token otherwise at the beginning of a text
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode = tokenizer.decode
        self.tokens: list[int] = []
        self.before = 0
        self.shown = 0

    def add(self, token: int) -> str:
        """The text that this token completes; "" while a character is not whole."""
        self.tokens.append(token)
        known, longer = self._both()
        if len(longer) <= len(known) or longer.endswith(HALF):
            return ""
        return self._give(known, longer)

    def end(self) -> str:
        """What is left when no token follows: half a character is shown as "�"."""
        known, longer = self._both()
        return self._give(known, longer)

    def _both(self) -> tuple[str, str]:
        known = self._decode(self.tokens[self.before : self.shown])
        return known, self._decode(self.tokens[self.before :])

    def _give(self, known: str, longer: str) -> str:
        self.before = self.shown
        self.shown = len(self.tokens)
        return longer[len(known) :]


class Stops:
    """Text in, text out, up to the first stop string.

    A stop string may begin in one token and end in another, so a tail that could be
    its beginning is held back until the next text tells.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = [each for each in strings if each]
        self.held = ""
        self.reached = False

    def add(self, text: str) -> str:
        """What can be shown now; sets `reached` where a stop string is complete."""
        if self.reached:
            return ""
        self.held += text
        places = [self.held.find(each) for each in self.strings]
        found = [place for place in places if place >= 0]
        if found:
            self.reached = True
            shown = self.held[: min(found)]
            self.held = ""
            return shown
        keep = self._beginning()
        shown = self.held[: len(self.held) - keep]
        self.held = self.held[len(shown) :]
        return shown

    def end(self) -> str:
        """What was held back, when no text follows."""
        shown = self.held
        self.held = ""
        return shown

    def _beginning(self) -> int:
        """Length of the longest tail that a stop string begins with."""
        longest = max((len(each) for each in self.strings), default=1)
        for length in range(min(longest - 1, len(self.held)), 0, -1):
            tail = self.held[-length:]
            if any(each.startswith(tail) for each in self.strings):
                return length
        return 0
