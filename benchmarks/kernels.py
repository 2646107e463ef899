"""Warm kernels beside plain ones: from starting a kernel to its first cell's result.

`python -m benchmarks.kernels [--rounds N] [--json FILE]`. Plain and warm kernels run in
turn, whole processes, so that a busy machine slows both alike. Seconds are of the wall
clock, CPU seconds are those of the kernel's own process. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import psutil
from jupyter_client.manager import KernelManager
from jupyter_client.provisioning import KernelProvisionerFactory

from llmlab.course.kernels import (
    PROVISIONER,
    memory,
    starting,
    use_warm_kernels,
    warm_up,
)

CELL = "import torch, transformers, peft\nprint(torch.__version__)"
TARGET = 0.12  # warm to plain


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="kernels of each kind")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    args = parser.parse_args()
    use_warm_kernels()
    started = time.perf_counter()
    why = warm_up(seconds=600)
    if why:
        print(f"no warm process: {why}")
        return 1
    ready = time.perf_counter() - started
    path = starting.socket_path(os.environ, (), os.getcwd())
    warm_process = starting.ask(path, {"ask": "state"})["pid"]
    rounds = [
        (first_cell("local-provisioner"), first_cell(PROVISIONER))
        for _ in range(args.rounds)
    ]
    plain, warm = zip(*rounds, strict=True)
    found = {
        "warm process ready after s": round(ready, 1),
        "plain s": middle(plain, "seconds"),
        "warm s": middle(warm, "seconds"),
        "plain CPU s": middle(plain, "cpu"),
        "warm CPU s": middle(warm, "cpu"),
        "warm process MiB": mib(memory.held(warm_process)["rss"]),
        "plain kernel MiB": mib(statistics.median(one["rss"] for one in plain)),
        "warm kernel MiB": mib(statistics.median(one["rss"] for one in warm)),
        "of these its own": mib(statistics.median(one["own"] for one in warm)),
    }
    found["ratio"] = round(found["warm s"] / found["plain s"], 3)
    found["ratio of CPU"] = round(found["warm CPU s"] / found["plain CPU s"], 3)
    for name, value in found.items():
        print(f"{name:<28} {value:>8}")
    print(f"target: ratio at most {TARGET}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["ratio"] <= TARGET else 1


def first_cell(provisioner: str) -> dict[str, float]:
    """Starts a kernel, runs the cell, ends the kernel."""
    KernelProvisionerFactory.instance().default_provisioner_name = provisioner
    manager = KernelManager()
    started = time.perf_counter()
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=300)
        said: list[str] = []
        client.execute_interactive(
            CELL,
            output_hook=lambda message: said.append(message["content"].get("text", "")),
            timeout=300,
        )
        seconds = time.perf_counter() - started
        if not "".join(said).strip():
            raise RuntimeError("the first cell printed nothing")
        times = psutil.Process(manager.provisioner.pid).cpu_times()
        held = memory.held(manager.provisioner.pid)
        return {"seconds": seconds, "cpu": times.user + times.system, **held}
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def middle(runs: tuple[dict[str, float], ...], name: str) -> float:
    """The median, to a hundredth of a second."""
    return round(statistics.median(run[name] for run in runs), 2)


def mib(size: float) -> int:
    """Bytes in MiB."""
    return round(size / memory.MIB)


if __name__ == "__main__":
    raise SystemExit(main())
