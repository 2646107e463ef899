"""What the learner has done: work/.progress.json, beside their notebooks. Nothing
leaves the machine.

    {"schema": "llmlab.progress/1",
     "lessons": {"04-peft/05-lora": {"lora_forward": {"points": 2, "out_of": 2,
     "outcome": "right",
        "first_right": "2026-11-24T09:30:00+00:00", "last_checked": …, "attempts": 3,
        "version": "6fd1c0…"}}},
     "hints": {"04-peft/05-lora": {"lora_forward": 1}}}

The best result is kept: points never fall. Writers wait for one another; a broken file
is set aside, never thrown away.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmlab.course.files import locked, write_atomically

SCHEMA = "llmlab.progress/1"


class NotKept(RuntimeError):
    """Progress could not be written down; the message says why."""


def file_of(root: Path) -> Path:
    """Where progress is kept."""
    return root / "work" / ".progress.json"


def empty() -> dict[str, Any]:
    """Nothing done yet."""
    return {"schema": SCHEMA, "lessons": {}, "hints": {}}


def load(root: Path) -> tuple[dict[str, Any], str]:
    """(what is written down, a warning when the file is broken)."""
    path = file_of(root)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return empty(), ""
    except OSError as error:
        return empty(), f"{path} cannot be read ({error.strerror or error})"
    except ValueError:
        return empty(), f"{path} is not JSON any more"
    good = (
        isinstance(data, dict)
        and isinstance(data.get("lessons"), dict)
        and isinstance(data.get("hints", {}), dict)
    )
    if not good or not str(data.get("schema", "")).startswith("llmlab.progress/"):
        return empty(), f"{path} is not a record of progress"
    kept = {
        k: {n: e for n, e in v.items() if isinstance(e, dict)}
        for k, v in data["lessons"].items()
        if isinstance(v, dict)
    }
    return empty() | data | {"lessons": kept}, ""


def update(root: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """Reads, changes and writes the record while holding its lock; returns a warning
    when a broken file was set aside.

    Raises:
        NotKept: the folder cannot be written.
    """
    path = file_of(root)
    try:
        with locked(path.with_name(".progress.lock")):
            data, warning = load(root)
            if warning and path.exists():
                aside = path.with_name(
                    f".progress.broken-{time.strftime('%Y%m%d-%H%M%S')}.json"
                )
                path.rename(aside)
                warning += f": it was set aside as {aside.name}, and a new record begun"
            change(data)
            write_atomically(path, json.dumps(data, indent=1, sort_keys=True) + "\n")
            return warning
    except OSError as error:
        raise NotKept(
            f"progress is not kept: {path.parent} cannot be written"
            f" ({error.strerror or error})"
        ) from None


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def record(root: Path, results: list[Any]) -> str:
    """Takes down `LessonResult`s: per exercise the best points, the last outcome, when,
    and the exercise's version.

    Raises:
        NotKept: the folder cannot be written.
    """
    when = now()

    def change(data: dict[str, Any]) -> None:
        for lesson in results:
            known = data["lessons"].setdefault(lesson.topic, {})
            for result in lesson.exercises:
                known[result.name] = merged(
                    known.get(result.name, {}), result, lesson.version, when
                )

    return update(root, change)


def merged(
    before: dict[str, Any], result: Any, version: str, when: str
) -> dict[str, Any]:
    """One exercise's entry after one more marking."""
    best = max(before.get("points", 0), result.points)
    entry = {
        "points": min(best, result.out_of),
        "out_of": result.out_of,
        "outcome": result.outcome,
        "attempts": before.get("attempts", 0) + 1,
        "last_checked": when,
        "version": (
            version
            if result.points >= before.get("points", 0)
            else before.get("version", version)
        ),
    }
    first = before.get("first_right") or (when if result.outcome == "right" else None)
    return entry | ({"first_right": first} if first else {})


def next_hint(root: Path, topic: str, exercise: str, tiers: int) -> int:
    """The number of the next hint (1 to `tiers`; the last again after the last), and
    notes that it was shown.

    Raises:
        NotKept: the folder cannot be written.
    """
    shown = [0]

    def change(data: dict[str, Any]) -> None:
        hints = data["hints"].setdefault(topic, {})
        before = hints.get(exercise, 0)
        shown[0] = hints[exercise] = min(
            (before if isinstance(before, int) else 0) + 1, tiers
        )

    update(root, change)
    return shown[0]
