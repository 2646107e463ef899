"""Memory and time of attention: llmlab/inference/data/flash_attention.csv.

    python scripts/flash_attention_sweep.py            continue, a line a run
    python scripts/flash_attention_sweep.py --check 1  run that many lines again and
                                                       compare what autograd saves

One head of 64 channels, causal, fp32, N tokens, forward and backward, one thread. Each
run has a process of its own: memory is the largest resident set over what was there
before, time the CPU's, the best of five. Both are of the machine that ran it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sweeping import append, read, versions
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmlab.inference.flash_attention import (
    FILE,
    flash_attention,
    standard_attention,
)

WAYS = ("standard", "tiles", "sdpa math", "sdpa flash")
RUNS = [(way, n, 1) for n in (1024, 2048, 4096, 8192) for way in WAYS]
RUNS += [(way, 8192, 2) for way in WAYS]  # by how much do two runs differ?
FIELDS = ("way", "tokens", "run")


def attend(way: str, q, k, v):
    """Causal attention in one of the ways."""
    if way == "standard":
        return standard_attention(q, k, v)
    if way == "tiles":
        return flash_attention(q, k, v, rows=256, cols=256)
    backend = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}
    with sdpa_kernel(backend[way.removeprefix("sdpa ")]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def measure(way: str, n: int) -> dict:
    """Bytes saved for backward, the largest resident set, seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tensors = [torch.randn(1, 1, n, 64) for _ in range(4)]
    saved: dict[int, int] = {}

    def pack(x):
        storage = x.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return x

    def run(q, k, v, do) -> None:
        saved.clear()
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = attend(way, *inputs)
        out.backward(do)

    run(*(x[..., :128, :].clone() for x in tensors))  # what torch sets up once
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    run(*tensors)
    peak = status("VmHWM") - before
    seconds = []
    for _ in range(5):
        begin = time.process_time()
        run(*tensors)
        seconds.append(time.process_time() - begin)
    return {
        "saved_mib": round(sum(saved.values()) / 2**20, 2),
        "peak_mib": round(peak / 2**20, 1),
        "seconds": round(min(seconds), 4),
    }


def line(key: tuple) -> dict:
    """A run in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps(key)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    torch_version, python = versions()
    return {
        **dict(zip(FIELDS, key, strict=True)),
        **json.loads(found),
        "torch": torch_version,
        "python": python,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", type=int, default=0)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        way, n, _ = json.loads(asked.one)
        print(json.dumps(measure(way, n)))
        return
    stored = read(FILE)
    if asked.check:
        for old in stored[: asked.check]:
            new = line((old["way"], int(old["tokens"]), int(old["run"])))
            same = float(old["saved_mib"]) == new["saved_mib"]
            print("same" if same else "DIFFERS", old, new)
        return
    done = {tuple(row[name] for name in FIELDS) for row in stored}
    for key in RUNS:
        if tuple(map(str, key)) not in done:
            append(FILE, line(key))


if __name__ == "__main__":
    main()
