"""The pages of the book that are made from data: the map, the parts, coverage, and what
was verified when.
"""

from __future__ import annotations

import csv
import html
import json
from itertools import groupby
from pathlib import Path

import yaml

from llmlab.course.syllabus import DATA, PARTS, Lesson, lessons

SEED = "https://github.com/liguodongiot/llm-action"


def part_texts(root: Path) -> dict[str, str]:
    """One sentence for each part."""
    return yaml.safe_load(
        (root / "jupyter-book" / "parts.yml").read_text(encoding="utf-8")
    )


def toc(built: list[Lesson], root: Path) -> dict:
    """`_toc.yml`: parts, their lessons, and under each lesson its exercises and
    solutions.
    """
    parts = []
    for number, (part, title) in enumerate(PARTS.items(), 1):
        chapters = [{"file": f"parts/{part}", "title": "Overview"}]
        for lesson in (x for x in built if x.part == part):
            below = [
                {"file": f"{k}/{lesson.slug}"}
                for k in ("exercises", "solutions")
                if _is(root, k, lesson)
            ]
            chapters.append(
                {"file": f"notebooks/{lesson.slug}"}
                | ({"sections": below} if below else {})
            )
        parts.append({"caption": f"{number}. {title}", "chapters": chapters})
    reference = [
        {"file": name}
        for name in (
            "run",
            "contribute",
            "glossary",
            "bibliography",
            "published",
            "coverage",
            "verified",
        )
    ]
    return {
        "format": "jb-book",
        "root": "index",
        "parts": [*parts, {"caption": "Reference", "chapters": reference}],
    }


def _is(root: Path, kind: str, lesson: Lesson) -> bool:
    return (root / kind / f"{lesson.slug}.ipynb").is_file()


def course_map(built: list[Lesson], root: Path) -> str:
    """The map of the course on the landing page: a card for each part, a line for each
    lesson.
    """
    texts, have = part_texts(root), {x.slug for x in built}
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
    for lesson in (x for x in lessons() if x.part == part):
        name = (
            lesson.title
            if lesson.slug not in have
            else f"[{lesson.title}](../notebooks/{lesson.slug}.ipynb)"
        )
        state = "" if lesson.slug in have else ' <span class="tag">planned</span>'
        lines += [
            f'<div class="lesson-card{"" if lesson.slug in have else " planned"}">',
            "",
            (
                f'<span class="lesson-number">{int(lesson.topic[:2])}</span>'
                f" **{name}**{state}"
            ),
            "",
            f"Teaches: {_inline(lesson.teaches)}.",
            "",
            f"You will see: {_inline(lesson.aha)}.",
            "",
            (
                f"Checked against: {_inline(lesson.against)}."
                if lesson.against.strip("–- ")
                else ""
            ),
            "",
            "</div>",
            "",
        ]
    return "\n".join(lines)


def _inline(text: str) -> str:
    """Plain text as Markdown that says the same."""
    for mark in "\\`*_[]<>$|":
        text = text.replace(mark, "\\" + mark)
    return text.rstrip(".")


def coverage(built: list[Lesson]) -> str:
    """Each row of the index that the course follows, and the lesson that covers it."""
    have, by_slug = {x.slug for x in built}, {x.slug: x for x in lessons()}
    with (DATA / "index.csv").open(encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    done = sum(row["lesson"] in have for row in rows)
    lines = [
        (
            f"{done} of {len(rows)} rows are covered by a lesson that is built; the"
            " others by one that is planned."
        ),
        "",
    ]
    for section, group in groupby(rows, key=lambda row: row["section"]):
        lines += [f"## {section}", "", "| topic | lesson | state |", "|---|---|---|"]
        for row in group:
            lesson = by_slug[row["lesson"]]
            link = f"[{lesson.title}](notebooks/{lesson.slug}.ipynb)"
            link = (
                link
                if lesson.slug in have
                else f"[{lesson.title}](parts/{lesson.part}.md)"
            )
            lines.append(
                f"| {_inline(row['row'])} | {link} |"
                f" {'built' if lesson.slug in have else 'planned'} |"
            )
        lines.append("")
    return "\n".join(lines)


def verified(runs: dict[str, dict], built: list[Lesson], root: Path) -> str:
    """What each notebook took when it last ran, with which versions, and on which
    CPU.
    """
    lines = ["| notebook | last run | seconds | GiB | CPU |", "|---|---|--:|--:|---|"]
    known = [
        (k, x)
        for x in built
        for k in ("notebooks", "solutions")
        if f"{k}/{x.slug}" in runs and _is(root, k, x)
    ]
    for kind, lesson in known:
        run = runs[f"{kind}/{lesson.slug}"]
        name = lesson.title if kind == "notebooks" else f"{lesson.title}: solutions"
        lines.append(
            f"| [{name}]({kind}/{lesson.slug}.ipynb) | {run['date']} |"
            f" {run['seconds']:.1f} | {run['memory_gib']:.2f} | {_inline(_cpu(run))} |"
        )
    versions: dict[str, set[str]] = {}
    for kind, lesson in known:
        for library, version in runs[f"{kind}/{lesson.slug}"]["versions"].items():
            versions.setdefault(library, set()).add(version)
    lines += ["", "## Versions", "", "| library | version |", "|---|---|"]
    lines += [
        f"| {library} | {', '.join(sorted(found))} |"
        for library, found in sorted(versions.items())
    ]
    return "\n".join(lines)


def _cpu(run: dict) -> str:
    """The CPU of a run, its vector instructions and torch's choice, as far as
    recorded.
    """
    if not run.get("cpu"):
        return "not recorded"
    has = ", ".join(run.get("flags", []))
    used = run.get("capability", "")
    torch = f"; torch: {used}" if used else ""
    return f"{run['cpu']}{f' ({has}{torch})' if has or torch else ''}"


def start(built: list[Lesson]) -> str:
    """The two ways to begin."""
    first = (
        f'<a class="button primary" href="notebooks/{built[0].slug}.html">Start with'
        " lesson 1</a>"
        if built
        else ""
    )
    run = '<a class="button" href="run.html">Run it on your machine</a>'
    return f'<div class="hero-actions">{first}{run}</div>'


def facts(runs: dict[str, dict], built: list[Lesson], root: Path) -> str:
    """Three numbers for the landing page, all counted."""
    ran = [runs[f"notebooks/{x.slug}"] for x in built if f"notebooks/{x.slug}" in runs]
    tags = [
        c["metadata"].get("tags", [])
        for x in built
        for c in _cells(root / "exercises" / f"{x.slug}.ipynb")
    ]
    found = [(f"{len(built)} of {len(lessons())}", "lessons are built")]
    found.append(
        (str(sum("check" in t for t in tags)), "exercises that mark themselves")
    )
    if ran:
        found.append(
            (
                f"{max(r['seconds'] for r in ran):.0f} s",
                "is the longest a lesson takes on two cores",
            )
        )
    found.append(("0", "GPUs needed"))
    items = "".join(
        f"<li><strong>{number}</strong> {html.escape(text)}</li>"
        for number, text in found
    )
    return f'<ul class="facts">{items}</ul>'


def _cells(path: Path) -> list[dict]:
    return (
        json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else []
    )
