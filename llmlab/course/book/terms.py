"""The glossary's terms, linked where a lesson first uses them.

Lessons are plain Markdown, so the links are made on the staged pages of the book, and
on the learner's copies. There they lead to `work/GLOSSARY.md`: JupyterLab shows it as a
page and goes to the term's heading; a hover shows what the term means.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

GLOSSARY = Path("jupyter-book") / "pages" / "glossary.md"
# Where no link may stand: code, mathematics, links and roles, headings, tables, HTML.
CLOSED = re.compile(
    r"```.*?```|~~~.*?~~~|`[^`\n]+`|\{[a-z:]+\}`[^`]+`"
    r"|\$\$.*?\$\$|\$[^$\n]+\$"
    r"|!?\[[^\]]*\]\((?:[^()\"]|\"[^\"]*\"|\([^()]*\))*\)"
    r"|<summary>.*?</summary>|<[^>\n]+>|https?://\S+"
    r"|^#+ [^\n]*|^\|[^\n]*",
    re.DOTALL | re.MULTILINE,
)


# Common words that are a term only in some lessons: elsewhere a figure is drawn to
# scale, and a method scales.
ONLY_IN = {"Scale": ("04-peft/07-qlora", "06-compression/")}
PAGE = """\
# Glossary

{intro}

*Links in the lessons lead here; the tab of the lesson is still open. `llmlab lab`
writes this page anew: keep notes in a file of your own.*
"""


@dataclass(frozen=True)
class Entry:
    """A term's Chinese name ('' where it has none), and what it means."""

    chinese: str
    text: str

    @property
    def title(self) -> str:
        """What it means, as a link's title: no code, no double quotes."""
        return self.text.replace("`", "").replace('"', "'")


@cache
def entries(glossary: Path) -> dict[str, Entry]:
    """English term → its entry.

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
        meaning = " ".join(line.strip() for line in lines[len(names) :])
        found[names[0]] = Entry(names[1] if len(names) == 2 else "", meaning)
    return found


def terms(glossary: Path) -> dict[str, str]:
    """English term → its Chinese name ('' where there is none)."""
    return {term: entry.chinese for term, entry in entries(glossary).items()}


def anchor(term: str) -> str:
    """The fragment by which JupyterLab finds the term's heading."""
    return term.replace(" ", "-")


def page(glossary: Path) -> str:
    """The glossary as Markdown that JupyterLab shows, with a heading for each term."""
    intro = glossary.read_text(encoding="utf-8").split("\n\n")[1]
    text = PAGE.format(intro=intro)
    for term, entry in entries(glossary).items():
        chinese = f"{entry.chinese} · " if entry.chinese else ""
        text += f"\n### {term}\n\n{chinese}{entry.text}\n"
    return text


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


def as_role(words: str, term: str) -> str:
    """A link as the book writes it."""
    return f"{{term}}`{words} <{term}>`"


class Linker:
    """Links each term once, where a lesson first uses it.

    Args:
        glossary: the file with the terms.
        lesson: whose text it is, as in "04-peft/05-lora"; some words are terms only in
            some lessons.
        write: the link, from the words of the text and the term; the book's by default.
    """

    def __init__(
        self,
        glossary: Path,
        lesson: str = "",
        write: Callable[[str, str], str] = as_role,
    ) -> None:
        meant = [t for t in terms(glossary) if lesson.startswith(ONLY_IN.get(t, ""))]
        # Longer terms first: "ring attention" before "ring".
        self.open = sorted(meant, key=len, reverse=True)
        self.write = write

    @classmethod
    def to_page(cls, glossary: Path, lesson: str, way: str) -> Linker:
        """Links to the page at `way`, with what the term means as their title."""
        known = entries(glossary)

        def write(words: str, term: str) -> str:
            return f'[{words}]({way}#{anchor(term)} "{known[term].title}")'

        return cls(glossary, lesson, write)

    def link(self, text: str) -> str:
        """The Markdown text with links in place of first uses."""
        for term in list(self.open):
            text, done = self._link_one(text, term)
            if done:
                self.open.remove(term)
        return text

    def _link_one(self, text: str, term: str) -> tuple[str, bool]:
        uses = list(pattern(term).finditer(text))
        closed = [match.span() for match in CLOSED.finditer(text)] if uses else []
        for match in uses:
            start, end = match.span()
            if any(a < end and start < b for a, b in closed):
                continue
            return text[:start] + self.write(match.group(), term) + text[end:], True
        return text, False
