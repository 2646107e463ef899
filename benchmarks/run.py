"""Our code against the libraries, side by side in one process: `make bench`.

Each case alternates ours and theirs and reports the median of the per-round ratios, so
that a machine that slows down halfway slows both. `--only TEXT` runs the cases whose
name contains TEXT. What it prints is the README's table.

A case is a `Case` from a module beside this one (models, peft, parallelism,
compression, inference, compilers): two callables that do the same work on the same
data.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import statistics

from benchmarks.case import Case, alternate
from llmlab.course import cpu

MODULES = ("models", "peft", "parallelism", "compression", "inference", "compilers")


def measure(case: Case) -> tuple[float, float, float]:
    """(our median seconds, theirs, median of ours / theirs over the rounds).

    Of several ranks, rank 0's.
    """
    if case.ranks:
        from llmlab.parallelism import launch

        ours, theirs = launch(_alternate_on_rank, case.ranks, case)[0]
    else:
        ours, theirs = alternate(case.ours, case.theirs, case.rounds)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(ours), statistics.median(theirs), statistics.median(ratios)


def _alternate_on_rank(comm, case: Case):
    return alternate(case.ours(comm), case.theirs(comm), case.rounds)


def memory(case: Case) -> str:
    """Ours / theirs in MiB, where the case says whose models train."""
    held = case.memory()
    if held is None:
        return "–"
    ours, theirs = held
    return f"{ours / 2**20:.0f} / {theirs / 2**20:.0f} MiB"


def machine() -> str:
    """Processor, threads and versions, for the line under the table."""
    import peft
    import torch
    import transformers

    name, _ = cpu.identify()
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, fp32;"
        f" Python {platform.python_version()}, torch {torch.__version__},"
        f" transformers {transformers.__version__}, peft {peft.__version__}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="", help="run the cases whose name contains this"
    )
    arguments = parser.parse_args()
    print("| what | ours | theirs | ours / theirs | memory, ours / theirs |")
    print("|---|---|---|---|---|")
    for module in MODULES:
        for make in importlib.import_module(f"benchmarks.{module}").CASES:
            if arguments.only not in make.__name__:
                continue
            case = make()
            ours, theirs, ratio = measure(case)
            row = [
                case.name,
                f"{ours * 1e3:,.0f} ms",
                f"{theirs * 1e3:,.0f} ms",
                f"{ratio:.2f}",
                memory(case),
            ]
            print(f"| {' | '.join(row)} |", flush=True)
    print(f"\n{machine()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
