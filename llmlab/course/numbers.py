"""Compares two printed texts: the words exactly, the numbers in them as numbers.

A lesson prints the same sentences on every CPU, but the last digits of what it measures
move with the CPU's vector instructions and the number of threads. So

- a decimal (0.85%, 3.37, 8.1e+09) may differ by one unit of its last printed digit or
  by 0.5 % of the stored number, whichever is larger;
- a whole number is a count ("3 of 14", "5,120 parameters") and is compared exactly: at
  one unit of the last digit a wrong count would pass. Marked as rounded by a % after it
  or a ±, ≈ or ~ before it, it is compared as a decimal;
- a sign that changes is a difference, unless one of the two numbers is zero;
- NaN and infinity are words. So are numbers inside names (q_proj.3, layer0, Llama-3.1),
  versions (2.13.0), dates, times and addresses: in doubt a number is text, and exact;
- spaces and ruled lines are compared exactly, unless a number's printed width changed:
  then padding had to move with it, and runs of them are the same at any length.

A cell may declare its own tolerance by a tag of its metadata:

    tags=["numbers-within-5%"]     by 5 % of the stored number, whole numbers too
    tags=["numbers-within-0.02"]   by 0.02, whole numbers too
    tags=["numbers-exact"]         to the last digit, layout included

One unit of a decimal's last digit is always allowed but under `numbers-exact`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from itertools import zip_longest

from llmlab.course.printed import Number, numbers_in

TAG = "numbers-"
LARGEST_SHARE = Decimal("0.5")  # a tolerance beyond it would let nearly anything pass
SHOWN = 5  # differences that are listed before the rest is counted


@dataclass(frozen=True)
class Tolerance:
    """How far apart two numbers may be and still be called the same.

    Attributes:
        share: of the stored number's size, 0.005 for 0.5 %.
        distance: in the number's own unit; the larger of the two counts.
        counts: whether they hold for whole numbers too.
        exact: everything must be the same, to the last character.
    """

    share: Decimal = Decimal("0.005")
    distance: Decimal = Decimal(0)
    counts: bool = False
    exact: bool = False

    def __str__(self) -> str:
        """In words, for a message or a page: '5 %'."""
        if self.exact:
            return "no difference"
        if self.distance:
            return f"{plain(self.distance)}"
        return f"{plain(self.share * 100)} %"


DEFAULT = Tolerance()
EXACT = Tolerance(Decimal(0), exact=True)


def tolerance_of(tags: Iterable[str]) -> Tolerance:
    """The tolerance that a cell's tags declare, else the default.

    Raises:
        ValueError: a tag that starts with `numbers-` and is none of the forms above, a
            share above 50 %, or two such tags.
    """
    own = [tag for tag in tags if tag.startswith(TAG)]
    if not own:
        return DEFAULT
    if len(own) > 1:
        raise ValueError(f"tags={own} declare two tolerances: keep one")
    return _parse_tag(own[0])


def _parse_tag(tag: str) -> Tolerance:
    if tag == "numbers-exact":
        return EXACT
    match = re.fullmatch(r"numbers-within-(\d+(?:\.\d+)?)(%?)", tag)
    if match is None:
        raise ValueError(
            f"tag {tag!r} is not known: write numbers-within-5%, numbers-within-0.02 or"
            " numbers-exact"
        )
    amount = Decimal(match[1])
    if not amount:
        raise ValueError(f"tag {tag!r} allows nothing: write numbers-exact")
    if not match[2]:
        return Tolerance(Decimal(0), amount, counts=True)
    if amount / 100 > LARGEST_SHARE:
        raise ValueError(f"tag {tag!r} lets nearly anything pass: at most 50%")
    return Tolerance(amount / 100, counts=True)


def disagreement(
    stored: Number, found: Number, tolerance: Tolerance = DEFAULT
) -> str | None:
    """Why two numbers are not the same within the tolerance, or None when they are."""
    pair = f"{stored.text} is stored, {found.text} came out"
    if stored.sign != found.sign and stored.value and found.value:
        return f"{pair}: the sign changed"
    gap = abs(stored.value - found.value)
    if tolerance.exact:
        same = stored.text == found.text
        return None if same else f"{pair}: this cell's numbers are exact"
    allowed = max(tolerance.share * abs(stored.value), tolerance.distance)
    if stored.is_count and found.is_count:
        if not tolerance.counts:
            return f"{pair}: whole numbers are compared exactly" if gap else None
        rule = f"{tolerance}"
    else:
        # 0.999 and 1.0 are told apart by the finer of the two
        unit = min(stored.unit, found.unit)
        allowed = max(allowed, unit)
        rule = f"{tolerance}, or one unit of the last digit"
    if gap <= allowed:
        return None
    return f"{pair}: {plain(gap)} apart, {plain(allowed)} allowed ({rule})"


def differences(
    stored: str,
    found: str,
    tolerance: Tolerance = DEFAULT,
    *,
    html: bool = False,
) -> list[str]:
    """What differs between the stored text and the one that came out, a sentence each.

    Args:
        stored: the text of the notebook.
        found: the text of this run.
        tolerance: how far numbers may be apart.
        html: tags, entities, styles, scripts and drawings are compared exactly.
    """
    if stored == found:
        return []
    old_lines = _lines(stored, html)
    new_lines = _lines(found, html)
    said: list[str] = []
    moved = not tolerance.exact and _width_changed(old_lines, new_lines)
    for at, (old, new) in enumerate(zip_longest(old_lines, new_lines), 1):
        if old is None:
            said.append(f"line {at} is new: {_quoted(new.text)}")
        elif new is None:
            said.append(f"line {at} is missing: {_quoted(old.text)}")
        else:
            said += [f"line {at}: {why}" for why in _line(old, new, tolerance, moved)]
    if not said:
        return []
    more = len(said) - SHOWN
    return said[:SHOWN] + ([f"and {more} more"] if more > 0 else [])


@dataclass(frozen=True)
class _Line:
    """A line, its numbers, and what is left of it with a mark where each number was."""

    text: str
    numbers: list[Number]
    frame: str


_MARK = "\0"


def _lines(text: str, html: bool) -> list[_Line]:
    """Lines of the text; one of HTML is one line, for a tag may run over several."""
    lines = []
    for line in [text] if html else text.split("\n"):
        numbers = numbers_in(line, html=html)
        frame = ""
        end = 0
        for number in numbers:
            frame += line[end : number.start] + _MARK
            end = number.end
        lines.append(_Line(line, numbers, frame + line[end:]))
    return lines


def _width_changed(old_lines: list[_Line], new_lines: list[_Line]) -> bool:
    """Whether any number became longer or shorter: its column's padding moves then."""
    old = [len(number.text) for line in old_lines for number in line.numbers]
    new = [len(number.text) for line in new_lines for number in line.numbers]
    return old != new


