"""Run in the kernel before the learner's cells are: their folder, a bound on what they
print, no way out of the kernel.

It also imports torch, which takes seconds, so that the time of a cell is the learner's
own.
"""

from __future__ import annotations

import os
import sys
from typing import Any

MAX_CHARACTERS = 200_000


def prepare(folder: str, limit: int = MAX_CHARACTERS) -> None:
    """Moves to the learner's folder, cuts each stream off after `limit` characters a
    cell, and disarms exit().
    """
    from IPython import get_ipython

    shell = get_ipython()
    if os.path.isdir(folder):
        os.chdir(folder)
        sys.path.insert(0, folder)
    for stream in (sys.stdout, sys.stderr):
        shell.events.register("pre_run_cell", bounded(stream, limit))
    import torch  # noqa: F401

    shell.user_ns["exit"] = shell.user_ns["quit"] = no_exit


def no_exit(*args: Any) -> None:
    """Stands for exit() and quit(), which would end the kernel for all cells after this
    one.
    """
    raise SystemExit("exit() ends the notebook: take it out")


def bounded(stream: Any, limit: int) -> Any:
    """Makes `stream` drop what exceeds `limit` characters; returns the function that
    starts a new count.
    """
    write, count = stream.write, [0]

    def limited(text: str) -> int:
        count[0] += len(text)
        if count[0] - len(text) < limit:
            write(text[: limit - count[0] + len(text)])
            if count[0] >= limit:
                write("\n… (cut)\n")
        return len(text)

    stream.write = limited
    return lambda *args: count.__setitem__(0, 0)
