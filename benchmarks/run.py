"""Our code against the libraries, side by side in one process: `make bench`.

Each case alternates ours and theirs and reports the median of the per-round ratios, so that a machine that slows down
halfway slows both. `--markdown` prints the README's table; `--only TEXT` runs the cases whose name contains TEXT.

A case is a `Case` from benchmarks/{models,peft,parallelism}.py: two callables that do the same work on the same data.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import statistics
import time
from pathlib import Path

from benchmarks.case import Case

MODULES = ("models", "peft", "parallelism")


def measure(case: Case) -> tuple[float, float, float]:
    """(our median seconds, theirs, median of ours / theirs over the rounds)."""
    case.ours(), case.theirs()  # warm-up: allocators, caches, lazy imports
    ours, theirs = [], []
    for i in range(case.rounds):
        for call, times in ((case.ours, ours), (case.theirs, theirs))[:: 1 if i % 2 else -1]:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(ours), statistics.median(theirs), statistics.median(ratios)


def machine() -> str:
    """Processor, threads and versions, for the line under the table."""
    import peft
    import torch
    import transformers

    cpu = next((x.split(":")[1].strip() for x in _cpuinfo() if x.startswith("model name")), platform.processor())
    return (
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, fp32; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    arguments = parser.parse_args()
    print("| what | ours | theirs | ours / theirs |\n|---|---|---|---|")
    for module in MODULES:
        for make in importlib.import_module(f"benchmarks.{module}").CASES:
            if arguments.only not in make.__name__:
                continue
            case = make()
            ours, theirs, ratio = measure(case)
            print(f"| {case.name} | {ours * 1e3:,.1f} ms | {theirs * 1e3:,.1f} ms | {ratio:.2f} |", flush=True)
    print(f"\n{machine()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
