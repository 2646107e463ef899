"""What the learner has done: work/.progress.json, beside their notebooks.

Nothing leaves the machine.

    {"schema": "llmlab.progress/1",
     "lessons": {
       "04-peft/05-lora": {
         "lora_forward": {
           "points": 2, "out_of": 2, "outcome": "right", "attempts": 3,
           "first_right": "2026-11-24T09:30:00+00:00", "last_checked": …,
           "version": "6fd1c0…"}}},
     "hints": {"04-peft/05-lora": {"lora_forward": 1}}}

The best result is kept: points never fall. Writers wait for one another; a broken file
is set aside, never thrown away. It is the learner's own note, which anyone can edit: to
others it proves nothing.
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
    if not _is_record(data):
        return empty(), f"{path} is not a record of progress"
    kept = {}
    for slug, entries in data["lessons"].items():
        if isinstance(entries, dict):
            kept[slug] = {n: e for n, e in entries.items() if isinstance(e, dict)}
    return empty() | data | {"lessons": kept}, ""


def _is_record(data: Any) -> bool:
    """Whether `data` has the form above."""
    return (
        isinstance(data, dict)
        and isinstance(data.get("lessons"), dict)
        and isinstance(data.get("hints", {}), dict)
        and str(data.get("schema", "")).startswith("llmlab.progress/")
    )


def update(root: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """Reads the record, changes it and writes it, while it holds the record's lock.

    Returns a warning when a broken file was set aside, or ''.

    Raises:
        NotKept: the folder cannot be written.
    """
    path = file_of(root)
    try:
        with locked(path.with_name(".progress.lock")):
            data, warning = load(root)
            if warning and path.exists():
                when = time.strftime("%Y%m%d-%H%M%S")
                aside = path.with_name(f".progress.broken-{when}.json")
                path.rename(aside)
                warning += f": it was set aside as {aside.name}, and a new record begun"
            change(data)
            write_atomically(path, json.dumps(data, indent=1, sort_keys=True) + "\n")
            return warning
    except OSError as error:
        why = error.strerror or error
        raise NotKept(
            f"progress is not kept: {path.parent} cannot be written ({why})"
        ) from None


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def record(root: Path, results: list[Any]) -> str:
    """Takes down `LessonResult`s in the record.

    Each exercise keeps its best points, its last outcome, the time and its version.

    Raises:
        NotKept: the folder cannot be written.
    """
    when = now()

    def change(data: dict[str, Any]) -> None:
        for lesson in results:
            known = data["lessons"].setdefault(lesson.topic, {})
            for result in lesson.exercises:
                before = known.get(result.name, {})
                known[result.name] = merged(before, result, lesson.version, when)

    return update(root, change)


def merged(
    before: dict[str, Any], result: Any, version: str, when: str
) -> dict[str, Any]:
    """One exercise's entry after one more marking."""
    points_before = before.get("points", 0)
    if result.points < points_before:
        # the points that are kept were earned with an earlier version
        version = before.get("version", version)
    entry = {
        "points": min(max(points_before, result.points), result.out_of),
        "out_of": result.out_of,
        "outcome": result.outcome,
        "attempts": before.get("attempts", 0) + 1,
        "last_checked": when,
        "version": version,
    }
    if before.get("first_right"):
        entry["first_right"] = before["first_right"]
    elif result.outcome == "right":
        entry["first_right"] = when
    return entry


def next_hint(root: Path, topic: str, exercise: str, tiers: int) -> int:
    """Returns the number of the next hint, and notes that it was shown.

    The numbers run from 1 to `tiers`; after the last hint comes the last again.

    Raises:
        NotKept: the folder cannot be written.
    """
    number = 0

    def change(data: dict[str, Any]) -> None:
        nonlocal number
        hints = data["hints"].setdefault(topic, {})
        before = hints.get(exercise, 0)
        if not isinstance(before, int):
            before = 0
        number = min(before + 1, tiers)
        hints[exercise] = number

    update(root, change)
    return number
