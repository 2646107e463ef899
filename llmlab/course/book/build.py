"""Builds the book from the notebooks as they are: `python -m llmlab.course.book.build`.

Nothing is executed. Whatever lessons exist are staged with the pages that are made from
data, and Jupyter Book turns them into HTML, warnings being errors. What the pages need
(MathJax, scripts, fonts) is copied beside them.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import yaml

from llmlab.course.book import pages, published, recomputation, rooms
from llmlab.course.book.notebooks import Stage, first_slider, rewrite, stage_notebook
from llmlab.course.book.notebooks import link as rewrite_link
from llmlab.course.book.verified import Records
from llmlab.course.syllabus import PARTS, Lesson, built_lessons, course_root

KINDS = ("notebooks", "exercises", "solutions")
STATIC_PAGES = (
    "index",
    "run",
    "contribute",
    "glossary",
    "bibliography",
    "published",
    "coverage",
    "verified",
)


class BookError(Exception):
    """The book cannot be built; the message says why and what to do."""


def build(root: Path | None = None, *, verbose: bool = False) -> Path:
    """Builds the book and returns the folder with its `index.html`.

    Raises:
        BookError: a link, a citation or a reference is wrong, a tool is missing, or
            Jupyter Book warned.
    """
    root = root or course_root()
    home = root / "jupyter-book"
    source = home / "_build" / "source"
    out = home / "_build" / "html"
    shutil.rmtree(home / "_build", ignore_errors=True)
    stage = prepare(root, source)
    if stage.errors:
        raise BookError("\n".join(stage.errors))
    run_main = (
        "from llmlab.course.grammar import leave_out_grammar; leave_out_grammar();"
        " from jupyter_book.cli.main import main; main()"
    )
    command = [sys.executable, "-c", run_main, "build", str(source)]
    command += ["--path-output", str(home)]
    command += ["-n", "-W", "--keep-going", "--all"]
    if not verbose:
        command.append("-q")
    done = subprocess.run(
        command, cwd=root, capture_output=not verbose, text=True, env=_environment()
    )
    if done.returncode or not (out / "index.html").is_file():
        raise BookError(f"Jupyter Book failed or warned:\n{_complaints(done)}")
    return out


def prepare(root: Path, source: Path) -> Stage:
    """Puts everything that Jupyter Book needs into `source`."""
    keys = references(root)
    stage = Stage(root, source, frozenset(keys))
    runs = latest_runs(root)
    built = [x for x in built_lessons(root) if x.notebook(root).is_file()]
    stage.write("_toc.yml", yaml.safe_dump(pages.toc(built, root), sort_keys=False))
    stage.write("_config.yml", config(root))
    for lesson in built:
        for kind in KINDS:
            if (root / kind / f"{lesson.slug}.ipynb").is_file():
                stage_notebook(kind, lesson, runs.get(f"{kind}/{lesson.slug}"), stage)
    for part in PARTS:
        stage.write(f"parts/{part}.md", pages.part_page(part, built, root))
    behind = [pages.BEHIND[x.slug] for x in built if x.slug in pages.BEHIND]
    for name in (*STATIC_PAGES, *behind):
        path = root / "jupyter-book" / "pages" / f"{name}.md"
        stage.write(f"{name}.md", fill(path, stage, built, runs))
    copy_static(root, source)
    return stage


def fill(path: Path, stage: Stage, built: list[Lesson], runs: dict) -> str:
    """A hand-written page with its `<!-- llmlab:… -->` marks filled from data."""
    makers = {
        "map": lambda: pages.course_map(built, stage.root),
        "start": lambda: pages.start(built),
        "facts": lambda: pages.facts(runs, built, stage.root),
        "slider": lambda: slider(stage.root, built),
        "published": published.page,
        "recomputation-counted": recomputation.counted,
        "recomputation-large": recomputation.large,
        "recomputation-price": recomputation.price,
        "coverage": lambda: pages.coverage(built),
        "contributing": lambda: contributing(stage.root),
        "rooms": rooms.section,
        "verified": lambda: pages.verified(runs, built, stage.root),
    }
    text = path.read_text(encoding="utf-8")
    # A page is staged at the top of the book, two folders above its source.
    text = text.replace("](../../", "](")
    text = rewrite(text, lambda match: rewrite_link(match, f"{path.stem}.md", stage))
    for name, make in makers.items():
        mark = f"<!-- llmlab:{name} -->"
        if mark in text:
            text = text.replace(mark, make())
    return text


def contributing(root: Path) -> str:
    """CONTRIBUTING.md without its title."""
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.split("\n", 1)[1].strip()


def slider(root: Path, built: list[Lesson]) -> str:
    """A figure that moves, taken from a lesson, for the landing page."""

    def preference(lesson: Lesson) -> tuple[bool, bool, str]:
        """LoRA's figure first, those of part 1 last."""
        is_lora = lesson.slug == "04-peft/05-lora"
        return (not is_lora, lesson.part == "01-start", lesson.slug)

    for lesson in sorted(built, key=preference):
        found = first_slider(lesson.notebook(root))
        if found:
            link = f'<a href="notebooks/{lesson.slug}.html">{lesson.title}</a>'
            origin = f"From the lesson {link}. Move the slider."
            return (
                f'<div class="hero-figure">{found}'
                f'<p class="hero-from">{origin}</p></div>'
            )
    return ""


