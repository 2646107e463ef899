"""The pages of the book that are made from data.

The map of the course, the parts, coverage, and what was verified when.
"""

from __future__ import annotations

import csv
import html
import json
from itertools import groupby
from pathlib import Path

import yaml

from llmlab.course.syllabus import DATA, PARTS, Lesson, lessons

# The pages at the end of the table of contents.
REFERENCE = (
    "run",
    "contribute",
    "glossary",
    "bibliography",
    "published",
    "coverage",
    "verified",
)
# Pages that stand behind a lesson, where its thread would be cut.
BEHIND = {"05-parallelism/06-sequence": "recomputation"}
SEED = "https://github.com/liguodongiot/llm-action"


def part_texts(root: Path) -> dict[str, str]:
    """One sentence for each part."""
    text = (root / "jupyter-book" / "parts.yml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def toc(built: list[Lesson], root: Path) -> dict:
    """`_toc.yml`: the parts, and their lessons with exercises and solutions below."""
    parts = []
    for number, (part, title) in enumerate(PARTS.items(), 1):
        chapters: list[dict] = [{"file": f"parts/{part}", "title": "Overview"}]
        for lesson in built:
            if lesson.part != part:
                continue
            chapter: dict = {"file": f"notebooks/{lesson.slug}"}
            below = []
            for kind in ("exercises", "solutions"):
                if _is(root, kind, lesson):
                    below.append({"file": f"{kind}/{lesson.slug}"})
            if below:
                chapter["sections"] = below
            chapters.append(chapter)
            if lesson.slug in BEHIND:
                chapters.append({"file": BEHIND[lesson.slug]})
        parts.append({"caption": f"{number}. {title}", "chapters": chapters})
    reference = [{"file": name} for name in REFERENCE]
    parts.append({"caption": "Reference", "chapters": reference})
    return {"format": "jb-book", "root": "index", "parts": parts}


def _is(root: Path, kind: str, lesson: Lesson) -> bool:
    return (root / kind / f"{lesson.slug}.ipynb").is_file()


def course_map(built: list[Lesson], root: Path) -> str:
    """The map of the course on the landing page.

    It has a card for each part and a line for each lesson.
    """
    texts = part_texts(root)
    have = {x.slug for x in built}
    cards = []
    for number, (part, title) in enumerate(PARTS.items(), 1):
        own = [x for x in lessons() if x.part == part]
        items = "".join(_map_item(x, x.slug in have) for x in own)
        badge = f'<span class="map-number">{number}</span>'
        link = f'<a href="parts/{part}.html">{badge} {html.escape(title)}</a>'
        cards.append(
            f'<li class="map-card" data-part="{number}"><h3>{link}</h3>'
            f"<p>{html.escape(texts[part])}</p><ol>{items}</ol></li>"
        )
    return f'<ul class="course-map">{"".join(cards)}</ul>'


def _map_item(lesson: Lesson, is_built: bool) -> str:
    title = html.escape(lesson.title)
    if is_built:
        return f'<li><a href="notebooks/{lesson.slug}.html">{title}</a></li>'
    return f'<li class="planned">{title} <span class="tag">planned</span></li>'


def part_page(part: str, built: list[Lesson], root: Path) -> str:
    """What a part is about, and each of its lessons, built or planned."""
    have = {x.slug for x in built}
    lines = [f"# {PARTS[part]}", "", part_texts(root)[part], ""]
    for lesson in lessons():
        if lesson.part == part:
            lines += _card(lesson, lesson.slug in have)
    return "\n".join(lines)


def _card(lesson: Lesson, is_built: bool) -> list[str]:
    """The lines about one lesson on the page of its part."""
    style = "lesson-card" if is_built else "lesson-card planned"
    number = f'<span class="lesson-number">{int(lesson.topic[:2])}</span>'
    if is_built:
        title = f"**[{lesson.title}](../notebooks/{lesson.slug}.ipynb)**"
    else:
        title = f'**{lesson.title}** <span class="tag">planned</span>'
    against = ""
    if lesson.against.strip("–- "):
        against = f"Checked against: {_inline(lesson.against)}."
    return [
        f'<div class="{style}">',
        "",
        f"{number} {title}",
        "",
        f"Teaches: {_inline(lesson.teaches)}.",
        "",
        f"You will see: {_inline(lesson.aha)}.",
        "",
        against,
        "",
        "</div>",
        "",
    ]


def _inline(text: str) -> str:
    """Plain text as Markdown that says the same."""
    for mark in "\\`*_[]<>$|":
        text = text.replace(mark, "\\" + mark)
    return text.rstrip(".")


def coverage(built: list[Lesson]) -> str:
    """Each row of the index that the course follows, and the lesson that covers it.

    First the rows whose lesson can be read, then those whose lesson is planned, both in
    the sections of the index.
    """
    have = {x.slug for x in built}
    with (DATA / "index.csv").open(encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    done = [row for row in rows if row["lesson"] in have]
    planned = [row for row in rows if row["lesson"] not in have]
    summary = (
        f"{len(done)} of {len(rows)} rows are covered by a lesson that is built;"
        " the others by one that is planned."
    )
    lines = [summary, ""]
    if done:
        lines += ["## Built", "", *_sections(done, "built")]
    if planned:
        lines += ["## Planned", "", *_sections(planned, "planned")]
    return "\n".join(lines)


def _sections(rows: list[dict[str, str]], state: str) -> list[str]:
    """A table for each section of the index."""
    by_slug = {x.slug: x for x in lessons()}
    lines = []
    for section, group in groupby(rows, key=lambda row: row["section"]):
        lines += [f"### {section}", "", "| topic | lesson | state |", "|---|---|---|"]
        for row in group:
            lesson = by_slug[row["lesson"]]
            target = f"parts/{lesson.part}.md"
            if state == "built":
                target = f"notebooks/{lesson.slug}.ipynb"
            link = f"[{lesson.title}]({target})"
            lines.append(f"| {_inline(row['row'])} | {link} | {state} |")
        lines.append("")
    return lines


def verified(runs: dict[str, dict], built: list[Lesson], root: Path) -> str:
    """What each notebook took when it last ran, on which CPU, and the versions used."""
    lines = ["| notebook | last run | seconds | GiB | CPU |", "|---|---|--:|--:|---|"]
    versions: dict[str, set[str]] = {}
    for lesson in built:
        for kind in ("notebooks", "solutions"):
            page = f"{kind}/{lesson.slug}"
            if page not in runs or not _is(root, kind, lesson):
                continue
            run = runs[page]
            name = lesson.title if kind == "notebooks" else f"{lesson.title}: solutions"
            numbers = f"{run['seconds']:.1f} | {run['memory_gib']:.2f}"
            lines.append(
                f"| [{name}]({page}.ipynb) | {run['date']} | {numbers}"
                f" | {_inline(_cpu(run))} |"
            )
            for library, version in run["versions"].items():
                versions.setdefault(library, set()).add(version)
    lines += ["", "## Versions", "", "| library | version |", "|---|---|"]
    for library, found in sorted(versions.items()):
        lines.append(f"| {library} | {', '.join(sorted(found))} |")
    return "\n".join(lines)


def _cpu(run: dict) -> str:
    """The CPU of a run, its vector instructions and what torch chose, if recorded."""
    if not run.get("cpu"):
        return "not recorded"
    details = ", ".join(run.get("flags", []))
    if run.get("capability"):
        details += f"; torch: {run['capability']}"
    return f"{run['cpu']} ({details})" if details else run["cpu"]


def start(built: list[Lesson]) -> str:
    """The two ways to begin."""
    first = ""
    if built:
        target = f"notebooks/{built[0].slug}.html"
        first = f'<a class="button primary" href="{target}">Start with lesson 1</a>'
    run = '<a class="button" href="run.html">Run it on your machine</a>'
    return f'<div class="hero-actions">{first}{run}</div>'


def facts(runs: dict[str, dict], built: list[Lesson], root: Path) -> str:
    """Three numbers for the landing page, all counted."""
    ran = [runs[f"notebooks/{x.slug}"] for x in built if f"notebooks/{x.slug}" in runs]
    checks = 0
    for lesson in built:
        for cell in _cells(root / "exercises" / f"{lesson.slug}.ipynb"):
            checks += "check" in cell["metadata"].get("tags", [])
    found = [
        (f"{len(built)} of {len(lessons())}", "lessons are built"),
        (f"{checks}", "exercises that mark themselves"),
    ]
    if ran:
        longest = max(run["seconds"] for run in ran)
        found.append((f"{longest:.0f} s", "is the longest a lesson takes on two cores"))
    found.append(("0", "GPUs needed"))
    items = ""
    for number, text in found:
        items += f"<li><strong>{number}</strong> {html.escape(text)}</li>"
    return f'<ul class="facts">{items}</ul>'


def _cells(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    return json.loads(path.read_text(encoding="utf-8"))["cells"]
