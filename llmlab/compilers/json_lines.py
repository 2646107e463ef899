"""A log on the disk: a line of JSON for each measurement, so that a run can go on.

A run may be stopped in the middle of a line. That line counts for nothing, and the next
one does not join it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read(path: Path) -> list[Any]:
    """What the whole lines say; nothing, if there is no file yet."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def append(path: Path, line: dict) -> None:
    """One line more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        start = "" if file.read() in (b"", b"\n") else "\n"
        file.write(f"{start}{json.dumps(line)}\n".encode())
