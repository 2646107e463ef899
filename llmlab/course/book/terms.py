"""The glossary's terms, linked where a lesson first uses them.

Lessons are plain Markdown, so the links are made on the staged pages of the book.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

# Where no link may stand: code, mathematics, links and roles, headings, tables, HTML.
CLOSED = re.compile(
    r"```.*?```|~~~.*?~~~|`[^`\n]+`|\{[a-z:]+\}`[^`]+`"
    r"|\$\$.*?\$\$|\$[^$\n]+\$|!?\[[^\]]*\]\([^)]*\)|<[^>\n]+>|https?://\S+"
    r"|^#+ .*$|^\|.*$",
    re.DOTALL | re.MULTILINE,
)


@cache
def terms(glossary: Path) -> dict[str, str]:
    """English term → its Chinese name ('' where there is none).

    Raises:
        ValueError: an entry has no text below its names.
    """
    text = glossary.read_text(encoding="utf-8")
    body = text.split("```{glossary}\n", 1)[1].rsplit("```", 1)[0]
    found = {}
    for entry in body.strip().split("\n\n"):
        lines = entry.split("\n")
        names = [line for line in lines if not line.startswith(" ")]
        if len(names) == len(lines) or len(names) > 2:
            raise ValueError(f"{glossary.name}: the entry {lines[0]!r} is not one")
        found[names[0]] = names[1] if len(names) == 2 else ""
    return found


@cache
def pattern(term: str) -> re.Pattern:
    """Finds a term in a text: whole, in the singular or plural.

    A name with capitals inside it (NF4, KV cache) is found as it is written, a common
    noun also in lower case.
    """
    inner = any(letter.isupper() for letter in term[1:]) or term[0].isdigit()
    first = re.escape(term[0])
    if not inner:
        first = f"[{term[0].upper()}{term[0].lower()}]"
    return re.compile(rf"(?<![\w-]){first}{re.escape(term[1:])}(?:e?s)?(?![\w-])")


class Linker:
    """Links each term once, where a lesson first uses it."""

    def __init__(self, glossary: Path) -> None:
        # Longer terms first: "ring attention" before "ring".
        self.open = sorted(terms(glossary), key=len, reverse=True)

    def link(self, text: str) -> str:
        """The Markdown text with roles in place of first uses."""
        for term in list(self.open):
            text, done = self._link_one(text, term)
            if done:
                self.open.remove(term)
        return text

    def _link_one(self, text: str, term: str) -> tuple[str, bool]:
        closed = [match.span() for match in CLOSED.finditer(text)]
        for match in pattern(term).finditer(text):
            start, end = match.span()
            if any(a < end and start < b for a, b in closed):
                continue
            role = f"{{term}}`{match.group()} <{term}>`"
            return text[:start] + role + text[end:], True
        return text, False
