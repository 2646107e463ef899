"""Splitting a model over ranks: `World` (threads, to see and count), `launch` (processes, to believe), torchrun (to use).

A rank function takes a communicator first, `fn(comm, …)`, and runs unchanged at all three distances.
"""

from __future__ import annotations

from importlib import import_module

from llmlab.parallelism.launch import RankFailed, launch  # light; and `launch` must stay the function, not the module

_WHERE = {
    "World": "world",
    "DeadlockError": "world",
    "CollectiveMismatch": "world",
    "Communicator": "communicator",
    "Mesh": "communicator",
    "ProcessComm": "process",
    "attach": "torchrun",
    "Ledger": "ledger",
    "Event": "ledger",
    "Link": "cost",
}
__all__ = [*_WHERE, "RankFailed", "launch"]


def __getattr__(name: str):
    """Import what is asked for, when it is asked for: `import llmlab.parallelism` alone does not load torch."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
