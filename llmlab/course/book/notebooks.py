"""How a notebook becomes a page of the book: links, citations, figures with alternative
text, banners.

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

from llmlab.course.book.verified import WIDGET
from llmlab.course.syllabus import Lesson, lessons

LINK = re.compile(
    r'(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+(?:\([^()\s]*\)[^()\s]*)*)(?:\s+"([^"]*)")?\)'
)
CODE = re.compile(r"(```.*?```|~~~.*?~~~|`[^`\n]+`)", re.DOTALL)
KEY = re.compile(r"[a-z]+\d{4}[a-z0-9-]*")
# for machines
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
    parts = CODE.split(text)
    return "".join(
        part if i % 2 else LINK.sub(change, part) for i, part in enumerate(parts)
    )


def link(match: re.Match, page: str, stage: Stage) -> str:
    """What becomes of one link on `page` ('notebooks/04-peft/05-lora.ipynb')."""
    text, target, title = match.groups()
    if title and KEY.fullmatch(title):
        if title not in stage.keys:
            stage.errors.append(
                f"{page} cites {title!r}, which is in none of"
                " jupyter-book/references/*.bib"
            )
        return (
            f"{{cite:t}}`{title}`"
            if re.search(r"\d{4}", text)
            else f"[{text}]({target}) {{cite:p}}`{title}`"
        )
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
        path, anchor = f"parts/{planned[0].part}.md", ""
    elif not path.endswith((".ipynb", ".md")):
        copy_file(stage, path)
    back = posixpath.relpath(path, posixpath.dirname(page))
    return f"[{text}]({back}{'#' + anchor if anchor else ''})"


def copy_file(stage: Stage, path: str) -> None:
    """A file that a page offers for download."""
    target = stage.source / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes((stage.root / path).read_bytes())


def picture(data: dict, size: dict, page: str, stage: Stage) -> str:
    """The figure as HTML: a file of its own, its alternative text, its size, and a box
    that can scroll.
    """
    content = b64decode(data["image/png"])
    name = f"_static/figures/{hashlib.sha256(content).hexdigest()[:16]}.png"
    path = stage.source / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    here = posixpath.relpath(name, posixpath.dirname(page))
    alt = html.escape(size.get("alt", ""), quote=True)
    if not alt:
        stage.errors.append(
            f"{page} has a figure without alternative text: end its cell with"
            " figure(fig, alt=…)"
        )
    box = "".join(
        f' {side}="{size[side]}"' for side in ("width", "height") if side in size
    )
    # 72 of 120 pixels an inch: text of 12 points keeps 9 points of CSS
    least = round(size.get("width", 0) * 0.6)
    return (
        '<figure class="llmlab-figure"><div class="llmlab-scroll" tabindex="0"'
        f' role="group" aria-label="figure"><img src="{here}" alt="{alt}"{box}'
        f' style="min-width:{least}px" loading="lazy"></div></figure>'
    )


def dress_output(output: NotebookNode, page: str, stage: Stage) -> None:
    """PNGs become accessible HTML, and views that need a kernel go."""
    data = output.get("data")
    if data is None:
        return
    data.pop(WIDGET, None)
    if "image/png" in data:
        output["data"] = {
            "text/html": picture(
                data, output.metadata.get("image/png", {}), page, stage
            )
        }
        output.metadata.pop("image/png", None)


def dress(nb: NotebookNode, page: str, stage: Stage) -> None:
    """Changes the staged copy of a notebook in place."""
    for cell in nb.cells:
        cell.attachments = None
        del cell["attachments"]
        if cell.cell_type == "markdown":
            cell.source = rewrite(cell.source, lambda match: link(match, page, stage))
        if cell.cell_type == "code":
            cell.source = MARKS.sub("", cell.source)
            for output in cell.outputs:
                dress_output(output, page, stage)
    nb.metadata.pop("widgets", None)
    nb.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}


def _up(page: str, target: str) -> str:
    return posixpath.relpath(target, posixpath.dirname(page))


def header(kind: str, lesson: Lesson, run: dict | None, stage: Stage) -> str:
    """The line under a page's title: where it runs, what it took, where its exercises
    are.
    """
    page = f"{kind}/{lesson.slug}.ipynb"
    download = (
        f'<a href="{_up(page, "_sources/" + page)}" download>Download the notebook</a>'
    )
    took = (
        f"<span>Runs in {run['seconds']:.0f} s, {run['memory_gib']:.1f} GiB</span>"
        if run
        else ""
    )
    exercises, solutions = (
        f"{k}/{lesson.slug}.ipynb" for k in ("exercises", "solutions")
    )
    links = []
    if kind == "notebooks" and stage.has_page(exercises):
        links.append(
            f'<a href="{_up(page, exercises).replace(".ipynb", ".html")}">Exercises</a>'
        )
    bar = f'<div class="lesson-bar">{took}{"".join(links)}{download}</div>'
    if kind == "exercises":
        answers = (
            f"[Worked solutions]({_up(page, solutions)}) are one click away; "
            if stage.has_page(solutions)
            else ""
        )
        return (
            f"{bar}\n\n:::{{admonition}} Yours to solve\n:class: tip\nThis page cannot"
            f" run code. Type `llmlab lab`, open `work/{lesson.slug}.ipynb` and fill in"
            " the cells; each is marked at once. Stuck? `check.hint(…)` gives one hint"
            f" at a time. {answers}try first.\n:::"
        )
    if kind == "solutions":
        return (
            f"{bar}\n\n:::{{admonition}} Solutions: spoilers ahead\n:class:"
            " warning\nThis page answers the [exercises of this"
            f" lesson]({_up(page, exercises)}). You learn more if you have tried them"
            " first.\n:::"
        )
    return bar


def stage_notebook(kind: str, lesson: Lesson, run: dict | None, stage: Stage) -> None:
    """Puts `kind`/`lesson` ('notebooks', 'exercises' or 'solutions') into the staging
    folder.
    """
    page = f"{kind}/{lesson.slug}.ipynb"
    nb = nbformat.read(stage.root / page, as_version=4)
    dress(nb, page, stage)
    first = next((i for i, c in enumerate(nb.cells) if c.cell_type == "markdown"), 0)
    nb.cells.insert(
        first + 1, nbformat.v4.new_markdown_cell(header(kind, lesson, run, stage))
    )
    if kind == "solutions" and nb.cells[first].source.startswith("# "):
        title, _, rest = nb.cells[first].source.partition("\n")
        if "solution" not in title.lower():
            nb.cells[
                first
            ].source = (
                f"# Solutions: {re.sub('^Exercises?:? *', '', title[2:])}\n{rest}"
            )
    stage.write(page, nbformat.writes(nb))


def first_slider(path: Path) -> str | None:
    """The HTML of the first slider figure in a notebook, for the landing page."""
    if not path.is_file():
        return None
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            text = output.get("data", {}).get("text/html", "")
            if 'class="llmlab-explore"' in text and 'type="range"' in text:
                return text
    return None
