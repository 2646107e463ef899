"""Write requirements.lock and environment.yml from what is installed and was run together.

.venv/bin/python scripts/lock.py            write both
.venv/bin/python scripts/lock.py --check    say what differs, exit 1 if anything does
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("book", "test", "nbgrader")
ONLY_LINUX = {"triton"}
LOCK_HEADER = """\
# Versions that were run together. Written by scripts/lock.py from a working environment: do not edit.
# Torch is installed first, on its own (see scripts/environment.py).
"""
CONDA = """\
# The same versions for users of conda. Written by scripts/lock.py: do not edit.
#   conda env create --file environment.yml && conda activate llmlab && llmlab lab
name: llmlab
channels: [conda-forge]
dependencies:
  - python=3.11
  - pip
  - pip:
{pins}
      - --constraint requirements.lock
      - --editable .[{extras}]
"""


def normal(name: str) -> str:
    """PEP 503's form of a package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def direct() -> list[Requirement]:
    """What pyproject.toml asks for, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in project["dependencies"] + extras]


def resolved() -> dict[str, str]:
    """Every package that the project needs, directly or not, at the version installed here."""
    pins: dict[str, str] = {}
    todo = [(normal(r.name), tuple(sorted(r.extras))) for r in direct()]
    seen = set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            pins[name] = version(name).split("+")[0]  # 2.13.0+cpu is 2.13.0 built without CUDA
        except PackageNotFoundError:
            continue  # wanted on another platform only
        todo += [(normal(r.name), tuple(sorted(r.extras))) for r in needs(name, extras)]
    return dict(sorted(pins.items()))


def needs(name: str, extras: tuple[str, ...]) -> list[Requirement]:
    """The requirements of an installed package that apply here."""
    found = [Requirement(line) for line in requires(name) or []]
    return [r for r in found if not r.marker or any(r.marker.evaluate({"extra": e}) for e in ("", *extras))]


def lock_text() -> str:
    return LOCK_HEADER + "".join(f"{pinned(name, v)}\n" for name, v in resolved().items())


def pinned(name: str, at: str) -> str:
    return f"{name}=={at}" + (' ; sys_platform == "linux"' if name in ONLY_LINUX else "")


def conda_text() -> str:
    pins = resolved()
    names = dict.fromkeys(normal(r.name) for r in direct())
    lines = [f"      - {pinned(name, pins[name])}" for name in names]
    return CONDA.format(pins="\n".join(lines), extras=",".join(EXTRAS))


def main() -> int:
    stale = 0
    for path, text in ((ROOT / "requirements.lock", lock_text()), (ROOT / "environment.yml", conda_text())):
        old = path.read_text() if path.exists() else ""
        if "--check" in sys.argv and old != text:
            differs = sorted(set(old.splitlines()) ^ set(text.splitlines()))
            print(f"{path.name} differs from what is installed:", *differs, sep="\n  ")
            stale = 1
        elif "--check" not in sys.argv:
            path.write_text(text)
            print(f"{path.name}: {len(text.splitlines())} lines")
    return stale


if __name__ == "__main__":
    sys.exit(main())
