"""What this machine can do: bytes per second from memory, FLOPs per second.

All are measured, on the threads that torch has. `bandwidth` adds up a tensor that is
much larger than the caches; `product_bandwidth` multiplies a vector by it, which is
what decoding does, and may be slower; `speed` multiplies matrices, where arithmetic
takes the time. A `clock` of `time.process_time` leaves out what other programs take.
`processor` says which machine it was.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch


def processor() -> str:
    """The processor's name; where the system keeps it to itself, the machine's kind."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def seconds(
    call: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> float:
    """What one call takes."""
    started = clock()
    call()
    return clock() - started


@torch.inference_mode()
def bandwidth(
    megabytes: int = 256,
    trials: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Bytes per second that sums over a large tensor read; the best of a few.

    Much larger than a cache, so that every trial reads from memory. It is read in
    pieces of 64 MB: a piece is over before another program gets its turn.
    """
    numbers = torch.ones(megabytes * 250_000)
    numbers.sum()  # the first one also maps the pages
    return max(
        piece.nbytes / seconds(piece.sum, clock)
        for _ in range(trials)
        for piece in numbers.split(16_000_000)
    )


@torch.inference_mode()
def product_bandwidth(
    megabytes: int = 256,
    trials: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Bytes of W per second that y = W x reads, in fp32; the best of a few."""
    matrix = torch.ones(megabytes * 250, 1000)
    x = torch.ones(1, 1000)
    x @ matrix.T
    best = min(seconds(lambda: x @ matrix.T, clock) for _ in range(trials))
    return 4 * matrix.numel() / best


@torch.inference_mode()
def speed(
    size: int = 1024,
    trials: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOPs per second of a product of two fp32 matrices; the best of a few."""
    a = torch.ones(size, size)
    b = torch.ones(size, size)
    a @ b
    best = min(seconds(lambda: a @ b, clock) for _ in range(trials))
    return 2 * size**3 / best
