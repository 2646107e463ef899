"""Which warm process may serve a kernel, and where its socket lies.

A fork takes over what its parent took from its environment when it was imported, and
what the system gave it: its limits, its processors, its namespaces. So all of that goes
into a hash, and the hash is the socket's name. What a fork can change afterwards (the
folder, the other variables, the streams, the mask of new files) does not.

The socket lies in a folder that only its user may enter. It is never reached through a
link that somebody else made.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

PREFIXES = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "GOTO_", "BLIS_", "DNNL_"),
    *("ONEDNN_", "NPY_", "NUMPY_", "SCIPY_", "ATEN_", "TORCH", "PYTORCH", "TRITON_"),
    *("CUDA_", "NVIDIA_", "HIP_", "ROCR_", "ROCM_", "BNB_", "BITSANDBYTES_"),
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "ACCELERATE_", "PEFT_"),
    *("DS_", "USE_", "JAXTYPING_", "TQDM_", "MPL", "PYTHON"),
    *("LD_", "LC_", "XDG_", "MALLOC_", "GLIBC_"),
)
NAMES = {"LANG", "LANGUAGE", "HOME", "TZ", "TMPDIR", "TEMP", "TMP"}
STATUS = ("Uid", "Gid", "Groups", "CapPrm", "CapEff", "NoNewPrivs", "Seccomp")
RESTORED = (1 << 12) | (1 << 24)  # SIGPIPE, SIGXFSZ: Popen puts them back
SOCKET_PATH = 107  # bytes; the system's limit


class NoPlace(Exception):
    """There is no folder for the socket that is this user's alone."""


def import_time(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that a library may read while it is imported."""
    return {
        name: value
        for name, value in sorted(env.items())
        if name in NAMES or name.startswith(PREFIXES)
    }


def key(env: Mapping[str, str], flags: tuple[str, ...] = (), cwd: str = "") -> str:
    """The name of the warm process that may serve a kernel with these variables.

    Args:
        env: the kernel's variables.
        flags: options of the interpreter itself, as in `python -X dev`.
        cwd: the kernel's folder; it counts when PYTHONPATH has a relative part.
    """
    parts = env.get("PYTHONPATH", "").split(os.pathsep)
    relative = "PYTHONPATH" in env and not all(map(os.path.isabs, parts))
    facts: dict[str, Any] = {
        "env": import_time(env),
        "flags": flags,
        "cwd": cwd if relative else "",
        "python": [sys.executable, sys.prefix, sys.version],
        "installed": installed(),
        "here": own_files(),
        "process": process(),
    }
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def installed() -> list[tuple[str, int]]:
    """What is installed: it changes when a package comes, goes or is replaced."""
    found = []
    for folder in sys.path:
        if os.path.basename(folder) not in ("site-packages", "dist-packages"):
            continue
        try:
            entries = list(os.scandir(folder))
        except OSError:
            continue
        for entry in entries:
            if entry.name.endswith((".dist-info", ".egg-info", ".pth", ".egg-link")):
                found.append((entry.path, entry.stat().st_mtime_ns))
    return sorted(found)


def own_files() -> list[tuple[str, int]]:
    """This package's files, so that another checkout or an edit is noticed."""
    here = Path(__file__).parent
    return [(str(path), path.stat().st_mtime_ns) for path in sorted(here.glob("*.py"))]


def process() -> dict[str, Any]:
    """What a process passes on to its children and a fork's parent cannot change."""
    import resource

    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    limits = {
        name: resource.getrlimit(getattr(resource, name))
        for name in dir(resource)
        if name.startswith("RLIMIT_")
    }
    spaces = Path("/proc/self/ns")
    return {
        "status": [status.get(name) for name in STATUS],
        "ignored": int(status.get("SigIgn", "0"), 16) & ~RESTORED,
        "limits": limits,
        "cpus": sorted(os.sched_getaffinity(0)),
        "nice": [os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)],
        "spaces": {n.name: os.readlink(n) for n in sorted(spaces.iterdir())},
        "group": Path("/proc/self/cgroup").read_text(),
    }


def umask() -> int:
    """The mask of new files, read without changing it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o022


def folder() -> Path:
    """The folder of this user's sockets; it is made when it is missing.

    Raises:
        NoPlace: neither the user's runtime folder nor the one for temporary files
            has a place that is this user's alone.
    """
    homes = [Path(tempfile.gettempdir())]
    if os.environ.get("XDG_RUNTIME_DIR"):
        homes.insert(0, Path(os.environ["XDG_RUNTIME_DIR"]))
    why = []
    for home in homes:
        place = home / f"llmlab-warm-{os.geteuid()}"
        if len(os.fsencode(place)) + 30 > SOCKET_PATH:
            why.append(f"{place} is too long a name for a socket")
            continue
        try:
            own(place)
            return place
        except OSError as error:
            why.append(f"{place}: {error.strerror or error}")
    raise NoPlace("; ".join(why))


def own(place: Path) -> None:
    """Makes the folder, or makes sure that it is a folder of this user's alone.

    Raises:
        OSError: it cannot be made, is a link, or others may enter it.
    """
    with suppress(FileExistsError):
        place.mkdir(mode=0o700)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise OSError("it is no folder")
    if found.st_uid != os.geteuid():
        raise OSError("it belongs to another user")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise OSError("others may enter it")
