"""Splitting a model over ranks.

A rank function takes a communicator first, `fn(comm, …)`, and runs unchanged at three
distances: `World` (threads, to see and to count), `launch` (processes, to believe) and
torchrun (a cluster, to use). They are in the room `runtime`; every other room holds the
method of one lesson.
"""

from __future__ import annotations

from llmlab.parallelism import runtime
from llmlab.parallelism.runtime import RankFailed, launch

_NAMES = (
    *("World", "DeadlockError", "CollectiveMismatch", "Communicator", "Mesh"),
    *("ProcessComm", "attach", "Ledger", "Event", "Link"),
)
__all__ = [*_NAMES, "RankFailed", "launch"]


def __getattr__(name: str):
    """Import what is asked for, when it is asked for: this alone loads no torch."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(runtime, name)
