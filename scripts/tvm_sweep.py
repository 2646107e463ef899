"""The time of every schedule in the tuner's space, for a product of 512 × 512.

    python scripts/tvm_sweep.py             go on, until each has its line
    python scripts/tvm_sweep.py --check 5   measure the first five again

The lesson on TVM replays its search on these times, with many seeds, at no cost. One
thread, and its own time; the minimum of four runs, with torch.mm's beside it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sweeping import sweep

import llmlab.compilers.tvm
from llmlab.compilers.back_end.run import seconds_of
from llmlab.compilers.tvm import tuner
from llmlab.compilers.tvm.product import matmul
from llmlab.compilers.tvm.with_tvm import compiled, prim_func, scheduled, this_cpu

FILE = Path(llmlab.compilers.tvm.__file__).parent / "data" / "schedules.csv"
FIELDS = ["rows", "columns", "steps", "packed", "by_columns", "ms", "torch_ms"]
FIELDS += ["cpu", "tvm"]
SIZE = 512
REPEAT = 4


def runs() -> list[tuple]:
    """Every point of the space: last parts of the three tiles, and two choices."""
    space = tuner.product_space(SIZE, SIZE, SIZE)
    last = [[tile[-1] for tile in space[name].options] for name in "ijk"]
    flags = (0, 1)
    return [*itertools.product(*last, flags, flags)]


def runner() -> Callable[..., list]:
    """What measures one schedule."""
    import tvm

    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, SIZE, SIZE), dtype=np.float32)
    ours = [tvm.runtime.tensor(x) for x in (a, b, np.zeros_like(a))]
    theirs = [torch.from_numpy(x) for x in (a, b)]
    out = torch.empty(SIZE, SIZE)
    function = prim_func(matmul(SIZE, SIZE, SIZE))

    def measure(rows: int, columns: int, steps: int, packed: int, down: int) -> list:
        decisions = {
            "i": (SIZE // rows, rows),
            "j": (SIZE // columns, columns),
            "k": (SIZE // steps, steps),
            "packed": bool(packed),
            "by_columns": bool(down),
        }
        schedule = tuner.product_schedule(decisions)
        main = compiled(scheduled(function, schedule))["main"]
        calls = (lambda: main(*ours), lambda: torch.mm(*theirs, out=out))
        # of this thread: what other processes take does not count
        best = seconds_of(*calls, rounds=REPEAT, clock=time.thread_time)
        times = [f"{1e3 * each:.3f}" for each in best]
        key = [rows, columns, steps, packed, down]
        return [*key, *times, this_cpu()["mcpu"], tvm.__version__]

    return measure


if __name__ == "__main__":
    sweep(__doc__, FILE, FIELDS, runs(), runner, shown="ms")
