"""Make the course's environment in `.venv`: the pinned lock, torch first. Needs nothing but Python's standard library.

Run by `make`; doing it again when nothing changed takes no time and no network.

    TORCH=cpu   Linux without an NVIDIA GPU: take PyTorch's CPU build (a tenth of the download)
    TORCH=URL   take torch from another wheel index
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


def main() -> int:
    """Create or refresh the environment; 0 when it stands, 1 when something could not be installed."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        found = ".".join(map(str, sys.version_info[:3]))
        print(f"llmlab needs Python 3.11, 3.12 or 3.13; this is {found}. Try: make PYTHON=python3.12 lab")
        return 1
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text() == fingerprint():
        return 0
    started = time.time()
    print(f"Making the environment in {VENV.name}/ (once; about 3 GB of disk)")
    if not runs():
        shutil.rmtree(VENV, ignore_errors=True)
        venv.create(VENV, with_pip=True)
    for title, arguments in steps():
        print(f"  {title} …", flush=True)
        done = subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", *arguments], cwd=ROOT, env=environment())
        if done.returncode:
            print(f"\n'{title}' failed (see above). Check the network and the disk, then run the same command again.")
            return 1
    STAMP.write_text(fingerprint())
    print(f"  ready in {time.time() - started:.0f} s")
    return 0


def steps() -> list[tuple[str, list[str]]]:
    """What pip is asked to do, in order. Torch comes first and pinned, or a later package would choose another build."""
    return [
        ("pip", ["--upgrade", "pip>=25"]),
        ("torch", [pin("torch"), *torch_index()]),
        ("the other packages", ["-r", str(LOCK)]),
        ("llmlab", ["--no-deps", "--editable", "."]),
    ]


def torch_index() -> list[str]:
    """Where torch comes from besides pip's own configuration."""
    where = os.environ.get("TORCH", "")
    return ["--extra-index-url", CPU_WHEELS if where == "cpu" else where] if where else []


def pin(name: str) -> str:
    """The lock's line for one package."""
    for line in LOCK.read_text().splitlines():
        if line.startswith(f"{name}=="):
            return line.split(";")[0].strip()
    raise SystemExit(f"{LOCK.name} has no line for {name}")


def environment() -> dict[str, str]:
    """DeepSpeed must not compile its CUDA operators while it is installed."""
    return os.environ | {"DS_BUILD_OPS": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def runs() -> bool:
    """Whether `.venv` holds a Python of the same version that still starts (a moved folder's does not)."""
    code = f"import sys; sys.exit(sys.version_info[:2] != {tuple(sys.version_info[:2])!r})"
    return PYTHON.exists() and subprocess.run([PYTHON, "-c", code], capture_output=True).returncode == 0


def fingerprint() -> str:
    """Changes when the lock, the package's own metadata or the place of the checkout change."""
    text = LOCK.read_bytes() + (ROOT / "pyproject.toml").read_bytes() + str(ROOT).encode()
    return hashlib.sha256(text).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
