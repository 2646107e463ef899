"""A forked process becomes a kernel: everything that a new process would have is new.

What stays different: the shared pages count as this process's memory, its command line
in a list of processes is the warm process's, and the order of a set of strings is the
same in all kernels of one warm process (it is drawn when Python starts).
"""

from __future__ import annotations

import importlib
import logging
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from select import poll
from types import ModuleType
from typing import Any

import psutil

from llmlab.course.kernels.hiding import Hidden
from llmlab.course.kernels.preload import Package
from llmlab.course.kernels.server import NewKernel
from llmlab.course.kernels.wire import send

PORTS = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")


def become_kernel(
    forked: NewKernel, packages: Mapping[str, Package], env: Mapping[str, str]
) -> None:
    """Runs the kernel to its end. Returns as a plain kernel's program does.

    Args:
        forked: what was asked for.
        packages: what was imported ahead.
        env: the variables under which that was done.
    """
    try:
        take_over(forked)
        renew_random()
        repair_logging()
        purge()
        Hidden(packages, env).hide()
        app = make_app(forked)
        app.initialize()
    except BaseException as error:
        why = f"{type(error).__name__}: {error}"
        try:
            send(forked.teller, {"refused": why})
        finally:
            os._exit(1)
    ports = {name: getattr(app, name) for name in PORTS}
    try:
        send(forked.teller, {"ready": ports})
    except OSError:
        os._exit(1)  # nobody waits any more
    forked.teller.close()
    app.start()


def take_over(forked: NewKernel) -> None:
    """Session, folder, streams, variables and arguments, as they were asked for."""
    request = forked.request
    os.setsid()
    os.umask(request["umask"])
    os.chdir(request["cwd"])
    for number, stream in enumerate(forked.streams):
        os.dup2(stream, number)
    for stream in forked.streams:
        os.close(stream)
    for name in os.environ.keys() - request["env"].keys():
        del os.environ[name]
    os.environ.update(request["env"])
    time.tzset()
    sys.argv = request["argv"]
    sys.orig_argv = request["command"]
    if not sys.stdout.write_through:  # as Python settles it when it starts
        sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())
    tempfile.tempdir = None


def renew_random() -> None:
    """Each kernel draws its own numbers, as new processes do: torch, too, seeds itself
    from the system when it is imported."""
    random.seed()
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
    if "multiprocessing.process" in sys.modules:
        process = sys.modules["multiprocessing.process"].current_process()
        process.authkey = os.urandom(32)


def repair_logging() -> None:
    """Handlers made in an import write where the kernel's streams will be."""
    for reference in list(logging._handlerList):
        handler = reference()
        stream = vars(handler).get("stream") if handler is not None else None
        if stream is sys.__stderr__:
            handler.stream = Current("stderr")
        elif stream is sys.__stdout__:
            handler.stream = Current("stdout")


class Current:
    """Stands for `sys.stdout` or `sys.stderr`, whatever it is when it is used."""

    def __init__(self, name: str) -> None:
        self.name = name

    def write(self, text: str) -> int:
        """Writes to the stream of today."""
        return getattr(sys, self.name).write(text)

    def flush(self) -> None:
        """Flushes the stream of today."""
        getattr(sys, self.name).flush()

    def __getattr__(self, attribute: str) -> Any:
        return getattr(getattr(sys, self.__dict__["name"]), attribute)


def purge() -> None:
    """Forgets this package, so that a cell imports it from disk as it is now, and the
    warm process's own `__main__`."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "llmlab"]:
        del sys.modules[name]
    importlib.invalidate_caches()
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    if "__mp_main__" in sys.modules:
        sys.modules["__mp_main__"] = main


def make_app(forked: NewKernel) -> Any:
    """ipykernel's own application, which binds its ports itself and ends with the
    process that asked for it."""
    from ipykernel.kernelapp import IPKernelApp

    app = IPKernelApp.instance()
    app.parent_handle = int(os.environ.get("JPY_PARENT_PID") or 0)
    load = app.init_connection_file

    def init_connection_file() -> None:
        load()
        if forked.request["choose_ports"] and app.transport == "tcp":
            for name in PORTS:
                setattr(app, name, 0)

    def init_poller() -> None:
        app.poller = ParentWatch(forked.client)

    app.init_connection_file = init_connection_file
    app.init_poller = init_poller
    return app


class ParentWatch(threading.Thread):
    """Ends the kernel, and what its cells forked, when who asked for it is gone."""

    def __init__(self, parent: int) -> None:
        super().__init__(daemon=True)
        self.parent = parent  # a pidfd

    def run(self) -> None:
        """Waits for the end of that process."""
        watch = poll()
        watch.register(self.parent)
        watch.poll()
        end_session()
        os._exit(1)


def end_session() -> None:
    """Kills the other processes of this kernel's session.

    A fork that a cell made looks like the warm process, so nobody outside knows whose
    it is; but the kernel leads a session, and forks stay in it.
    """
    own = os.getpid()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != own and os.getsid(process.pid) == own:
                process.kill()
