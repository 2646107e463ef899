"""How a notebook becomes a page of the book.

Links, citations, banners, and figures with their alternative text.

Lessons are plain Markdown, so that JupyterLab renders them; what only the book can do
is added here, on staged copies.
"""

from __future__ import annotations

import hashlib
import html
import posixpath
import re
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from llmlab.course.book.terms import GLOSSARY, Linker
from llmlab.course.book.verified import WIDGET
from llmlab.course.syllabus import Lesson, lessons

LINK = re.compile(
    r'(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+(?:\([^()\s]*\)[^()\s]*)*)(?:\s+"([^"]*)")?\)'
)
CODE = re.compile(r"(```.*?```|~~~.*?~~~|`[^`\n]+`)", re.DOTALL)
PAGES = "jupyter-book/pages/"  # staged at the top of the book
ROW = re.compile(r"^\|.*$", re.MULTILINE)  # of a table
TIMES = re.compile(r"(?<=\d) × (?=\d)")
KEY = re.compile(r"[a-z]+\d{4}[a-z0-9-]*")
# Comments for machines: they are left out of the page.
MARKS = re.compile(
    r"^[ \t]*# (?:BEGIN SOLUTION|END SOLUTION|NBVAL_\w+)[ \t]*\n?", re.MULTILINE
)


@dataclass
class Stage:
    """Where pages are put together, and what links may point to."""

    root: Path
    source: Path
    keys: frozenset[str]
    errors: list[str] = field(default_factory=list)

    def has_page(self, page: str) -> bool:
        """Whether the course has the notebook 'exercises/04-peft/05-lora.ipynb'."""
        return (self.root / page).is_file()

    def write(self, name: str, text: str) -> None:
        """Writes a page."""
        path = self.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def rewrite(text: str, change: Callable[[re.Match], str]) -> str:
    """Applies `change` to each Markdown link outside of code."""
    parts = CODE.split(text)  # text and code in turn, text first
    for i in range(0, len(parts), 2):
        parts[i] = LINK.sub(change, parts[i])
    return "".join(parts)


def whole_shapes(text: str) -> str:
    """Markdown whose tables keep `128 × 384` on one line, however narrow they are."""
    return ROW.sub(lambda row: TIMES.sub("\u00a0×\u00a0", row.group()), text)


def link(match: re.Match, page: str, stage: Stage) -> str:
    """What becomes of one link on `page` ('notebooks/04-peft/05-lora.ipynb')."""
    text, target, title = match.groups()
    if title and KEY.fullmatch(title):
        if title not in stage.keys:
            stage.errors.append(
                f"{page} cites {title!r},"
                " which is in none of jupyter-book/references/*.bib"
            )
        if re.search(r"\d{4}", text):  # the text names authors and year
            return f"{{cite:t}}`{title}`"
        return f"[{text}]({target}) {{cite:p}}`{title}`"
    if re.match(r"[a-z]+:|#|/", target):
        return match.group()
    path, _, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
    if path.startswith("work/"):
        path = "exercises/" + path.removeprefix("work/")
    if not stage.has_page(path):
        planned = [x for x in lessons() if f"/{x.slug}.ipynb" in f"/{path}"]
        if not planned:
            stage.errors.append(f"{page} links to {target}, which does not exist")
            return text
        path = f"parts/{planned[0].part}.md"
        anchor = ""
    elif path.startswith(PAGES):
        path = path.removeprefix(PAGES)
    elif not path.endswith((".ipynb", ".md")):
        copy_file(stage, path)
    back = _up(page, path)
    if anchor:
        back += f"#{anchor}"
    return f"[{text}]({back})"


def copy_file(stage: Stage, path: str) -> None:
    """A file that a page offers for download."""
    target = stage.source / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes((stage.root / path).read_bytes())


def picture(data: dict, size: dict, page: str, stage: Stage) -> str:
    """The figure as HTML, with a file of its own.

    It has its alternative text and its size, and stands in a box that can scroll.
    """
    content = b64decode(data["image/png"])
    name = f"_static/figures/{hashlib.sha256(content).hexdigest()[:16]}.png"
    path = stage.source / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    here = _up(page, name)
    alt = html.escape(size.get("alt", ""), quote=True)
    if not alt:
        stage.errors.append(
            f"{page} has a figure without alternative text:"
            " end its cell with figure(fig, alt=…)"
        )
    box = ""
    for side in ("width", "height"):
        if side in size:
            box += f' {side}="{size[side]}"'
    # 72 of 120 pixels per inch: text of 12 points keeps 9 points of CSS
    least = round(size.get("width", 0) * 0.6)
    return (
        '<figure class="llmlab-figure">'
        '<div class="llmlab-scroll" tabindex="0" role="group" aria-label="figure">'
        f'<img src="{here}" alt="{alt}"{box} style="min-width:{least}px"'
        ' loading="lazy">'
        "</div></figure>"
    )


