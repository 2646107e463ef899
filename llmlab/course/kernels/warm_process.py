"""The warm process from its start: the imports, the socket, the loop of `server`."""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from llmlab.course.kernels.preload import (
    BASE,
    STEPS,
    Noisy,
    Package,
    import_ahead,
    import_one,
)
from llmlab.course.kernels.server import Server, threads


def settle() -> None:
    """Ends the idle threads of OpenBLAS, and sets aside what exists by now, so that the
    garbage collector of a kernel leaves these pages shared."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    gc.collect()
    gc.freeze()


def pidfd_of(owner: str) -> int:
    """Opens the process named "PID:START".

    Raises:
        ProcessLookupError: it is gone.
    """
    import psutil

    pid, _, start = owner.partition(":")
    watch = os.pidfd_open(int(pid))
    try:
        same = f"{psutil.Process(int(pid)).create_time():.2f}" == start
    except psutil.Error:
        same = False
    if not same:
        os.close(watch)
        raise ProcessLookupError(f"process {pid} is gone")
    return watch


def load(without: Sequence[str]) -> dict[str, Package]:
    """All imports. Matplotlib is told of the notebook's backend, as the kernel
    would.
    """
    for name in BASE:
        import_one(name)
    chosen = os.environ.get("MPLBACKEND")
    if not chosen:
        os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    try:
        return import_ahead(STEPS, without)
    finally:
        if not chosen:
            del os.environ["MPLBACKEND"]


def main(arguments: Sequence[str]) -> None:
    """The warm process, from its start to its end or until it is a kernel.

    Args:
        arguments: the socket's path, the number of the open lock file, the owner as
            "PID:START", seconds to be idle, and the steps to leave out.
    """
    path, lock, owner, idle = Path(arguments[0]), int(arguments[1]), *arguments[2:4]
    without = list(arguments[4:])
    if not without and os.fork():  # so that nobody has to wait for this process
        os._exit(0)
    watch = pidfd_of(owner)
    started = dict(os.environ)
    from llmlab.course.kernels.child import become_kernel

    failed = path.with_suffix(".failed")
    try:
        packages = load(without)
    except Noisy as noisy:
        again = [sys.executable, *sys.orig_argv[1:], noisy.step]
        os.close(watch)
        os.execve(sys.executable, again, started)  # the lock stays open
    except BaseException as error:
        failed.write_text(f"{type(error).__name__}: {error}")
        raise
    settle()
    if threads() != 1:
        failed.write_text(f"{threads()} threads run after the imports")
        return
    listener = socket.socket(socket.AF_UNIX)
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    listener.bind(str(fresh))
    listener.listen(64)
    fresh.rename(path)  # it can be found only once it answers
    server = Server(listener, watch, path, [lock], float(idle))
    try:
        forked = server.serve()
    except BaseException as error:
        failed.write_text(f"{type(error).__name__}: {error}")
        path.unlink(missing_ok=True)
        raise
    if forked is None:
        path.unlink(missing_ok=True)
        sys.stdout.flush()
        os._exit(0)
    become_kernel(forked, packages, started)
