"""Programs that a test starts: they end with the test, whatever ends the test.

A program runs below a guard, which is this file as a script, in a session of its own:

    pytest ── guard ── program ── its children, in whatever sessions and groups
       └──pipe──┘

The guard reads a pipe whose other end pytest holds. When that end closes, because the
test is done or pytest has been killed, the guard kills all processes that carry the
test's mark in their environment. Children inherit it; a session, a process group or a
new parent does not take it away.

Python needs seconds to import what an example does. Where a cold start is not what is
tested, the program is a fork of pytest instead (`forked`): Linux kills it when pytest
dies, and torch kills the ranks that it has forked (`torchrun_of_forks`).
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARK = "LLMLAB_TEST_PROGRAM"  # the variable that a program's processes inherit
_numbers = count()


@contextmanager
def started(
    command: Sequence[str],
    mark: str = "",
    prefix: Sequence[str] = (),
    **options,
) -> Iterator[subprocess.Popen]:
    """A program that runs for the `with` block at most, and its children too.

    Args:
        command: the program and its arguments. Its stdin is empty.
        mark: what its processes are known by; by default unique.
        prefix: what starts the guard, as in ("ip", "netns", "exec", "name").
        options: of `subprocess.Popen`. `env` is added to the environment.
    """
    mark = mark or f"{os.getpid()}-{next(_numbers)}"
    env = os.environ | options.pop("env", {}) | {MARK: mark}
    guard = [*prefix, sys.executable, "-S", str(Path(__file__).resolve()), *command]
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(
            guard,
            stdin=reading,
            env=env,
            start_new_session=True,
            **options,
        )
    except BaseException:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    try:
        yield process
    finally:
        os.close(writing)
        sweep(mark)
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def run(command: Sequence[str], timeout: float = 240, **options):
    """`subprocess.run` of a guarded program, with its output as text.

    Args:
        timeout: seconds.
    Raises:
        subprocess.TimeoutExpired: it took longer; none of its processes is left.
    """
    pipe = subprocess.PIPE
    options = {"stdout": pipe, "stderr": pipe, "text": True} | options
    with started(command, **options) as process:
        out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def torchrun(*arguments: str) -> list[str]:
    """The command for two ranks on this machine and one thread each, over gloo."""
    one_machine = ["--standalone", "--nproc-per-node=2", *arguments]
    return [sys.executable, "-m", "torch.distributed.run", *one_machine]


def on_cpu(interface: str = "lo") -> dict[str, str]:
    """The environment for ranks on CPUs that speak over a network interface."""
    return {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": interface,
    }


class Fork:
    """A fork of this process, and the file that it writes to."""

    def __init__(self, pid: int, output) -> None:
        self.pid = pid
        self.output = output

    def wait(self, timeout: float = 240) -> subprocess.CompletedProcess:
        """Its status, and what it and its children have printed.

        Raises:
            TimeoutError: it is still running after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        ended = 0
        while not ended:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if not ended and time.monotonic() > deadline:
                raise TimeoutError(f"after {timeout:g} s it runs:\n{self.text()}")
            time.sleep(0.02)
        self.pid = 0
        code = os.waitstatus_to_exitcode(status)
        return subprocess.CompletedProcess([], code, self.text(), "")

    def text(self) -> str:
        """What has been printed so far."""
        self.output.seek(0)
        return self.output.read().decode(errors="replace")

    def end(self) -> None:
        """Kill it and the processes of its group, if it has not ended by itself."""
        if self.pid:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


@contextmanager
def forked(function: Callable, *args, env: dict[str, str] | None = None):
    """A fork that runs `function(*args)`, for the `with` block at most.

    Args:
        env: added to its environment.
    """
    import tempfile

    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with tempfile.TemporaryFile() as output:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads
            pid = os.fork()
        if pid == 0:
            _be_a_program(function, args, env or {}, output.fileno(), parent)
        with suppress(OSError):
            os.setpgid(pid, pid)  # the fork does it too: whoever comes first
        fork = Fork(pid, output)
        try:
            yield fork
        finally:
            fork.end()


def run_fork(function: Callable, *args, timeout: float = 240, **options):
    """`run`, for a function in a fork of this process."""
    with forked(function, *args, **options) as fork:
        return fork.wait(timeout)


def _be_a_program(
    function: Callable, args: tuple, env: dict[str, str], output: int, parent: int
) -> None:
    """What a fork does. It never returns."""
    status = 1
    try:
        os.setpgid(0, 0)
        gc.freeze()  # what is the parent's must not be finalized here
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:  # it died before prctl was called
                os._exit(1)
        os.environ.update(env)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        function(*args)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def torchrun_of_forks(*arguments: str, namespace: str = "") -> None:
    """Be a torchrun whose ranks are forks of it, in a fork of this process.

    Args:
        arguments: as on torchrun's command line; the script is a file.
        namespace: of the network, as "ip netns" has made it.
    """
    import torch
    from torch.distributed.run import main

    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    if namespace:
        with open(f"/var/run/netns/{namespace}") as file:
            new_network = 0x40000000  # CLONE_NEWNET
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), new_network):
                raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    main(["--run-path", "--start-method=fork", *arguments])


def marked(mark: str) -> list:
    """The processes that carry a mark, as psutil has them; this one does not count."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ended = process.status() == psutil.STATUS_ZOMBIE
            if process.pid == os.getpid() or ended:
                continue
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found


def sweep(mark: str, seconds: float = 10.0) -> None:
    """Kill what carries a mark, until nothing does: a process may be starting another.

    Raises:
        TimeoutError: there still are some after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while left := marked(mark):
        for process in left:
            with suppress(Exception):  # it has ended by itself
                process.kill()
        if time.monotonic() > deadline:
            names = ", ".join(f"{p.pid} {p.name()}" for p in left)
            raise TimeoutError(f"after {seconds:g} s there still are {names}")
        time.sleep(0.02)


def _guard(command: list[str]) -> int:
    """Run a program; when stdin closes, end all that carries our mark."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    closed = threading.Event()

    def wait_for_the_end() -> None:
        os.read(0, 1)  # pytest never writes: this returns when its end has closed
        closed.set()
        import site

        site.main()  # psutil is among the installed packages, which -S leaves out
        sweep(os.environ[MARK])

    watching = threading.Thread(target=wait_for_the_end, daemon=True)
    watching.start()
    status = process.wait()
    if closed.is_set():
        watching.join()  # the program is the first to be killed, and not the last
    return status


if __name__ == "__main__":
    ended = _guard(sys.argv[1:])
    sys.exit(128 - ended if ended < 0 else ended)
