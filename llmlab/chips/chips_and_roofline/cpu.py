"""The machine that runs this, measured as a chip.

Bandwidth is a sum over a tensor much larger than the caches; speed is a product of two
matrices in each format. Both are the best of a few: the roof is what the machine can
do, not what it did while another program ran.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import torch

from llmlab.models import codes, machine
from llmlab.models.chips import Chip

FORMATS = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
}


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b; products of int8 are added up in int32, exactly."""
    return codes.product(a, b) if a.dtype == torch.int8 else a @ b


@torch.inference_mode()
def speed(
    dtype: torch.dtype,
    size: int = 1024,
    limit: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOP/s of a product of two square matrices, tried for `limit` seconds.

    Without instructions for a format a CPU takes many times as long, so a small product
    goes first, and says how large one may be.

    Raises:
        ValueError: size is below 64, or limit is not positive.
    """
    if size < 64:
        raise ValueError(f"size={size} must be at least 64")
    if not limit > 0:
        raise ValueError(f"limit={limit} must be above 0")
    best = 0.0
    started = clock()
    n = min(128, size)
    while True:
        a = torch.ones(n, n, dtype=dtype)
        multiply(a, a)
        for _ in range(3):
            took = machine.seconds(lambda a=a: multiply(a, a), clock)
            best = max(best, 2 * n**3 / max(took, 1e-9))
        twice = 2 * n
        expected = 4 * 2 * twice**3 / best
        if twice > size or clock() - started + expected > limit:
            return best
        n = twice


def measure(
    megabytes: int = 256, size: int = 1024, limit: float = 1.0
) -> tuple[Chip, dict[str, str]]:
    """This machine as a Chip, and why a format is missing, if one is.

    The memory is what it has in all. Power is not known to a program.
    """
    speeds, missing = {}, {}
    for name, dtype in FORMATS.items():
        try:
            speeds[name] = speed(dtype, size, limit)
        except (RuntimeError, NotImplementedError) as error:
            missing[name] = str(error).splitlines()[0]
    found = Chip(
        name="this machine",
        vendor=platform.machine(),
        year=time.localtime().tm_year,
        flops=speeds,
        memory=machine_memory(),
        bandwidth=machine.bandwidth(megabytes),
    )
    return found, missing


def machine_memory() -> float:
    """Bytes of memory in all."""
    import psutil

    return float(psutil.virtual_memory().total)
