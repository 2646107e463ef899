"""Finds the warm process that fits, or starts it.

The first kernel does not wait: it starts the plain way while the warm process imports
beside it. Importing everything takes about twice as long as a plain kernel's first
imports, so waiting would be the slower of the two.
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from llmlab.course.kernels import memory, place
from llmlab.course.kernels.wire import Lines, NotOurs, check_peer, send

OWNER = "LLMLAB_WARM_OWNER"  # "PID:START" of the process with which it ends
IDLE = "LLMLAB_WARM_IDLE"  # seconds
START = "LLMLAB_WARM_START"  # "0": use a warm process that is there, start none
MOST = 2  # warm processes of one user
RETRY_SECONDS = 600.0  # after a warm process failed to start
CONNECT_SECONDS = 2.0
PROGRAM = (
    "import sys\n"
    "if sys.path and sys.path[0] == '':\n"
    "    del sys.path[0]\n"
    "sys.path[:0] = {home!r}\n"
    "from llmlab.course.kernels.warm_process import main\n"
    "del sys.path[:{number}]\n"
    "main(sys.argv[1:])\n"
)


class Cold(Exception):
    """The kernel has to start the plain way; the message says why.

    `usual` says that nothing is wrong: the warm process is on its way.
    """

    def __init__(self, why: str, usual: bool = False) -> None:
        super().__init__(why)
        self.usual = usual


def unsafe() -> str:
    """Why kernels cannot be forked on this system, or nothing."""
    if sys.platform != "linux":
        return f"forking a process that has loaded torch is not safe on {sys.platform}"
    if not hasattr(os, "pidfd_open") or not os.path.exists("/proc/self/task"):
        return "this system does not say how many threads a process has"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return f"this system cannot watch a process ({error.strerror})"
    return ""


def this_process() -> str:
    """This process by number and start, as no other ever is called."""
    import psutil

    return f"{os.getpid()}:{psutil.Process().create_time():.2f}"


def connect(
    env: Mapping[str, str], flags: tuple[str, ...] = (), cwd: str = ""
) -> socket.socket:
    """A connection to the warm process for kernels with these variables.

    Raises:
        Cold: there is none yet. One was started when that is possible.
    """
    why = unsafe()
    if why:
        raise Cold(why)
    path = socket_path(env, flags, cwd)
    end = socket.socket(socket.AF_UNIX)
    try:
        end.settimeout(CONNECT_SECONDS)
        end.connect(str(path))
        check_peer(end)
        return end
    except NotOurs as error:
        end.close()
        raise Cold(str(error)) from None
    except OSError:
        end.close()
    if env.get(START) == "0":
        raise Cold("no warm process runs", usual=True)
    start(path, env, flags, cwd)
    raise Cold("the warm process is starting", usual=True)


def socket_path(
    env: Mapping[str, str], flags: tuple[str, ...] = (), cwd: str = ""
) -> Path:
    """Where the socket lies.

    Raises:
        Cold: no folder is this user's alone.
    """
    try:
        return place.folder() / f"{place.key(env, flags, cwd)}.sock"
    except place.NoPlace as error:
        raise Cold(f"there is no safe place for a socket: {error}") from None


def start(
    path: Path, env: Mapping[str, str], flags: tuple[str, ...] = (), cwd: str = ""
) -> None:
    """Starts the warm process, unless it is starting already. Returns at once.

    Raises:
        Cold: it may not start now.
    """
    try:
        lock = take(path.with_suffix(".lock"))
    except OSError as error:
        raise Cold(f"the warm process cannot start: {error}") from None
    if lock is None:
        return
    try:
        recently_failed(path.with_suffix(".failed"))
        if memory.available() < memory.TO_START:
            raise Cold("memory is too short for a warm process")
        make_room(path)
        variables = dict(env)
        for name in ("JPY_PARENT_PID", "JPY_SESSION_NAME"):
            variables.pop(name, None)
        owner = env.get(OWNER) or this_process()
        home, number = own_path()
        program = PROGRAM.format(home=home, number=number)
        idle = env.get(IDLE) or "600"
        command = [sys.executable, *flags, "-c", program, str(path), str(lock)]
        with open(path.with_suffix(".log"), "wb") as log:
            process = subprocess.Popen(
                [*command, owner, idle],
                cwd=cwd or "/",
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock],
                start_new_session=True,
            )
        process.wait(timeout=30)  # its first half ends when the second runs
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Cold(f"the warm process cannot start: {error}") from None
    finally:
        os.close(lock)


def own_path() -> tuple[list[str], int]:
    """Where the warm process finds this package: the folder that holds it."""
    home = str(Path(__file__).resolve().parents[3])
    return [home], 1


def take(path: Path) -> int | None:
    """Locks a file; None when another process has it.

    The lock lasts as long as any process has the file open, so it is that of the warm
    process from before its first import to its end.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file


def recently_failed(path: Path) -> None:
    """Makes sure that a warm process which fails is not started for each kernel.

    Raises:
        Cold: it failed a short time ago.
    """
    with suppress(FileNotFoundError):
        if time.time() - path.stat().st_mtime < RETRY_SECONDS:
            raise Cold(f"the warm process failed: {path.read_text()[:300]}")
        path.unlink()


def make_room(path: Path) -> None:
    """Makes sure that there are not too many: one without kernels retires for this one.

    Raises:
        Cold: all of them have kernels.
    """
    others = [lock for lock in path.parent.glob("*.lock") if in_use(lock, path)]
    if len(others) < MOST:
        return
    sockets = [lock.with_suffix(".sock") for lock in others]
    known = [(socket.stat().st_mtime, socket) for socket in sockets if socket.exists()]
    for _, oldest in sorted(known):
        if ask(oldest, {"ask": "retire"}).get("retired"):
            return
    raise Cold(f"{MOST} warm processes of other settings run already")


def in_use(lock: Path, own: Path) -> bool:
    """Whether a warm process holds this lock."""
    if lock == own.with_suffix(".lock"):
        return False
    try:
        file = take(lock)
    except OSError:
        return False  # a link, or gone meanwhile
    if file is None:
        return True
    for suffix in (".sock", ".log", ".lock", ".new"):
        lock.with_suffix(suffix).unlink(missing_ok=True)  # left by one that was killed
    os.close(file)
    return False


def ask(path: Path, question: dict) -> dict:
    """One question to a warm process; nothing when it does not answer."""
    with socket.socket(socket.AF_UNIX) as end:
        try:
            end.settimeout(CONNECT_SECONDS)
            end.connect(str(path))
            check_peer(end)
            send(end, question)
            lines = Lines()
            while True:
                data = end.recv(1 << 12)
                if not data:
                    return {}
                for message in lines.take(data):
                    return message
        except (OSError, NotOurs, ValueError):
            return {}