def dress_output(output: NotebookNode, page: str, stage: Stage) -> None:
    """PNGs become accessible HTML, and views that need a kernel go."""
    data = output.get("data")
    if data is None:
        return
    data.pop(WIDGET, None)
    if "image/png" in data:
        size = output.metadata.pop("image/png", {})
        output["data"] = {"text/html": picture(data, size, page, stage)}


def prompt(cell: NotebookNode) -> None:
    """Names what a folded cell holds."""
    tags = cell.metadata.get("tags", [])
    for tag, what in (
        ("hide-input", "the code"),
        ("hide-output", "the answer"),
        ("hide-cell", "the code and what it prints"),
    ):
        if tag in tags:
            cell.metadata["mystnb"] = {
                "code_prompt_show": f"Show {what}",
                "code_prompt_hide": f"Hide {what}",
            }


def dress(nb: NotebookNode, page: str, stage: Stage) -> None:
    """Changes the staged copy of a notebook in place."""
    for cell in nb.cells:
        cell.attachments = None
        del cell["attachments"]
        if cell.cell_type == "markdown":
            cell.source = rewrite(cell.source, lambda match: link(match, page, stage))
            cell.source = whole_shapes(cell.source)
        if cell.cell_type == "code":
            cell.source = MARKS.sub("", cell.source)
            prompt(cell)
            for output in cell.outputs:
                dress_output(output, page, stage)
    nb.metadata.pop("widgets", None)
    nb.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}


def link_terms(nb: NotebookNode, linker: Linker) -> None:
    """Links each term of the glossary where the lesson first uses it."""
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = linker.link(cell.source)


def _up(page: str, target: str) -> str:
    """The way from one page to another."""
    return posixpath.relpath(target, posixpath.dirname(page))


def header(kind: str, lesson: Lesson, run: dict | None, stage: Stage) -> str:
    """The line under a page's title.

    It says what a run took, where the exercises are, and how to download the notebook.
    """
    page = f"{kind}/{lesson.slug}.ipynb"
    exercises = f"exercises/{lesson.slug}.ipynb"
    solutions = f"solutions/{lesson.slug}.ipynb"
    items = ""
    if run and kind != "notebooks":  # a lesson says so itself
        took = f"{run['seconds']:.0f} s, {run['memory_gib']:.1f} GiB"
        items += f"<span>Runs in {took}</span>"
    if kind == "notebooks" and stage.has_page(exercises):
        target = _up(page, exercises).replace(".ipynb", ".html")
        items += f'<a href="{target}">Exercises</a>'
    source = _up(page, f"_sources/{page}")
    items += f'<a href="{source}" download>Download the notebook</a>'
    bar = f'<div class="lesson-bar">{items}</div>'
    if kind == "exercises":
        answers = ""
        if stage.has_page(solutions):
            answers = f"[Worked solutions]({_up(page, solutions)}) are one click away; "
        text = (
            f"This page cannot run code. Type `llmlab lab`, open"
            f" `work/{lesson.slug}.ipynb` and fill in the cells; each is marked at"
            " once. Stuck? `check.hint(…)` gives one hint at a time."
            f" {answers}try first."
        )
        return f"{bar}\n\n{_admonition('Yours to solve', 'tip', text)}"
    if kind == "solutions":
        text = (
            f"This page answers the [exercises of this lesson]({_up(page, exercises)})."
            " You learn more if you have tried them first."
        )
        return f"{bar}\n\n{_admonition('Solutions: spoilers ahead', 'warning', text)}"
    return bar


def _admonition(title: str, style: str, text: str) -> str:
    """A box with a title, as MyST writes it."""
    return f":::{{admonition}} {title}\n:class: {style}\n{text}\n:::"


def stage_notebook(kind: str, lesson: Lesson, run: dict | None, stage: Stage) -> None:
    """Puts one notebook of the lesson into the staging folder.

    `kind` is 'notebooks', 'exercises' or 'solutions'.
    """
    page = f"{kind}/{lesson.slug}.ipynb"
    nb = nbformat.read(stage.root / page, as_version=4)
    dress(nb, page, stage)
    glossary = stage.root / GLOSSARY
    if kind == "notebooks" and glossary.is_file():
        link_terms(nb, Linker(glossary, lesson.slug))
    first = next((i for i, c in enumerate(nb.cells) if c.cell_type == "markdown"), 0)
    opening = nb.cells[first]
    bar = nbformat.v4.new_markdown_cell(header(kind, lesson, run, stage))
    nb.cells.insert(first + 1, bar)
    if kind == "solutions" and opening.source.startswith("# "):
        title, _, rest = opening.source.removeprefix("# ").partition("\n")
        if "solution" not in title.lower():
            title = re.sub("^Exercises?:? *", "", title)
            opening.source = f"# Solutions: {title}\n{rest}"
    stage.write(page, nbformat.writes(nb))


def first_slider(path: Path) -> str | None:
    """The HTML of the first slider figure in a notebook, for the landing page."""
    if not path.is_file():
        return None
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            text = output.get("data", {}).get("text/html", "")
            if 'class="llmlab-explore"' in text and '<input type="range"' in text:
                return text
    return None
