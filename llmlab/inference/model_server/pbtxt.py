"""Protocol Buffers' text format, as far as `config.pbtxt` needs it.

https://protobuf.dev/reference/protobuf/textformat-spec. A message is a list of fields:

    name: "lm"                       a scalar: text, number, true, or a bare word
    dynamic_batching { … }           a message; a colon before the brace is allowed
    dims: [ 1, 8 ]                   a list, the same as dims: 1  dims: 8
    input [ { … }, { … } ]           a list of messages

Between fields may stand a comma or a semicolon; # begins a comment. What the fields
mean is not known here: `read` gives names, values and lines.

Simplified: no floats with exponents in octal, no extensions [in.brackets], no <…> for
{…}, and of the escapes in a text only \\n, \\t, \\\\, \\" and \\'.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TOKEN = re.compile(
    r"""
    (?P<space>[\s]+ | \#[^\n]*)
  | (?P<text>"(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)*')
  | (?P<number>[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?(?![\w.]))
  | (?P<word>[A-Za-z_]\w*)
  | (?P<mark>[{}\[\]:,;])
    """,
    re.VERBOSE,
)
ESCAPES = {"n": "\n", "t": "\t", "\\": "\\", '"': '"', "'": "'"}
DEEPEST = 20  # messages in messages


@dataclass(frozen=True)
class Word:
    """A bare word, such as KIND_CPU or true: no text in quotes."""

    name: str


@dataclass(frozen=True)
class Field:
    """One field of a message. `value` is a text, a number, a Word or a Message."""

    name: str
    value: str | int | float | Word | Message
    line: int


@dataclass(frozen=True)
class Message:
    """The fields between two braces, in their order; lists are taken apart."""

    fields: tuple[Field, ...]
    line: int


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    line: int


def read(text: str) -> Message:
    """The fields of a file.

    Raises:
        ValueError: it is not the text format; the sentence names the line.
    """
    tokens = _tokens(text)
    fields, at = _fields(tokens, 0, 0)
    if tokens[at].kind != "end":
        raise _unexpected(tokens[at], "a field")
    return Message(tuple(fields), 1)


def _tokens(text: str) -> list[_Token]:
    found = []
    at = 0
    line = 1
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"line {line}: {text[at : at + 12]!r} cannot be read")
        if match.lastgroup != "space":
            found.append(_Token(match.lastgroup, match.group(), line))
        line += match.group().count("\n")
        at = match.end()
    return [*found, _Token("end", "the end of the file", line)]


def _unexpected(token: _Token, wanted: str) -> ValueError:
    return ValueError(f"line {token.line}: {token.text!r} where {wanted} is expected")


def _fields(tokens: list[_Token], at: int, depth: int) -> tuple[list[Field], int]:
    """The fields from token `at` on, and where they end."""
    if depth > DEEPEST:
        raise ValueError(f"line {tokens[at].line}: more than {DEEPEST} messages deep")
    fields: list[Field] = []
    while tokens[at].kind == "word":
        name = tokens[at]
        at += 1
        colon = tokens[at].text == ":"
        at += colon
        if tokens[at].text == "[":
            values, at = _list(tokens, at, depth, colon)
        else:
            value, at = _value(tokens, at, depth, colon)
            values = [value]
        fields += [Field(name.text, value, name.line) for value in values]
        at += tokens[at].text in (",", ";")
    return fields, at


def _list(tokens: list[_Token], at: int, depth: int, colon: bool) -> tuple[list, int]:
    """[ a, b ]; `at` is at the bracket."""
    values: list = []
    at += 1
    while tokens[at].text != "]":
        if values:
            if tokens[at].text != ",":
                raise _unexpected(tokens[at], "',' or ']'")
            at += 1
        value, at = _value(tokens, at, depth, colon)
        values.append(value)
    return values, at + 1


def _value(tokens: list[_Token], at: int, depth: int, colon: bool) -> tuple:
    """A scalar or { … }, and where it ends. A scalar needs a colon before it."""
    token = tokens[at]
    if token.text == "{":
        fields, end = _fields(tokens, at + 1, depth + 1)
        if tokens[end].text != "}":
            raise _unexpected(tokens[end], f"a field or the '}}' of line {token.line}")
        return Message(tuple(fields), token.line), end + 1
    if not colon:
        raise _unexpected(token, "':' or '{'")
    if token.kind == "text":
        text = ""
        while tokens[at].kind == "text":  # texts side by side are one
            text += _unquoted(tokens[at])
            at += 1
        return text, at
    if token.kind == "number":
        try:
            return int(token.text), at + 1
        except ValueError:
            return float(token.text), at + 1
    if token.kind == "word":
        return Word(token.text), at + 1
    raise _unexpected(token, "a value")


def _unquoted(token: _Token) -> str:
    def escaped(match: re.Match) -> str:
        if match.group(1) not in ESCAPES:
            raise ValueError(f"line {token.line}: the escape {match.group()!r}")
        return ESCAPES[match.group(1)]

    return re.sub(r"\\(.)", escaped, token.text[1:-1])
