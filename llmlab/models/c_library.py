"""A C file as a library, made once on each machine.

A C compiler (`cc`, gcc, clang, or the clang in the package ziglang) turns the file
into machine code for the CPU that it runs on. The result lies in the user's cache under
a name that holds a checksum of the source, the compiler's flags and the CPU. Where
there is no compiler, `build` says so.

Threads come from OpenMP. PyTorch brings an OpenMP of its own, whose threads wait for
work by spinning: two such pools would fight for the cores. So the library is linked to
PyTorch's where that can be found.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

# Sums may be reordered, so that they are taken in vector registers. -ffast-math would
# allow that, too, but a library that is linked with it sets the processor to flush tiny
# numbers to 0, everywhere in the process that loads it.
FLAGS = (
    "-O3",
    "-march=native",
    "-fassociative-math",
    "-fno-signed-zeros",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-shared",
    "-fPIC",
)
POINTER = ctypes.c_void_p
LONG = ctypes.c_long
FLOAT = ctypes.c_float


class NoCompiler(RuntimeError):
    """There is no C compiler here, or it failed."""


def compiler() -> tuple[str, ...] | None:
    """The words that call the C compiler, `$CC` first; None if there is none.

    The last one tried is clang as `pip install ziglang` brings it, which needs nothing
    else from the system. It has no OpenMP: its libraries run on one thread.
    """
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = tuple(shlex.split(name))
        if words and shutil.which(words[0]):
            return words
    if importlib.util.find_spec("ziglang"):
        return sys.executable, "-m", "ziglang", "cc"
    return None


def build(
    source: Path,
    arguments: Mapping[str, Sequence],
    seconds: float = 300,
    openmp: bool = True,
) -> ctypes.CDLL:
    """The functions of a C file, compiled; none of them returns anything.

    Args:
        arguments: for each function the ctypes of its arguments.
        seconds: that the compiler may take.
        openmp: whether threads are wanted.
    Raises:
        NoCompiler: there is none, or it failed, with what it said.
    """
    words = compiler()
    if words is None:
        raise NoCompiler(
            "no C compiler was found: install gcc or clang (or run `pip install "
            "ziglang`), or set CC"
        )
    name = shlex.join(words)
    attempts = [threads() + list(FLAGS)] if openmp else []
    for flags in [*attempts, list(FLAGS)]:  # without OpenMP, one thread does the work
        try:
            found = ctypes.CDLL(str(compiled(source, words, flags, seconds)))
        except subprocess.TimeoutExpired:
            raise NoCompiler(
                f"{name} was stopped: {source.name} took it more than {seconds:g} s"
            ) from None
        except (subprocess.CalledProcessError, OSError) as error:
            problem = getattr(error, "stderr", "") or str(error)
            continue
        for function, types in arguments.items():
            getattr(found, function).argtypes = list(types)
            getattr(found, function).restype = None
        return found
    raise NoCompiler(f"{name} could not compile {source.name}: {problem[-500:]}")


def compiled(
    source: Path, words: Sequence[str], flags: Sequence[str], seconds: float = 300
) -> Path:
    """The path of the library, which is compiled where it is not there yet.

    Raises:
        subprocess.CalledProcessError: the compiler failed.
        subprocess.TimeoutExpired: it took more seconds, and was stopped.
    """
    from platformdirs import user_cache_dir

    what = (source.read_text(), *words, *flags, platform.processor(), cpu_flags())
    checksum = hashlib.sha256("\0".join(what).encode()).hexdigest()[:16]
    file = Path(user_cache_dir("llmlab")) / "kernels" / f"{source.stem}-{checksum}.so"
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        made = Path(scratch) / file.name
        command = [*words, str(source), "-o", str(made), *flags]
        run_whole(command, seconds)
        os.replace(made, file)  # whole or not at all, when two compile at once
    return file


def run_whole(command: list[str], seconds: float) -> None:
    """Run a command; when its time is over, stop it and all that it started.

    Raises:
        subprocess.CalledProcessError: it failed.
        subprocess.TimeoutExpired: it took too long.
    """
    pipe = subprocess.PIPE
    unix = os.name == "posix"
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, start_new_session=unix
    ) as process:
        try:
            _, said = process.communicate(timeout=seconds)
        except BaseException:  # an interrupt, too
            if unix:  # gcc is a front of other programs
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=said)


def threads() -> list[str]:
    """The flags for OpenMP, PyTorch's own where it lies beside it."""
    flags = ["-fopenmp"]
    folder = Path(torch.__file__).parent
    for found in [
        *folder.glob("lib/libgomp*.so*"),
        *folder.glob("../torch.libs/libgomp*"),
    ]:
        return [str(found), f"-Wl,-rpath,{found.parent}", *flags]
    return flags


def cpu_flags() -> str:
    """What decides which instructions -march=native uses."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.machine()
    for line in info.read_text(errors="replace").splitlines():
        if line.startswith(("flags", "Features")):
            return line
    return platform.machine()
