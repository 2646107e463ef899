"""Real systems beside the course's own: each in an environment of its own, on demand.

    peers.make("triton")      makes it, or goes on where it stopped
    peers.python("triton")    its Python, for a script or a subprocess

Triton's server, vLLM and others need versions that the course's environment cannot
have. So each lives in a folder of the user's cache, made from the pins in
`data/peers.toml`. The folder's name holds a checksum of the pins: other pins are
another folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from llmlab.course.words import did_you_mean, listed

FILE = Path(__file__).parent / "data" / "peers.toml"
SPARE = 1.5  # times the size: pip unpacks beside what it has downloaded
DISK = "Is there room in your cache, and may you write there?"
NETWORK = "It needs a network, or a mirror of PyPI, once."
BROKEN = "It is installed, but does not run on this machine."
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"


class PeerError(RuntimeError):
    """A peer is not there or cannot be made; the message says what to do."""


class CannotRunHere(PeerError):
    """This machine, or this Python, is none on which the peer runs."""


@dataclass(frozen=True)
class Peer:
    """A line of peers.toml.

    Attributes:
        install: arguments of pip, one list for each call.
        uninstall: what pip brought and is better not there.
        works: a statement that runs in the environment when all is well.
        libpython: whether Python's shared library is needed.
        torch: the version, where `install` has a {torch}.
    """

    name: str
    title: str
    lessons: str
    python: tuple[str, ...]
    machines: tuple[str, ...]
    megabytes: int
    seconds: int
    install: tuple[tuple[str, ...], ...]
    works: str
    use: str
    uninstall: tuple[str, ...] = ()
    libpython: bool = False
    torch: str = ""

    @property
    def checksum(self) -> str:
        """Of all that decides what is in the environment."""
        what = [self.install, self.uninstall, self.torch, sys.version_info[:2]]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:10]


@cache
def peers() -> dict[str, Peer]:
    """All of them, by name."""
    with FILE.open("rb") as file:
        found = tomllib.load(file)
    made = {}
    for name, given in found.items():
        for key in ("python", "machines", "uninstall"):
            given[key] = tuple(given.get(key, ()))
        given["install"] = tuple(tuple(step) for step in given["install"])
        made[name] = Peer(name=name, **given)
    return made


def find(name: str) -> Peer:
    """The peer called `name`.

    Raises:
        ValueError: there is none; with the nearest, and all.
    """
    if name in peers():
        return peers()[name]
    near = did_you_mean(get_close_matches(name, peers(), n=1))
    raise ValueError(f"no peer is called {name!r}. {near}There are {listed(peers())}")


def home() -> Path:
    """Where all of them lie."""
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("llmlab")) / "peers"


def folder(name: str) -> Path:
    """Where a peer lies, or would."""
    peer = find(name)
    return home() / f"{peer.name}-{peer.checksum}"


def is_made(name: str) -> bool:
    """Whether it is whole."""
    return _steps_done(folder(name)) == "all"


def python(name: str) -> Path:
    """The interpreter of a peer's environment.

    Raises:
        ValueError: there is no such peer.
        PeerError: it is not made yet.
    """
    if not is_made(name):
        raise PeerError(f"{name} is not here yet: `llmlab peer {name}` makes it")
    return _python(folder(name))


def _python(where: Path) -> Path:
    inside = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    return where / inside


def check_machine(peer: Peer) -> None:
    """Whether it can run here at all.

    Raises:
        CannotRunHere: with the reason.
    """
    machine = f"{platform.system()} {platform.machine()}"
    if machine not in peer.machines:
        raise CannotRunHere(
            f"{peer.name} runs on {listed(peer.machines, 'or')}, and this is {machine}"
        )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if version not in peer.python:
        raise CannotRunHere(
            f"{peer.name} needs Python {listed(peer.python, 'or')}, and the course's is"
            f" {version}"
        )
    if peer.libpython and not _has_libpython(version):
        raise CannotRunHere(
            f"{peer.name} needs libpython{version}.so.1.0, Python's shared library. On"
            f" Debian and Ubuntu: apt-get install libpython{version}"
        )


def _has_libpython(version: str) -> bool:
    name = f"libpython{version}.so.1.0"
    places = [name, str(Path(sysconfig.get_config_var("LIBDIR") or "") / name)]
    for place in places:
        with contextlib.suppress(OSError):
            ctypes.CDLL(place)
            return True
    return False


def make(name: str, quiet: bool = False) -> Path:
    """Make a peer's environment, or go on where it stopped.

    Returns:
        Its interpreter.
    Raises:
        ValueError: there is no such peer.
        CannotRunHere: it is not for this machine.
        PeerError: no room, no network, or it does not work; with what to do.
    """
    peer = find(name)
    where = folder(name)
    if is_made(name):
        return _python(where)
    check_machine(peer)
    _check_room(peer)
    with _alone(where):
        if is_made(name):  # by another process, while we waited
            return _python(where)
        if not _python(where).exists():
            shutil.rmtree(where, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(where)], peer, quiet, DISK)
            _write_done(where, "0")
        steps = _commands(peer, where)
        for number in range(int(_steps_done(where)), len(steps)):
            last = number == len(steps) - 1
            _run(steps[number], peer, quiet, BROKEN if last else NETWORK)
            _write_done(where, str(number + 1))
        _write_done(where, "all")
    return _python(where)


def _commands(peer: Peer, where: Path) -> list[list[str]]:
    """What is run, in this order; the last one looks whether it works."""
    pip = [str(_python(where)), "-m", "pip", "--disable-pip-version-check"]
    found = []
    for words in peer.install:
        if words == ("{torch}",):
            words = (f"torch=={peer.torch}", "--extra-index-url", CPU_WHEELS)
        found.append([*pip, "install", "--no-input", *words])
    if peer.uninstall:
        found.append([*pip, "uninstall", "--yes", *peer.uninstall])
    found.append([str(_python(where)), "-c", peer.works])
    return found


def _run(command: list[str], peer: Peer, quiet: bool, cure: str) -> None:
    # the course's own packages must not be seen in there
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command,
        env=env,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode == 0:
        return
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    reason = said[-1] if said else f"exit status {done.returncode}"
    raise PeerError(
        f"{peer.name} could not be made: {reason}. {cure} `llmlab peer {peer.name}`"
        f" goes on where it stopped; `llmlab peer {peer.name} --remove` clears what is"
        " there."
    )


def _check_room(peer: Peer) -> None:
    place = home()
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free / 1e6
    if free < SPARE * peer.megabytes:
        raise PeerError(
            f"{peer.name} takes {peer.megabytes} MB, and half as much while it is"
            f" made; {place} has {free:.0f} MB left"
        )


def _steps_done(where: Path) -> str:
    """'all', or how many steps have been done."""
    try:
        return (where / "llmlab-steps").read_text()
    except OSError:
        return "0"


def _write_done(where: Path, done: str) -> None:
    from llmlab.course.files import write_atomically

    write_atomically(where / "llmlab-steps", done)


@contextlib.contextmanager
def _alone(where: Path) -> Iterator[None]:
    """One process at a time: two pips in one environment spoil it."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    with where.with_name(f"{where.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove(name: str) -> list[Path]:
    """Delete a peer, those of other pins too.

    Returns:
        The folders that were there.
    """
    peer = find(name)
    pattern = f"{peer.name}-" + "?" * len(peer.checksum)
    found = [path for path in sorted(home().glob(pattern)) if path.is_dir()]
    for path in found:
        shutil.rmtree(path)
    return found


def how_to_use(name: str) -> str:
    """A few lines, with the paths put in."""
    peer = find(name)
    inside = _python(folder(name))
    filled = peer.use.strip("\n")
    for key, value in (("{python}", inside), ("{bin}", inside.parent)):
        filled = filled.replace(key, str(value))
    return filled
