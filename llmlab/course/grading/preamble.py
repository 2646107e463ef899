"""Runs in the kernel before the learner's cells do.

It moves to their folder, bounds what they print, and leaves no way out of the kernel.

It also imports torch, which takes seconds, so that the time of a cell is the learner's
own.
"""

from __future__ import annotations

import os
import sys
from typing import Any

MAX_CHARACTERS = 200_000


def prepare(folder: str, limit: int = MAX_CHARACTERS) -> None:
    """Prepares the kernel for the learner's cells.

    It moves to the learner's folder, cuts each stream off after `limit` characters per
    cell, and disarms exit().
    """
    from IPython import get_ipython

    shell = get_ipython()
    if os.path.isdir(folder):
        os.chdir(folder)
        # what lies beside the notebook can be imported, but hides no library
        sys.path[:] = [each for each in sys.path if each not in ("", folder)]
        sys.path.append(folder)
    for stream in (sys.stdout, sys.stderr):
        shell.events.register("pre_run_cell", bounded(stream, limit))
    import torch  # noqa: F401

    shell.user_ns["exit"] = no_exit
    shell.user_ns["quit"] = no_exit


def no_exit(*args: Any) -> None:
    """Stands for exit() and quit(), which would end the kernel for all later cells."""
    raise SystemExit("exit() ends the notebook: take it out")


def bounded(stream: Any, limit: int) -> Any:
    """Makes `stream` drop what exceeds `limit` characters.

    Returns the function that starts a new count.
    """
    write = stream.write
    written = 0  # characters in this cell

    def limited(text: str) -> int:
        nonlocal written
        if written < limit:
            write(text[: limit - written])
            if written + len(text) >= limit:
                write("\n… (cut)\n")
        written += len(text)
        return len(text)

    def start_again(*args: Any) -> None:
        nonlocal written
        written = 0

    stream.write = limited
    return start_again
