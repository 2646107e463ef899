"""Make the course's environment in `.venv`: the pinned lock, torch first.

Needs nothing but Python's standard library. `make` runs it; doing it again when
nothing changed takes no time and no network.

    TORCH=cpu      Linux without an NVIDIA GPU: PyTorch's CPU build, a tenth of the size
    TORCH=URL      take torch from another wheel index
    INSTALLER=pip  install everything with pip

Torch is always installed by pip, which knows the machine's own wheel folders. The
other 200 packages go through uv where it can be had, because it takes a quarter of
the time. When uv fails, pip does the same work.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
LOCK = ROOT / "requirements.lock"
STAMP = VENV / ".llmlab-environment"
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
# Python compiles a module when it is first imported; of 30,000 files most never are.
PIP = [str(PYTHON), "-m", "pip", "install", "--quiet", "--no-compile"]
UV = [str(PYTHON), "-m", "uv", "pip", "install", "--quiet", "--python", str(PYTHON)]
CURE = "Check the network and the disk, then run the same command again."


def main() -> int:
    """Create or refresh the environment.

    Returns:
        0 when it stands, 1 when something could not be installed.
    """
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        found = ".".join(map(str, sys.version_info[:3]))
        print(f"llmlab needs Python 3.11, 3.12 or 3.13; this is {found}.")
        print("Try: make PYTHON=python3.12 lab")
        return 1
    if stands():
        return 0
    started = time.time()
    print(f"Making the environment in {VENV.name}/ (once; about 4 GB of disk)")
    if not runs():
        shutil.rmtree(VENV, ignore_errors=True)
        venv.create(VENV, with_pip=True)
    for title, commands in steps():
        print(f"  {title} …", flush=True)
        if not any_succeeds(commands):
            print(f"\n'{title}' failed (see above). {CURE}")
            return 1
    STAMP.write_text(fingerprint())
    print(f"  ready in {time.time() - started:.0f} s")
    return 0


def steps() -> list[tuple[str, list[list[str]]]]:
    """(title, commands) of each step. Later commands are tried when the first fails.

    Torch comes first and pinned, or a later package would choose another build.
    """
    others = ["-r", str(LOCK)]
    installers = [[*PIP, *others]]
    tools = [[*PIP, "--upgrade", "pip>=25"]]
    if os.environ.get("INSTALLER") != "pip":
        installers.insert(0, [*UV, *index_of_pip(), *others])
        tools.insert(0, [*tools[0], "uv>=0.9"])
    return [
        ("pip", tools),
        ("torch", [[*PIP, pin("torch"), *torch_index()]]),
        ("the other packages", installers),
        ("llmlab", [[*PIP, "--no-deps", "--editable", "."]]),
    ]


def any_succeeds(commands: list[list[str]]) -> bool:
    """Run the commands until one succeeds."""
    for i, command in enumerate(commands):
        if i:
            print("  that failed; with pip alone …", flush=True)
        if subprocess.run(command, cwd=ROOT, env=environment()).returncode == 0:
            return True
    return False


def index_of_pip() -> list[str]:
    """The package index that pip is configured for, which uv would not read."""
    asked = [str(PYTHON), "-m", "pip", "config", "get", "global.index-url"]
    found = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    index = os.environ.get("PIP_INDEX_URL") or found
    return ["--default-index", index] if index else []


def torch_index() -> list[str]:
    """Where torch comes from besides pip's own configuration."""
    where = os.environ.get("TORCH", "")
    if not where:
        return []
    return ["--extra-index-url", CPU_WHEELS if where == "cpu" else where]


def pin(name: str) -> str:
    """The lock's line for one package."""
    for line in LOCK.read_text().splitlines():
        if line.startswith(f"{name}=="):
            return line.split(";")[0].strip()
    raise SystemExit(f"{LOCK.name} has no line for {name}")


def environment() -> dict[str, str]:
    """DeepSpeed must not compile its CUDA operators while it is installed."""
    quiet = {"DS_BUILD_OPS": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return os.environ | quiet | {"UV_LINK_MODE": "copy"}


def stands() -> bool:
    """Whether the environment was made from this lock, in this folder."""
    return PYTHON.exists() and STAMP.exists() and STAMP.read_text() == fingerprint()


def runs() -> bool:
    """Whether `.venv` has this Python's version and starts; a moved folder does not."""
    version = tuple(sys.version_info[:2])
    code = f"import sys; sys.exit(sys.version_info[:2] != {version!r})"
    if not PYTHON.exists():
        return False
    return subprocess.run([PYTHON, "-c", code], capture_output=True).returncode == 0


def fingerprint() -> str:
    """Changes when the lock, the package's metadata or the checkout's place change."""
    texts = LOCK.read_bytes() + (ROOT / "pyproject.toml").read_bytes()
    return hashlib.sha256(texts + str(ROOT).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
