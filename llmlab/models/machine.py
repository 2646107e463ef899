"""What this machine can do: bytes per second from memory, FLOPs per second.

Both are measured, on the threads that torch has. A tensor much larger than the caches
is read; a product of matrices is large enough that arithmetic takes its time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds(call: Callable[[], object]) -> float:
    """What one call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@torch.inference_mode()
def bandwidth(megabytes: int = 256, trials: int = 5) -> float:
    """Bytes per second that a sum over a large tensor reads; the best of a few.

    Much larger than a cache, so that every trial reads from memory.
    """
    numbers = torch.ones(megabytes * 250_000)
    numbers.sum()  # the first one also maps the pages
    best = min(seconds(numbers.sum) for _ in range(trials))
    return 4 * len(numbers) / best


@torch.inference_mode()
def speed(size: int = 1024, trials: int = 5) -> float:
    """FLOPs per second of a product of two fp32 matrices; the best of a few."""
    a = torch.ones(size, size)
    b = torch.ones(size, size)
    a @ b
    best = min(seconds(lambda: a @ b) for _ in range(trials))
    return 2 * size**3 / best
