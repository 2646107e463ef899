"""What was compiled once and kept: the facts of each kernel for each target.

`scripts/triton_sweep.py` writes the file, and checks it. Layouts stand in it once.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from llmlab.compilers.triton_kernels.compiling import Job

FILE = Path(__file__).parents[1] / "data" / "triton.json"


def key(job: Job) -> str:
    """A job in words: "mlp_tile sm_90 fp16 128x128x64 warps 8 stages 3"."""
    constants = job.all_constants
    sizes = [
        constants[n] for n in ("ROWS", "M", "COLS", "N", "DEPTH") if n in constants
    ]
    tile = "x".join(map(str, sizes))
    return (
        f"{job.kernel} {job.target} {job.dtype} {tile}"
        f" warps {job.warps} stages {job.stages}"
    )


def refused(job: Job, words: str) -> dict:
    """The entry of a job that the compiler does not take."""
    return {**job.described, "refused": words}


@cache
def read() -> dict[str, dict]:
    """Key → facts, as `reading.facts` made them."""
    return json.loads(FILE.read_text(encoding="utf-8"))["kernels"]


def triton_version() -> str:
    """Of the compiler that made them."""
    return json.loads(FILE.read_text(encoding="utf-8"))["triton"]


def of(job: Job) -> dict:
    """The facts of a job.

    Raises:
        KeyError: it was not compiled; the message has its key.
    """
    return read()[key(job)]


def candidates(target: str) -> list[dict]:
    """The mlp's tiles that were compiled for a target."""
    every = read().values()
    return [f for f in every if (f["kernel"], f["target"]) == ("mlp_tile", target)]


def write(found: dict[str, dict], version: str) -> None:
    """One line per kernel, so that a change can be read."""
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()]
    body = ",\n".join(lines)
    FILE.parent.mkdir(exist_ok=True)
    text = f'{{"triton": {json.dumps(version)}, "kernels": {{\n{body}\n}}}}\n'
    FILE.write_text(text, encoding="utf-8")
