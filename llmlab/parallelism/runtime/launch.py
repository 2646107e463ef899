"""`launch(fn, n)`: n real processes over gloo, from a notebook cell, in about a second.

The processes are forked, so that functions defined in a cell, closures and big
arguments go along without pickling; only the results are pickled on the way back. What
a rank prints is shown in rank order when all are done (`live=True`: at once).

What forking forbids, and what is done about it
- OpenMP threads do not survive a fork: each child runs `torch.set_num_threads(1)`
  first. Matrix products and backward passes that the parent has already run are
  harmless on CPU (tested); a parent that has initialized CUDA cannot fork: use
  torchrun.
- A thread of the parent that holds a lock while it is forked leaves it locked in the
  child, where the first matrix product may wait for it for ever. `World` returns only
  when the system has ended its threads; do not fork beside threads that compute.
- A child never returns into the parent's code: it leaves by `os._exit`, and does not
  run the kernel's exit handlers.
- Linux kills the children when the parent dies (PR_SET_PDEATHSIG); elsewhere a thread
  watches the parent.
- macOS forks too, but Apple's Accelerate library may not survive it: if a rank dies by
  a signal there, use `World` or torchrun. Windows has no fork: the same two remain.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable

from llmlab.parallelism.runtime.child import Child, child_main

_GRACE = 0.5  # seconds in which the other ranks may report too, once one has failed


class RankFailed(RuntimeError):
    """A rank raised, was killed, or did not come back in time.

    `rank` and `kind` ("raised", "died", "hung") say which.
    """

    def __init__(self, message: str, rank: int, kind: str) -> None:
        super().__init__(message)
        self.rank, self.kind = rank, kind


def launch(
    fn: Callable,
    n: int,
    *args,
    timeout: float = 60.0,
    threads: int = 1,
    live: bool = False,
) -> list:
    """Run `fn(comm, *args)` in n forked processes that talk over gloo.

    Return the results in rank order.

    Args:
        fn: any function, one defined in a notebook cell or a closure included. Its
            result must be picklable.
        n: number of processes.
        timeout: seconds until the ranks that are left are killed and named, with the
            line where each one was.
        threads: torch threads a process.
        live: show what ranks print as it comes, rather than in rank order at the end.
    Raises:
        ValueError: n or timeout make no sense.
        RankFailed: a rank raised (its traceback is in the message), was killed by a
            signal, or hung.
        RuntimeError: this platform cannot fork, or CUDA has been initialized in this
            process.
    """
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n={n!r} must be a positive number of processes")
    if timeout <= 0:
        raise ValueError(f"timeout={timeout} must be a positive number of seconds")
    _check_fork()
    folder = tempfile.mkdtemp(prefix="llmlab-launch-")
    children: list[Child] = []
    try:
        _fork_all(children, fn, args, n, folder, timeout, threads)
        _listen(children, time.monotonic() + timeout, live)
        failure = _failure(children, timeout)
    finally:
        for child in children:
            child.kill()
        shutil.rmtree(folder, ignore_errors=True)
        if not live:
            for child in children:
                child.show()
    if failure:
        raise failure
    return [child.result for child in children]


def _check_fork() -> None:
    if not hasattr(os, "fork"):
        raise RuntimeError(
            "launch() forks, which this platform cannot: use World(n).run(fn), or"
            " torchrun"
        )
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise RuntimeError(
            "launch() forks, which a process that uses CUDA cannot: start a script with"
            " torchrun, or restart"
        )


def _fork_all(
    children: list[Child],
    fn: Callable,
    args: tuple,
    n: int,
    folder: str,
    timeout: float,
    threads: int,
) -> None:
    """Start the processes. Each child runs `child_main` and never returns."""
    import torch.distributed  # noqa: F401  once here, not once in each child

    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    for rank in range(n):
        child = Child(rank)
        with warnings.catch_warnings():
            # Python 3.12 warns of threads; see the top of the file
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            child_main(
                child,
                fn,
                args,
                n,
                folder,
                timeout,
                threads,
                parent,
                [c for c in children],
            )
        child.started(pid)
        children.append(child)


def _listen(children: list[Child], deadline: float, live: bool) -> None:
    """Read reports and output until all have reported, one has failed (and a moment
    after), or time is up.
    """
    import selectors

    with selectors.DefaultSelector() as selector:
        for child in children:
            for stream in child.streams:
                selector.register(stream, selectors.EVENT_READ, child)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(min(left, 0.2)):
                if not key.data.read(key.fileobj, live):
                    selector.unregister(key.fileobj)
            if all(child.reported for child in children) or any(
                child.failed for child in children
            ):
                deadline = min(deadline, time.monotonic() + _GRACE)


def _failure(children: list[Child], timeout: float) -> RankFailed | None:
    """The failure that explains the others: a killed rank first, then one that raised
    of its own accord, then a hung one.
    """
    for child in children:
        child.reap()
    n, state = len(children), lambda *kinds: [c for c in children if c.state in kinds]
    if died := state("died"):
        first = min(died, key=lambda c: c.when)
        return RankFailed(f"rank {first.rank} of {n} {first.death}", first.rank, "died")
    if raised := state("raised") or state("lost"):
        first = min(raised, key=lambda c: c.when)
        return RankFailed(
            f"rank {first.rank} of {n} raised:\n{first.error}{_gone(first, children)}",
            first.rank,
            "raised",
        )
    if hung := state("hung"):
        places = {c.rank: c.where() for c in hung}
        # whoever does not wait for the others
        first = min(places, key=lambda r: ", waiting in" in places[r])
        lines = "".join(f"\n  rank {r} was at {place}" for r, place in places.items())
        return RankFailed(
            f"after {timeout:g} s {len(hung)} of {n} ranks had not returned:{lines}",
            first,
            "hung",
        )
    return None


def _gone(first: Child, children: list[Child]) -> str:
    """For a rank that lost its connection: who had already returned."""
    done = [str(c.rank) for c in children if c.state == "done"]
    return (
        f"(rank {', '.join(done)} had already returned)\n"
        if first.state == "lost" and done
        else ""
    )