def _line(old: _Line, new: _Line, tolerance: Tolerance, moved: bool) -> list[str]:
    """What differs in one line."""
    if old.text == new.text:
        return []
    old_frame, new_frame = old.frame, new.frame
    if moved:
        old_frame, new_frame = _loose(old_frame), _loose(new_frame)
    if old_frame != new_frame:
        return [_frames_differ(old, new)]
    pairs = zip(old.numbers, new.numbers, strict=True)
    found = [disagreement(a, b, tolerance) for a, b in pairs]
    return [why for why in found if why is not None]


def _loose(frame: str) -> str:
    """The frame without padding around numbers, and with runs of one length."""
    frame = re.sub(rf"[ \t]*{_MARK}[ \t]*", _MARK, frame)
    frame = re.sub(r"[ \t]+", " ", frame)
    return re.sub(r"([-─━═=_])\1{2,}", r"\1\1\1", frame).strip()


def _frames_differ(old: _Line, new: _Line) -> str:
    """A sentence for two lines whose words or whose count of numbers differ."""
    had, has = len(old.numbers), len(new.numbers)
    what = "the text differs"
    if had != has:
        what = f"numbers in this line: {had} stored, {has} came out"
    a, b = _around_first_difference(old.text, new.text)
    return f"{what}: {_quoted(a)} is stored, {_quoted(b)} came out"


def _around_first_difference(a: str, b: str) -> tuple[str, str]:
    """Both texts from a little before the place where they part."""
    if max(len(a), len(b)) <= 120:
        return a, b
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    start = max(0, same - 30)
    return a[start : start + 120], b[start : start + 120]


def _quoted(text: str) -> str:
    return f"“{text[:120].strip()}”"


def plain(amount: Decimal) -> str:
    """A number for a sentence: four digits, no trailing zeros."""
    return f"{float(amount):.4g}"
