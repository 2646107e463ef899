"""`llmlab serve`: a model behind OpenAI's paths, with a chat page.

The server is `llmlab.inference.serving`; `served` says what it serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import sys
import time
from typing import Annotated, Any

import typer

from llmlab.course.cli.base import stop

NOT_FETCHED = ". Or serve the small model of the course: --model course"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="smollm2 (the real model: llmlab model fetch), course (the small one, at"
        " hand), a Llama's folder, or an engine's that `build` wrote",
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=DIR",
        help="LoRA, as peft or the course writes it; may be given several times",
    ),
]
Mine = Annotated[
    bool,
    typer.Option(
        "--mine",
        help="with your own functions where they passed: exercises of 07-inference,"
        " lessons 03, 04 and 05; a table says whose each is",
    ),
]
Host = Annotated[
    str, typer.Option(help="the address to listen on; by default this machine alone")
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")]
Length = Annotated[
    int, typer.Option(min=2, help="tokens of a request, prompt and answer")
]
NewTokens = Annotated[int, typer.Option(min=1, help="tokens of an answer")]
Sequences = Annotated[int, typer.Option(min=1, help="requests that run at one time")]
Queue = Annotated[int, typer.Option(min=0, help="requests that may wait besides")]
Seconds = Annotated[float, typer.Option(min=1, help="that an answer may take")]
CacheTokens = Annotated[
    int, typer.Option(min=16, help="that keys and values have room for")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="to compute with [default: torch's own]")
]
Gamma = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="tokens drafted by prompt lookup [default: 0; where it is yours, 3]",
    ),
]


def serve(
    model: Model = "smollm2",
    adapter: Adapters = None,
    mine: Mine = False,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    max_length: Length = 2048,
    max_new_tokens: NewTokens = 1024,
    max_sequences: Sequences = 16,
    max_queue: Queue = 64,
    max_seconds: Seconds = 300.0,
    cache_tokens: CacheTokens = 8192,
    threads: Threads = None,
    gamma: Gamma = None,
) -> None:
    """Serve a model: a chat page, and OpenAI's API with streaming.

    Ctrl-C ends it.
    """
    from llmlab.course import served
    from llmlab.inference.serving import ServingConfig

    try:
        chosen = served.choose(model)
        loras = served.adapters(adapter or [], chosen.name)
        limits = chosen.limits or {}
        if limits:  # an engine keeps to what it was built for
            max_sequences = min(max_sequences, limits["max_sequences"])
            cache_tokens = limits["num_blocks"] * limits["block_size"]
        config = ServingConfig(
            max_length=min(max_length, cache_tokens),
            max_new_tokens=max_new_tokens,
            max_sequences=max_sequences,
            max_queue=max_queue,
            max_seconds=max_seconds,
        )
    except FileNotFoundError as error:
        stop(f"{error}{NOT_FETCHED}", 2)
    except ValueError as error:
        stop(error, 2)
    rows, own = pieces_of(mine)
    if gamma is None:
        gamma = 3 if any(each.name == "lookup" for each in own) else 0
    sizes = limits | {"max_sequences": max_sequences, "gamma": gamma}
    loading = served.Loading(chosen.folder, loras, own, sizes, cache_tokens, threads)
    server = listening(loading, [chosen.name, *loras], config, host, port, rows)
    say(f"serving {', '.join([chosen.name, *loras])}")
    if not is_private(host):
        warning = "anyone who reaches this address can use it: it asks for no password"
        typer.echo(f"llmlab: {warning}", err=True)
    raise typer.Exit(asyncio.run(until_stopped(server)))


def listening(
    loading: Any, names: list[str], config: Any, host: str, port: int, rows: list
) -> Any:
    """The server, whose address is taken; ends the command where it cannot be."""
    from llmlab.course import served
    from llmlab.inference.serving import Server

    try:
        return Server(
            loading.folder,
            loading,
            names,
            config=config,
            host=host,
            port=port,
            pieces=rows,
            told=say,
            worker_options={"preload": served.PRELOAD},
        )
    except FileNotFoundError as error:
        stop(error, 2)
    except OSError as error:
        stop(cannot_listen(error, host, port), 1)


def pieces_of(mine: bool) -> tuple[list[dict[str, str]], tuple]:
    """Whose functions the engine is made of; says so where --mine asks."""
    if not mine:
        return [], ()
    from llmlab.course import served
    from llmlab.course.grading import report
    from llmlab.course.syllabus import course_root

    try:
        root = course_root()
    except FileNotFoundError as error:
        stop(error, 2)
    if sys.stderr.isatty():
        typer.echo("marking your functions …", err=True)
    rows, own = served.whose(root)
    print_pieces(rows, report.console())
    return rows, own


def print_pieces(rows: list[dict[str, str]], console: Any) -> None:
    """The table of pieces."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("piece", "from", "whose", "why"):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(row["piece"], row["exercise"], row["whose"], row["why"])
    console.print(table)
    count = sum(row["whose"] == "yours" for row in rows)
    typer.echo(f"{count} of {len(rows)} pieces are yours")


async def until_stopped(server: Any) -> int:
    """Serves until Ctrl-C or a signal to end. Returns the exit status."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        with contextlib.suppress(AttributeError, NotImplementedError, ValueError):
            loop.add_signal_handler(getattr(signal, name), ended.set)
    began = time.monotonic()
    server.start()
    waiting = loop.create_task(ended.wait())
    ready = loop.create_task(server.supervisor.ready())
    try:
        await asyncio.wait({waiting, ready}, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            return 0
        if ready.exception() is not None:
            typer.echo(f"llmlab: {ready.exception()}", err=True)
            return 1
        blocks = server.supervisor.health.counts["blocks"]
        say(
            f"loaded in {time.monotonic() - began:.1f} s; {blocks} blocks for the cache"
        )
        say(f"chat page:  {server.address}/")
        say(f"OpenAI API: {server.address}/v1   (Ctrl-C ends it)")
        await waiting
        return 0
    finally:
        ready.cancel()
        waiting.cancel()
        await server.close()
        say("ended")


def say(text: str) -> None:
    """A line that is there at once, also in a file."""
    if text != "ready":
        print(text, flush=True)


def is_private(host: str) -> bool:
    """Whether this machine alone reaches it."""
    from llmlab.inference.serving import is_loopback

    return is_loopback(host)


def cannot_listen(error: OSError, host: str, port: int) -> str:
    """Why an address cannot be listened on, and what to do."""
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} of {host} is in use: another server may be running. Use"
            " another one with --port, or --port 0 for any that is free"
        )
    if error.errno == errno.EACCES:
        return f"port {port} may not be used by you: take one above 1023 with --port"
    return f"cannot listen on {host}, port {port}: {error.strerror or error}"
