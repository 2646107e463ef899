"""One forked process of `launch`, from both sides of the fork: `Child` in the parent,
`child_main` in the child.

Four pipes lead back: the report (result or error, pickled), stdout, stderr, and the
stack that the child dumps on SIGUSR1.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

_LOST = re.compile(
    r"onnection (closed|reset|refused)|roken pipe|timed? ?out|peer rank", re.IGNORECASE
)
_NOISE = re.compile(r"^\[Gloo\] Rank \d+ is connected")
_FRAME = re.compile(r'File "(.+)", line (\d+) in (\S+)')


class Child:
    """The parent's view of one rank: its pipes, what it printed, and how it ended.

    `state` is "done", "raised", "lost" (it raised because a peer had gone), "died"
    (killed, or left without a word), "hung".
    """

    def __init__(self, rank: int) -> None:
        self.rank, self.pid, self.when = rank, 0, float("inf")
        self.pipes = {name: os.pipe() for name in ("report", "out", "err", "stack")}
        self.read_so_far = {read: b"" for read, _ in self.pipes.values()}
        self.state, self.result, self.error, self.death = "hung", None, "", ""

    @property
    def streams(self) -> list[int]:
        """What to listen to."""
        return [self.pipes[name][0] for name in ("report", "out", "err")]

    @property
    def failed(self) -> bool:
        """Whether it has ended badly."""
        return self.state in ("raised", "lost", "died")

    @property
    def reported(self) -> bool:
        """Whether it has ended, well or badly."""
        return self.state != "hung"

    def started(self, pid: int) -> None:
        """Called in the parent, once forked."""
        self.pid = pid
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # the child does it too: whoever comes first
        for _, write in self.pipes.values():
            os.close(write)

    def read(self, stream: int, live: bool) -> bool:
        """Take what has come; False at the stream's end."""
        data = os.read(stream, 1 << 16)
        self.read_so_far[stream] += data
        if stream == self.pipes["report"][0]:
            if not data:
                self._take_report()
        elif live:
            self.show(last=not data)
        return bool(data)

    def _take_report(self) -> None:
        report, self.when = self.read_so_far[self.pipes["report"][0]], time.monotonic()
        try:
            self.state, self.result, self.error = pickle.loads(report)
        except (EOFError, pickle.UnpicklingError):
            self.state = "hung"
            self.reap(wait=True)
        except Exception as error:
            self.state, self.error = (
                "raised",
                f"its result could not be unpickled: {type(error).__name__}: {error}",
            )

    def reap(self, wait: bool = False) -> None:
        """If it has not reported: has it died?"""
        deadline = time.monotonic() + (0.5 if wait else 0)
        while not self.reported and self.pid:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid, self.state, self.death = 0, "died", _death(status)
            elif time.monotonic() >= deadline:
                return
            else:
                time.sleep(0.005)

    def where(self) -> str:
        """The line where it is now, and the collective it waits in, if it waits in
        one.
        """
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
        time.sleep(0.2)
        os.set_blocking(self.pipes["stack"][0], False)
        try:
            text = os.read(self.pipes["stack"][0], 1 << 16).decode(errors="replace")
        except BlockingIOError:
            return "a place that it could not report"
        return _place(_FRAME.findall(text))

    def show(self, last: bool = True) -> None:
        """Print what it has printed, each line with its rank; `last`: an unfinished
        line too.
        """
        for name, to in (("out", sys.stdout), ("err", sys.stderr)):
            stream = self.pipes[name][0]
            done, newline, rest = self.read_so_far[stream].rpartition(b"\n")
            whole = self.read_so_far[stream] if last else done + newline
            self.read_so_far[stream] = b"" if last else rest
            for line in whole.decode(errors="replace").splitlines():
                if not _NOISE.match(line):
                    to.write(f"[rank {self.rank}] {line}\n")

    def kill(self) -> None:
        """End it and what it has started, and take it off the process table."""
        for read, _ in self.pipes.values():
            with contextlib.suppress(OSError):
                os.close(read)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid or -1, signal.SIGKILL) if self.pid else None
        if self.pid:
            os.waitpid(self.pid, 0)
            self.pid = 0


