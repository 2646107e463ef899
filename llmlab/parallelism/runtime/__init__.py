"""What a rank function runs on, at all three distances.

    calls          what each collective means, and what it sends
    communicator   the interface that a rank function sees: `Communicator`, `Mesh`
    world          n ranks as threads in one process (with `turns` and `rendezvous`)
    process        one rank of several processes, over gloo
    launch         starts such processes from a notebook cell (with `child`)
    torchrun       joins a job that torchrun or DeepSpeed's launcher has started
    ledger, cost   every byte that was sent, and the time that it takes on a link

Start with `communicator`. Names are imported when they are asked for: this package
alone does not load torch.
"""

from __future__ import annotations

from importlib import import_module

# `launch` is light, and must stay the function, not the module of that name.
from llmlab.parallelism.runtime.launch import RankFailed, launch

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
    "chunks": "cost",
    "sent": "cost",
    "REDUCTIONS": "calls",
}
__all__ = [*_WHERE, "RankFailed", "launch"]


def __getattr__(name: str):
    """Import what is asked for, when it is asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
