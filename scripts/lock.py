"""Write requirements.lock and environment.yml.

Their versions are those that are installed and were run together.

    .venv/bin/python scripts/lock.py            write both
    .venv/bin/python scripts/lock.py --check    say what differs; exit 1 then
    .venv/bin/python scripts/lock.py --resolve macosx_arm64

The last one asks pip which of the lock's packages have no wheel for that platform, and
installs nothing. It also takes manylinux_aarch64 and manylinux_x86_64. It exits with 1
if a package has no wheel and no marker.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("book", "compilers", "chips", "test", "nbgrader")
# Packages that some platform does not get, and the marker that says so.
MARKERS = {"triton": 'sys_platform == "linux"'}
# Wheels that say they run anywhere and hold programs for one platform.
NATIVE_TOO = {"playwright"}
FROM_SOURCE = {
    "deepspeed": "an sdist everywhere; DS_BUILD_OPS=0 builds it with no compiler"
}
# What pip is asked for, from the newest platform tag that a wheel may carry down.
PLATFORMS = {
    "macosx_arm64": [
        *(f"macosx_{major}_0_arm64" for major in (14, 13, 12, 11)),
        *(f"macosx_{major}_0_universal2" for major in (14, 13, 12, 11)),
        *(f"macosx_10_{minor}_universal2" for minor in (15, 14, 13, 12, 10, 9)),
    ],
    "manylinux_aarch64": [
        *(f"manylinux_2_{minor}_aarch64" for minor in (28, 27, 26, 24, 17)),
        "manylinux2014_aarch64",
    ],
    "manylinux_x86_64": [
        *(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 26, 24, 17, 12, 5)),
        "manylinux2014_x86_64",
        "manylinux2010_x86_64",
        "manylinux1_x86_64",
    ],
}
TARGETS = {
    "macosx_arm64": {"sys_platform": "darwin", "platform_machine": "arm64"},
    "manylinux_aarch64": {"sys_platform": "linux", "platform_machine": "aarch64"},
    "manylinux_x86_64": {"sys_platform": "linux", "platform_machine": "x86_64"},
}
LOCK_HEADER = """\
# Versions that were run together. Do not edit: scripts/lock.py writes this file from a
# working environment.
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
    extras = [
        line for extra in EXTRAS for line in project["optional-dependencies"][extra]
    ]
    return [Requirement(line) for line in project["dependencies"] + extras]


def resolved() -> dict[str, str]:
    """Every package that the project needs, directly or not, as installed here."""
    pins: dict[str, str] = {}
    todo = [(normal(r.name), tuple(sorted(r.extras))) for r in direct()]
    seen = set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            # 2.13.0+cpu is 2.13.0 built without CUDA
            pins[name] = version(name).split("+")[0]
        except PackageNotFoundError:
            continue  # wanted on another platform only
        todo += [(normal(r.name), tuple(sorted(r.extras))) for r in needs(name, extras)]
    return dict(sorted(pins.items()))


def needs(name: str, extras: tuple[str, ...]) -> list[Requirement]:
    """The requirements of an installed package that apply here."""
    found = [Requirement(line) for line in requires(name) or []]
    wanted = ("", *extras)
    return [
        r
        for r in found
        if not r.marker or any(r.marker.evaluate({"extra": extra}) for extra in wanted)
    ]


def lock_text() -> str:
    lines = [pinned(name, at) for name, at in resolved().items()]
    return LOCK_HEADER + "".join(f"{line}\n" for line in lines)


def pinned(name: str, at: str) -> str:
    line = f"{name}=={at}"
    if name in MARKERS:
        line += f" ; {MARKERS[name]}"
    return line


def conda_text() -> str:
    pins = resolved()
    names = dict.fromkeys(normal(r.name) for r in direct())
    lines = [f"      - {pinned(name, pins[name])}" for name in names]
    return CONDA.format(pins="\n".join(lines), extras=",".join(EXTRAS))


def has_native_code(name: str) -> bool:
    """Whether the installed wheel is for one platform: others run anywhere."""
    wheel = distribution(name).read_text("WHEEL") or ""
    anywhere = re.search(r"^Tag: \S+-none-any$", wheel, re.MULTILINE)
    return not anywhere or name in NATIVE_TOO


def has_wheel(name: str, at: str, platform: str) -> tuple[bool, str]:
    """Whether pip finds a wheel for Python 3.11 there, and what it says if not."""
    tags = [f"--platform={tag}" for tag in PLATFORMS[platform]]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps"]
    command += ["--ignore-installed", "--quiet"]
    command += ["--python-version=3.11", "--only-binary=:all:", *tags]
    # pip asks for one, and leaves it empty
    with tempfile.TemporaryDirectory() as folder:
        command += ["--target", folder, f"{name}=={at}"]
        done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    errors = [line for line in lines if line.startswith("ERROR: No")]
    reason = (errors or lines or ["pip gave no reason"])[-1]
    return done.returncode == 0, reason


def resolve(platform: str) -> int:
    """Print which packages of the lock have a wheel for a platform; 1 if one lacks it.

    Pip evaluates markers for the machine that it runs on, so they are evaluated here,
    for the platform that is asked about.
    """
    if platform not in PLATFORMS:
        print(f"--resolve {platform!r} must be one of {', '.join(PLATFORMS)}")
        return 2
    missing = []
    pins = resolved()
    native = [name for name in pins if has_native_code(name)]
    anywhere = len(pins) - len(native)
    print(
        f"{platform}: {anywhere} packages run anywhere, {len(native)} have native code"
    )
    for name in native:
        line = f"  {name}=={pins[name]}"
        if name in MARKERS and not Marker(MARKERS[name]).evaluate(TARGETS[platform]):
            print(f"{line}: not wanted there ({MARKERS[name]})", flush=True)
            continue
        found, reason = has_wheel(name, pins[name], platform)
        if not found:
            missing.append(name)
        print(f"{line}: {'a wheel' if found else reason}", flush=True)
    for name, how in FROM_SOURCE.items():
        print(f"  {name}: {how}")
    lacking = [name for name in missing if name not in FROM_SOURCE]
    print(f"{platform}: without a wheel: {', '.join(lacking) or 'none'}")
    return int(bool(lacking))


def main() -> int:
    if "--resolve" in sys.argv:
        return resolve(" ".join(sys.argv[sys.argv.index("--resolve") + 1 :]))
    stale = 0
    for path, text in (
        (ROOT / "requirements.lock", lock_text()),
        (ROOT / "environment.yml", conda_text()),
    ):
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
