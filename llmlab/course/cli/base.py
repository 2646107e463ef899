"""What the commands of `llmlab` share: their arguments, and how they end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

Topic = Annotated[
    str, typer.Argument(help="a lesson, as in 01-welcome", show_default=False)
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="also write the result as JSON ('-': to stdout, alone)",
    ),
]


def stop(message: object, code: int) -> NoReturn:
    """Says why on stderr, and ends with `code`."""
    typer.echo(f"llmlab: {message}", err=True)
    raise typer.Exit(code)


def lesson_and_root(topic: str):
    """The lesson called `topic`, and the course's folder; exits with 2 if none."""
    from llmlab.course.syllabus import course_root, find

    try:
        return find(topic), course_root()
    except (ValueError, FileNotFoundError) as error:
        stop(error, 2)


def write(path: Path, text: str) -> None:
    """Writes a result; '-' is stdout."""
    from llmlab.course.files import write_atomically

    if str(path) == "-":
        sys.stdout.write(text)
        return
    try:
        write_atomically(path, text)
    except OSError as error:
        stop(f"{path} cannot be written ({error.strerror or error})", 1)
