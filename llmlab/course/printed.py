"""Finds the numbers in a printed text, and leaves alone what only looks like one.

Numbers inside names (q_proj.3, layer0, Llama-3.1), versions (2.13.0), dates, times,
addresses and, in HTML, markup are text: in doubt a number is text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

LARGEST_EXPONENT = 308  # beyond a float: not a number but a piece of a hash


@dataclass(frozen=True)
class Number:
    """A number as it is printed, and where it stands in its line."""

    text: str
    sign: str
    value: Decimal
    unit: Decimal  # one unit of its last printed digit
    is_count: bool
    start: int
    end: int


# What holds digits and is text: dates, times, and in HTML the markup itself.
_DATE = r"(?<!\d)\d{4}-\d{2}-\d{2}(?:T[\d:.]+)?(?!\d)"
_TIME = r"(?<![\d.:])\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?![\d.:])"
_MARKUP = (
    r"<(?P<block>script|style|svg)\b[\s\S]*?</(?P=block)\s*>"
    r"|<!--[\s\S]*?-->|<[^>]*>|&[#\w]+;"
)
_NUMBER = r"""
    (?<![\w.])                    # q_proj.3 is a name
    (?<![^\W\d][-−])              # so is Llama-3.1
    (?P<sign>(?<![\w.)\]])[-+−])?
    (?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)
    (?P<fraction>\.[0-9]+)?
    (?:[eE](?P<exponent>[-+]?[0-9]+)
      |\s?[·×]\s?10(?P<raised>[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+))?
    (?!\.?[0-9])                  # 2.13.0 is a version
"""
_RAISED = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
_PLAIN_TEXT = re.compile(f"(?P<text>{_DATE}|{_TIME})|{_NUMBER}", re.VERBOSE)
_HTML = re.compile(f"(?P<text>{_MARKUP}|{_DATE}|{_TIME})|{_NUMBER}", re.VERBOSE)
# What may touch a number's last digit: a unit. 12ab34 and 3rd are text.
_UNIT = re.compile(
    r"(?:[kMGTPEmµμn]?(?:i?B|b|bit|s|W|J|Hz|FLOPs?|V)?|min|h|d|x|X|[KTBb])(?!\w)"
)
_ROUNDED_BEFORE = re.compile(r"[±≈~]\s?$")
_ROUNDED_AFTER = re.compile(r"\s?%")


def numbers_in(line: str, *, html: bool = False) -> list[Number]:
    """The numbers of a text, in order."""
    pattern = _HTML if html else _PLAIN_TEXT
    found = (_number(match, line) for match in pattern.finditer(line))
    return [number for number in found if number is not None]


def _number(match: re.Match[str], line: str) -> Number | None:
    """The number that a match stands for, or None where it is text."""
    if match["text"] is not None or not _UNIT.match(line, match.end()):
        return None
    exponent = match["exponent"] or (match["raised"] or "").translate(_RAISED)
    if match["exponent"] and len(match["whole"]) > 1:
        return None  # 12e34 is a piece of a hash: floats have one digit there
    digits = match["whole"].replace(",", "") + (match["fraction"] or "")
    power = int(exponent or 0)
    if abs(power) > LARGEST_EXPONENT:
        return None
    value = Decimal(digits).scaleb(power)
    if match["sign"] in ("-", "−"):
        value = -value
    decimals = len(match["fraction"] or ".") - 1
    is_count = (
        not match["fraction"]
        and not exponent
        and not _ROUNDED_BEFORE.search(line, 0, match.start())
        and not _ROUNDED_AFTER.match(line, match.end())
    )
    return Number(
        match[0],
        match["sign"] or "",
        value,
        Decimal(1).scaleb(power - decimals),
        is_count,
        match.start(),
        match.end(),
    )
