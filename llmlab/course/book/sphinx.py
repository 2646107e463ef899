"""A small Sphinx extension for the book.

Nothing comes from other hosts, downloads are the true files, and pages are accessible.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from sphinx.search import languages

from llmlab.course.book.searching import EnglishAndChinese
from llmlab.course.syllabus import course_root

# Jupyter Book always loads these; they reach for other hosts.
UNWANTED = ("sphinx_thebe", "sphinx_comments")

BETTER = (
    (r"<link[^>]*sphinx-thebe[^>]*>\n?", ""),
    (r'<div class="highlight"><pre>', '<div class="highlight"><pre tabindex="0">'),
    (
        r'<summary><span class="toctree-toggle"',
        '<summary aria-label="Pages below"><span class="toctree-toggle"',
    ),
    (r'(<div) role="list" (class="citation-list")', r"\1 \2"),
    (r' role="doc-biblioentry"', ""),
)


def setup(app) -> dict:
    """Called by Sphinx."""
    languages["en"] = EnglishAndChinese
    for name, listeners in app.events.listeners.items():
        app.events.listeners[name] = [
            x for x in listeners if not x.handler.__module__.startswith(UNWANTED)
        ]
    app.connect("html-page-context", describe, priority=900)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def describe(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Adds the page's title and first paragraph for search and sharing.

    There is no image from another host.
    """
    if doctree is None:
        return
    from docutils import nodes

    text = ""
    for paragraph in doctree.findall(nodes.paragraph):
        if len(paragraph.astext()) > 40:  # shorter ones are labels
            text = paragraph.astext()
            break
    text = re.sub(r"\s+", " ", text).replace('"', "'")[:200]
    title = re.sub(r"<[^>]+>", "", context.get("title", ""))
    tags = [
        f'<meta name="description" content="{text}">',
        f'<meta property="og:title" content="{title}">',
        '<meta property="og:type" content="article">',
        '<meta property="og:site_name" content="llmlab">',
        f'<meta property="og:description" content="{text}">',
        '<meta name="twitter:card" content="summary">',
    ]
    lines = [context.get("metatags", ""), *tags, ""]
    context["metatags"] = "\n".join(lines)


def finish(app, exception: Exception | None) -> None:
    """Offers each notebook as it is in the course, not as it was staged.

    What no page uses is removed.
    """
    if exception or app.builder.name != "html":
        return
    out = Path(app.outdir)
    root = course_root(Path(app.srcdir))
    for staged in sorted((out / "_sources").rglob("*.ipynb")):
        original = root / staged.relative_to(out / "_sources")
        if original.is_file():
            shutil.copyfile(original, staged)
    mathjax(out / "_static" / "mathjax")
    for unused in [*out.glob("_static/sphinx-thebe.*"), *out.glob("_sources/**/*.md")]:
        unused.unlink()
    for page in out.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        page.write_text(tidy(text), encoding="utf-8")


def mathjax(target: Path) -> None:
    """Copies MathJax for TeX input and HTML output from its package.

    They do not go through the staged `_static`: Jupyter Book would load each script
    there on each page.
    """
    import mathjax as package

    es5 = Path(package.__file__).parent / "static" / "mathjax" / "es5"
    unused = shutil.ignore_patterns(
        "sre", "node-main.js", "*svg*", "mml-chtml.js", "*-full*.js", "latest.js"
    )
    shutil.copytree(es5, target, ignore=unused, dirs_exist_ok=True)


def tidy(text: str) -> str:
    """Mends what the theme gets wrong for keyboards and screen readers."""
    for pattern, better in BETTER:
        text = re.sub(pattern, better, text)
    return text