def latest_runs(root: Path) -> dict[str, dict]:
    """What each notebook took when it last ran.

    `make sync` records it; a test run on this machine is newer.
    """
    runs = Records(root).read()
    default = root / "build" / "verify" / "notebooks"
    folder = Path(os.environ.get("LLMLAB_RECORD", default))
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        run = runs.get(record["notebook"].removesuffix(".ipynb"))
        if run:
            run |= {
                "seconds": record["seconds"],
                "memory_gib": record["peak_mib"] / 1024,
                "date": record["date"],
            }
    return runs


def references(root: Path) -> dict[str, str]:
    """The file of each key in the bibliography.

    Raises:
        BookError: a key stands in two files, or a file cannot be read.
    """
    from pybtex.database import PybtexError, parse_file

    found: dict[str, str] = {}
    for path in sorted((root / "jupyter-book" / "references").glob("*.bib")):
        try:
            keys = list(parse_file(str(path), bib_format="bibtex").entries)
        except PybtexError as error:
            raise BookError(f"{path.name}: {error}") from None
        for key in keys:
            if key in found:
                raise BookError(
                    f"the key {key} stands in {found[key]} and in {path.name}: keep one"
                )
            found[key] = path.name
    return found


def config(root: Path) -> str:
    """`_config.yml` with the bibliography's files filled in."""
    text = (root / "jupyter-book" / "_config.yml").read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    files = sorted((root / "jupyter-book" / "references").glob("*.bib"))
    settings["bibtex_bibfiles"] = [f"references/{path.name}" for path in files]
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def copy_static(root: Path, source: Path) -> None:
    """Styles, logo and bibliography."""
    home = root / "jupyter-book"
    for name in ("_static", "references"):
        if (home / name).is_dir():
            shutil.copytree(home / name, source / name, dirs_exist_ok=True)


def _environment() -> dict[str, str]:
    if find_spec("mathjax") is None:
        cure = "pip install django-static-mathjax==3.2.2.1"
        raise BookError(f"MathJax is missing: {cure}")
    return os.environ | {"PYTHONWARNINGS": "ignore", "JUPYTER_PLATFORM_DIRS": "1"}


def _complaints(done: subprocess.CompletedProcess) -> str:
    lines = ((done.stdout or "") + (done.stderr or "")).splitlines()
    told = [line for line in lines if "WARNING" in line or "ERROR" in line]
    return "\n".join(told or lines[-40:])


def serve(folder: Path, port: int = 8000) -> None:
    """Serves the built book on this machine alone, until interrupted.

    Raises:
        BookError: the port is taken.
    """
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise BookError(
            f"port {port} cannot be used ({error.strerror}): choose another with --port"
        ) from None
    with server:
        print(f"The book is at http://127.0.0.1:{port}/ (Ctrl+C ends it).", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 1 when the book cannot be built."""
    parser = argparse.ArgumentParser(
        prog="python -m llmlab.course.book.build", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--serve",
        action="store_true",
        help="serve the book on this machine once it is built",
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--verbose", action="store_true", help="show what Jupyter Book says"
    )
    args = parser.parse_args(argv)
    try:
        wait = " It is served once it is built." if args.serve else ""
        print(f"Building the book: a minute or two.{wait}", flush=True)
        out = build(verbose=args.verbose)
        print(f"The book is in {out.relative_to(course_root())}.", flush=True)
        if args.serve:
            serve(out, args.port)
    except BookError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
