"""Programs that a test starts: they end with the test, whatever ends the test.

A program runs below a guard, which is this file as a script, in a session of its own:

    pytest ── guard ── program ── its children, in whatever sessions and groups
       └──pipe──┘

The guard reads a pipe whose other end pytest holds. When that end closes, because the
test is done or pytest has been killed, the guard kills all processes that carry the
test's mark in their environment. Children inherit it; a session, a process group or a
new parent does not take it away.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
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
