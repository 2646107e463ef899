"""How much memory is left, and how much a process shares. Linux."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

MIB = 2**20
TO_START = 1500 * MIB  # a warm process takes 550 MiB, and the kernel needs its own
TO_FORK = 400 * MIB  # less than this, and the warm process gives its memory back


def available() -> int:
    """Bytes that can still be had, the limit of a container considered."""
    import psutil

    least = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no limit is the word "max"
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        least = min(least, limit - used)
    return least


def held(pid: int) -> dict[str, int]:
    """Bytes that a process has in memory: `rss` in all, `pss` with each shared page
    divided by the number of its owners, `own` the pages of nobody else.

    Raises:
        OSError: there is no such process, or it is another user's.
    """
    totals = {"Rss": 0, "Pss": 0, "Private_Clean": 0, "Private_Dirty": 0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in totals:
            totals[name] = int(value.split()[0]) * 1024
    own = totals["Private_Clean"] + totals["Private_Dirty"]
    return {"rss": totals["Rss"], "pss": totals["Pss"], "own": own}
