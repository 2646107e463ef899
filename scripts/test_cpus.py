"""The methods' tests and all lessons as other CPUs would run them. `make test-cpus`.

python scripts/test_cpus.py                 everything (hours)
python scripts/test_cpus.py --today         the part whose day it is (about a minute)
python scripts/test_cpus.py --part 3/170    one part of 170
python scripts/test_cpus.py --list          the matrix and its parts; runs nothing
python scripts/test_cpus.py tests/peft/qlora/test_nf4.py    one file under every setting

A setting is three choices:

    vectors        torch's kernels without vector instructions (default), with AVX2, or
                   the machine's best. `default` turns the matrix libraries down too:
                   torch's switch does not reach MKL and oneDNN
    bitsandbytes   what it is told of the CPU: avx2, avx512, or avx512bf16, where it
                   repacks 4-bit weights in eval mode and computes in bf16. Stand-ins in
                   tests/peft/bitsandbytes_as take the native code's place
    threads        1 or 4, whatever the number of cores: sums are cut in other places

It does not stand for a CPU of another make: AVX-512 and ARM have kernels of their own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAND_INS = ROOT / "tests" / "peft" / "bitsandbytes_as"
# Where 4 bits are used: the others need not be run once for each of bitsandbytes'
# paths.
FOUR_BITS = ("tests/peft/", "tests/compression/", "04-peft/", "06-compression/")
FOLDERS = ("models", "peft", "compression", "training", "parallelism")
BUDGET = 50.0  # seconds that a part is planned to take
LIMIT = 70.0  # seconds after which it starts nothing more
KERNEL = 4.0  # seconds to start a kernel and pytest
LESSON = 30.0  # seconds that a lesson may take
TEST_FILE = 12.0  # seconds that a file of tests takes if nothing better is known
SHARD = "LLMLAB_TEST_SHARD"

VECTORS: dict[str, dict[str, str]] = {
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "best": {},
}
BITSANDBYTES = ("avx2", "avx512", "avx512bf16")
THREADS = (1, 4)
# Files of tests that take much longer than TEST_FILE, in seconds on two cores with one
# thread. They are cut into shards of BUDGET at most.
SECONDS: dict[str, float] = {
    "tests/peft/test_held_out.py": 200.0,
    "tests/peft/test_held_out_together.py": 60.0,
    "tests/peft/qlora/test_nf4.py": 30.0,
    "tests/peft/qlora/test_qlora.py": 60.0,
    "tests/peft/adalora/test_adalora.py": 60.0,
}


@dataclass(frozen=True)
class Setting:
    """One CPU to run as."""

    vectors: str
    bitsandbytes: str
    threads: int

    def __str__(self) -> str:
        threads = f"{self.threads} thread" + "s" * (self.threads > 1)
        return f"{self.vectors}, bitsandbytes {self.bitsandbytes}, {threads}"

    def environment(self) -> dict[str, str]:
        """What is set for pytest, and reaches kernels and ranks that it starts."""
        paths = [str(STAND_INS), str(ROOT)]
        return VECTORS[self.vectors] | {
            "BITSANDBYTES_AS_ON": self.bitsandbytes,
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_DYNAMIC": "FALSE",  # else MKL holds torch to the number of cores
            "PYTHONPATH": os.pathsep.join(paths),
            "TOKENIZERS_PARALLELISM": "false",
        }


@dataclass(frozen=True)
class Piece:
    """What is run at once: a lesson, or a share of a file of tests."""

    path: str
    seconds: float
    shard: int = 0
    shards: int = 1

    def __str__(self) -> str:
        share = f" ({self.shard + 1} of {self.shards})" if self.shards > 1 else ""
        return f"{self.path}{share}"


@dataclass(frozen=True)
class Cell:
    """One square of the matrix."""

    setting: Setting
    piece: Piece


def settings(vectors: dict[str, dict[str, str]] = VECTORS) -> list[Setting]:
    """Every combination, neighbours as unlike as can be."""
    every = product(THREADS, BITSANDBYTES, vectors)
    return [Setting(v, b, threads) for threads, b, v in every]


def pieces(root: Path = ROOT) -> list[Piece]:
    """Files of the methods' tests in shards, and lessons with their last known time."""
    found = []
    for folder in FOLDERS:
        for path in sorted((root / "tests" / folder).glob("test_*.py")):
            name = path.relative_to(root).as_posix()
            seconds = SECONDS.get(name, TEST_FILE)
            shards = int(-(-seconds // BUDGET))
            found += [Piece(name, seconds / shards, i, shards) for i in range(shards)]
    record = root / "jupyter-book" / "verified.json"
    runs = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    for home in ("notebooks", "solutions"):
        for path in sorted((root / home).rglob("*.ipynb")):
            if ".ipynb_checkpoints" in path.parts:
                continue
            name = path.relative_to(root).as_posix()
            run = runs.get(name.removesuffix(".ipynb"), {})
            # a record above the house's limit says that the machine was busy
            seconds = min(run.get("seconds", 20.0), LESSON)
            found.append(Piece(name, seconds + KERNEL))
    return found


def cells(pieces: list[Piece], settings: list[Setting]) -> list[Cell]:
    """Every piece under every setting; each round runs all pieces, settings in turn.

    So a piece is run again after one round, and then under another setting. What has
    nothing to do with bitsandbytes is run under one of its paths alone.
    """
    found = []
    for turn in range(len(settings)):
        for at, piece in enumerate(pieces):
            setting = settings[(at + turn) % len(settings)]
            is_plain = setting.bitsandbytes == BITSANDBYTES[0]
            if is_plain or any(place in piece.path for place in FOUR_BITS):
                found.append(Cell(setting, piece))
    return found


def parts(cells: list[Cell], budget: float = BUDGET) -> list[list[Cell]]:
    """The cells in order, cut so that a part takes `budget` seconds at most.

    A cell that takes longer than that is a part of its own.
    """
    found: list[list[Cell]] = []
    for cell in cells:
        part = [*found[-1], cell] if found else [cell]
        if not found or math.fsum(each.piece.seconds for each in part) > budget:
            found.append([])
        found[-1].append(cell)
    return found


def part_of_day(day: date, count: int) -> int:
    """Which of `count` parts has its day: one after the other, and then again."""
    return day.toordinal() % count


def share(cells: list[Cell], number: int, count: int) -> list[Cell]:
    """Part `number` (from 1) of `count` parts of nearly one length.

    Raises:
        ValueError: a number that is not among 1 … count.
    """
    if not 1 <= number <= count:
        raise ValueError(f"--part {number}/{count}: the first must lie in 1 … {count}")
    return cells[(number - 1) * len(cells) // count : number * len(cells) // count]


def run(cell: Cell) -> int:
    """Run one cell; pytest's exit code. 5 (no test selected) counts as passed."""
    piece = cell.piece
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
    command += ["--no-header", "-W", "ignore", "--tb=short"]
    if piece.path.endswith(".ipynb"):
        command += ["-o", "addopts=", "-p", "scripts.nbval_plugin", "--nbval"]
        command += ["--nbval-cell-timeout=240"]
        command += ["--nbval-sanitize-with=scripts/sanitize.cfg"]
    else:
        command += ["-p", "scripts.test_cpus", "--timeout=300"]
    env = os.environ | cell.setting.environment()
    env[SHARD] = f"{piece.shard}/{piece.shards}"
    code = subprocess.run([*command, piece.path], cwd=ROOT, env=env).returncode
    return 0 if code == 5 else code


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """In pytest, as a plugin: keep every n-th test, those of this shard."""
    shard, _, shards = os.environ.get(SHARD, "0/1").partition("/")
    items[:] = items[int(shard) :: int(shards)]


def run_all(
    cells: list[Cell],
    limit: float | None,
    run: Callable[[Cell], int] = run,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run cells and print a table; 1 if any failed. None is started after `limit` s."""
    started = clock()
    results: list[tuple[Cell, str, float]] = []
    for cell in cells:
        before = clock()
        if limit is not None and results and before - started > limit:
            results.append((cell, "NOT RUN: out of time", 0.0))
            continue
        print(f"\n=== {cell.piece} · {cell.setting}", flush=True)
        verdict = "passed" if run(cell) == 0 else "FAILED"
        results.append((cell, verdict, clock() - before))
    print("\nseconds  verdict  what, as which CPU")
    for cell, verdict, seconds in results:
        print(f"{seconds:7.1f}  {verdict:7}  {cell.piece} · {cell.setting}")
    return int(any(verdict == "FAILED" for _, verdict, _ in results))


def print_matrix(every: list[Cell], division: list[list[Cell]]) -> None:
    """The axes, and how many days a round takes."""
    import torch

    best = torch.backends.cpu.get_cpu_capability()
    used = list(dict.fromkeys(cell.setting for cell in every))
    kinds = {cell.piece for cell in every}
    print(f"{len(used)} settings; this machine's best: {best}")
    for name in ("vectors", "bitsandbytes", "threads"):
        values = dict.fromkeys(str(getattr(setting, name)) for setting in used)
        print(f"  {name:13} {', '.join(values)}")
    print(f"{len(kinds)} pieces, {len(every)} cells, {len(division)} parts")


def here() -> dict[str, dict[str, str]]:
    """The vectors that this machine can be told to use; `best` is never left out.

    Torch refuses a capability that its build does not know (AVX2 on ARM), and where the
    best is AVX2 the two are one setting.
    """
    import torch

    best = torch.backends.cpu.get_cpu_capability()
    known = dict(VECTORS)
    if not best.startswith("AVX512"):
        known.pop("avx2")
    return known


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python scripts/test_cpus.py",
        description=__doc__.partition("\n")[0],
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--today", action="store_true", help="the part of this date")
    which.add_argument("--part", metavar="N/M", help="part N (from 1) of M")
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("paths", nargs="*", help="only these files")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    known = pieces()
    chosen = [p for p in known if not args.paths or p.path in args.paths]
    unknown = sorted(set(args.paths) - {p.path for p in known})
    if unknown:
        print(f"{', '.join(unknown)}: no test file of {FOLDERS} and no lesson")
        return 2
    every = cells(chosen, settings(here()))
    division = parts(every)
    print_matrix(every, division)
    limit = None
    if args.today:
        today = date.today()
        at = part_of_day(today, len(division))
        every = division[at]
        limit = LIMIT
        print(f"{today}: part {at + 1} of {len(division)}")
    elif args.part:
        number, _, count = args.part.partition("/")
        if not (number.isdigit() and count.isdigit()):
            print(f"--part {args.part!r}: write N/M, as in 3/170")
            return 2
        try:
            every = share(every, int(number), int(count))
        except ValueError as error:
            print(error)
            return 2
    if args.list:
        for cell in every:
            print(f"  {cell.piece} · {cell.setting}")
        return 0
    return run_all(every, limit)


if __name__ == "__main__":
    sys.exit(main())
