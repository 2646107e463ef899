"""`llmlab peer`: real systems in environments of their own.

What it does is in `llmlab.course.peers`.
"""

from __future__ import annotations

from typing import Annotated

import typer

from llmlab.course.cli.base import stop


def peer(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="which one; --list shows them", show_default=False
        ),
    ] = None,
    list_all: Annotated[
        bool, typer.Option("--list", help="all of them, and which are here")
    ] = False,
    remove: Annotated[
        bool, typer.Option("--remove", help="delete it from your cache")
    ] = False,
) -> None:
    """Make the environment of a real system, such as Triton's server.

    Some lessons compare with systems whose requirements do not go together with the
    course's. Each gets an environment of its own, in your cache.
    """
    from llmlab.course import peers

    if name is None or list_all:
        if remove:
            stop("--remove needs a NAME", 2)
        _print_list()
        return
    try:
        known = peers.find(name)
    except ValueError as error:
        stop(error, 2)
    if remove:
        found = peers.remove(name)
        for path in found:
            typer.echo(f"removed {path}")
        if not found:
            typer.echo(f"{name} is not here")
        return
    try:
        if not peers.is_made(name):
            peers.check_machine(known)
            typer.echo(
                f"{known.title}: {size(known.megabytes)}, about"
                f" {minutes(known.seconds)}, in {peers.folder(name)}"
            )
        inside = peers.make(name)
    except peers.PeerError as error:
        stop(error, 1)
    typer.echo(f"{name} is here: {inside}\n\n{peers.how_to_use(name)}")


def _print_list() -> None:
    from llmlab.course import peers

    for name, known in peers.peers().items():
        here = "here" if peers.is_made(name) else size(known.megabytes)
        typer.echo(f"{name:18} {here:>7}  {known.title}")
    typer.echo(
        "\n`llmlab peer NAME` makes one and says how to start it; --remove deletes it."
    )


def size(megabytes: float) -> str:
    """'340 MB', '3.5 GB'."""
    return f"{megabytes} MB" if megabytes < 1000 else f"{megabytes / 1000:.1f} GB"


def minutes(seconds: float) -> str:
    """'a minute', '10 minutes'."""
    count = max(1, round(seconds / 60))
    return "a minute" if count == 1 else f"{count} minutes"
