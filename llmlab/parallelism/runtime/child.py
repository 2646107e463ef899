"""One forked process of `launch`: `Child` in the parent, `child_main` in the child.

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
        self.rank = rank
        self.pid = 0  # 0: not started, or already off the process table
        self.when = float("inf")  # when the report arrived
        # each pipe is (the end that the parent reads, the end that the child writes)
        self.pipes = {name: os.pipe() for name in ("report", "out", "err", "stack")}
        self.read_so_far = {read: b"" for read, _ in self.pipes.values()}
        self.state = "hung"  # until it is known better
        self.result = None
        self.error = ""
        self.death = ""

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
        """Read what has arrived; False at the stream's end."""
        data = os.read(stream, 1 << 16)
        self.read_so_far[stream] += data
        if stream == self.pipes["report"][0]:
            if not data:
                self._take_report()
        elif live:
            self.show(last=not data)
        return bool(data)

    def _take_report(self) -> None:
        report = self.read_so_far[self.pipes["report"][0]]
        self.when = time.monotonic()
        try:
            self.state, self.result, self.error = pickle.loads(report)
        except (EOFError, pickle.UnpicklingError):
            # The pipe closed without a whole report: it has died, or is about to.
            self.state = "hung"
            self.reap(wait=True)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self.state = "raised"
            self.error = f"its result could not be unpickled: {reason}"

    def reap(self, wait: bool = False) -> None:
        """If it has not reported, find out whether it has died.

        Args:
            wait: give it half a second to end.
        """
        deadline = time.monotonic() + (0.5 if wait else 0)
        while not self.reported and self.pid:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                self.state = "died"
                self.death = _death(status)
            elif time.monotonic() >= deadline:
                return
            else:
                time.sleep(0.005)

    def where(self) -> str:
        """The line where it is now, and the collective that it waits in, if any."""
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
        """Print what it has printed, each line with its rank.

        Args:
            last: print an unfinished line too.
        """
        for name, to in (("out", sys.stdout), ("err", sys.stderr)):
            stream = self.pipes[name][0]
            printable = self.read_so_far[stream]
            unfinished = b""
            if not last:
                lines, newline, unfinished = printable.rpartition(b"\n")
                printable = lines + newline
            self.read_so_far[stream] = unfinished
            for line in printable.decode(errors="replace").splitlines():
                if not _NOISE.match(line):
                    to.write(f"[rank {self.rank}] {line}\n")

    def kill(self) -> None:
        """End it and what it has started, and take it off the process table."""
        for read, _ in self.pipes.values():
            with contextlib.suppress(OSError):
                os.close(read)
        if self.pid == 0:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pid = 0


def _death(status: int) -> str:
    """What `os.waitpid`'s status says, in words."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        known = number in set(signal.Signals)
        name = signal.Signals(number).name if known else f"signal {number}"
        return f"was killed by {name}"
    return f"left with exit code {os.WEXITSTATUS(status)} before it returned"


def _place(frames: list[tuple[str, str, str]]) -> str:
    """The user's line, and the communicator's method if the process is inside one.

    Args:
        frames: (path, line, function) of a stack, innermost first.
    """
    room = os.path.dirname(__file__)
    communicator = os.path.join(room, "communicator.py")
    hidden = ["/torch/distributed/"]
    for name in ("communicator", "process", "child", "launch"):
        hidden.append(os.path.join(room, f"{name}.py"))

    # The outermost public method is the one that the user has called.
    method = None
    for path, _, function in frames:
        if path == communicator and not function.startswith("_"):
            method = function

    for path, line, function in frames:
        if any(part in path for part in hidden):
            continue
        where = "cell" if "ipykernel_" in path else os.path.basename(path)
        place = f"{where}:{line} in {function}"
        return f"{place}, waiting in {method}" if method else place
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
    """Everything that a child does: set up, run, report, leave. Never returns."""
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
    """Separate from the parent: process group, stdout, signals, garbage."""
    os.setpgid(0, 0)
    gc.freeze()  # the parent's objects (sockets, say) must not be finalized here
    _die_with(parent)
    # Ctrl-C is for the parent, which then ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for sibling in others:
        for read, _ in sibling.pipes.values():
            os.close(read)
    for read, _ in child.pipes.values():
        os.close(read)
    for name, fd in (("out", 1), ("err", 2)):
        os.dup2(child.pipes[name][1], fd)
        os.close(child.pipes[name][1])
    # They stay open as long as the process lives.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    import faulthandler

    faulthandler.enable(2)
    faulthandler.register(signal.SIGUSR1, child.pipes["stack"][1], all_threads=False)


def _die_with(parent: int) -> None:
    """Die when the parent dies: by the kernel on Linux, elsewhere by a thread."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before prctl was called
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
    room = os.path.dirname(__file__)
    hidden = [
        os.path.join(room, f"{name}.py")
        for name in ("child", "communicator", "process")
    ]
    short = traceback.TracebackException.from_exception(error)
    frames = [frame for frame in short.stack if frame.filename not in hidden]
    if frames:
        short.stack = traceback.StackSummary.from_list(frames)
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
        state = "lost" if _LOST.search(str(error)) else "raised"
        return pickle.dumps((state, None, _readable(error)))
    dist.destroy_process_group()
    return report