def _death(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return (
            "was killed by"
            f" {signal.Signals(number).name if number in set(signal.Signals) else f'signal {number}'}"
        )
    return f"left with exit code {os.WEXITSTATUS(status)} before it returned"


def _place(frames: list[tuple[str, str, str]]) -> str:
    """From a stack, innermost first: the user's line, and the communicator's method if
    it is in one.
    """
    ours = os.path.dirname(__file__)
    inside = [
        name
        for path, _, name in frames
        if path == os.path.join(ours, "communicator.py") and name[0] != "_"
    ]
    skip = (
        *(
            os.path.join(ours, f"{m}.py")
            for m in ("communicator", "process", "child", "launch")
        ),
        "/torch/distributed/",
    )
    for path, line, name in frames:
        if not any(s in path for s in skip):
            where = "cell" if "ipykernel_" in path else os.path.basename(path)
            return f"{where}:{line} in {name}" + (
                f", waiting in {inside[-1]}" if inside else ""
            )
    return "its first lines"


def child_main(
    child: Child,
    fn: Callable,
    args: tuple,
    n: int,
    folder: str,
    timeout: float,
    threads: int,
    parent: int,
    others,
):
    """The life of the child: set up, run, report, leave. Never returns."""
    try:
        _settle(child, parent, others)
        report = _run(child.rank, fn, args, n, folder, timeout, threads)
    except BaseException:
        report = pickle.dumps(("raised", None, traceback.format_exc()))
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
        with os.fdopen(child.pipes["report"][1], "wb") as pipe:
            pipe.write(report)
    os._exit(0)


def _settle(child: Child, parent: int, others: list[Child]) -> None:
    """Cut the ties with the parent: its process group, its stdout, its signals, its
    garbage.
    """
    os.setpgid(0, 0)
    gc.freeze()  # the parent's objects (sockets, say) must not be finalized here
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for sibling in others:
        for read, _ in sibling.pipes.values():
            os.close(read)
    for read, _ in child.pipes.values():
        os.close(read)
    for name, fd in (("out", 1), ("err", 2)):
        os.dup2(child.pipes[name][1], fd)
        os.close(child.pipes[name][1])
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  they live as long as the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    import faulthandler

    faulthandler.enable(2)
    faulthandler.register(signal.SIGUSR1, child.pipes["stack"][1], all_threads=False)


def _die_with(parent: int) -> None:
    """Be killed when the parent dies: by the kernel on Linux, by a thread that looks
    elsewhere.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
        return
    end_with(parent)


def end_with(parent: int, every: float = 0.5) -> None:
    """End this process, from a thread, once `parent` is no longer its parent.

    Args:
        parent: process number, of `os.getppid()` when it was the parent for sure.
        every: seconds between two looks.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _readable(error: BaseException) -> str:
    """The traceback, without the frames of the communicator and of the launcher."""
    ours = os.path.dirname(__file__)
    hidden = tuple(
        os.path.join(ours, f"{name}.py")
        for name in ("child", "communicator", "process")
    )
    short = traceback.TracebackException.from_exception(error)
    short.stack = traceback.StackSummary.from_list(
        [f for f in short.stack if f.filename not in hidden] or list(short.stack)
    )
    return "".join(short.format())


def _run(
    rank: int,
    fn: Callable,
    args: tuple,
    n: int,
    folder: str,
    timeout: float,
    threads: int,
) -> bytes:
    """Join the group, run, and return the pickled report."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from llmlab.parallelism.runtime.process import world_comm

    torch.set_num_threads(threads)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    store = dist.FileStore(os.path.join(folder, "store"), n)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=n,
        timeout=timedelta(seconds=timeout + 60),
    )
    try:
        # a rank that is done at once must not leave while others still connect
        dist.barrier()
        result = fn(world_comm(), *args)
        report = pickle.dumps(("done", result, ""))
    except BaseException as error:
        text = _readable(error)
        return pickle.dumps(
            ("lost" if _LOST.search(str(error)) else "raised", None, text)
        )
    dist.destroy_process_group()
    return report
