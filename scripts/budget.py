"""What a lesson may cost in CI, in seconds of a reference machine.

A second on the wall says more about the machine than about the lesson. So each stage
is run between two calibrations: a loop of fixed work in as many processes as the
stage uses. `speed` is the reference time of that loop divided by its time here.
A lesson's cost is (seconds here) × speed. A speed above 1 counts as 1: a burst of two
seconds was seen to run twice as fast as the same machine does for minutes, and a lesson
must not fail for that.

Eighty lessons at the budget below, and the work that does not depend on lessons,
stay under fifty minutes on two cores (`projection` computes it from a run).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from llmlab.course.syllabus import Lesson, built_lessons

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = 0.80  # seconds of `loop` on the machine for which the budget is written
LESSONS = 80  # of the whole course
# Seconds of wall clock that one lesson may take of each stage, on two cores.
BUDGET = {"units": 15.0, "notebooks": 15.0, "exercises": 3.0, "browser": 8.0}
# The lessons that stood when the budget was made, with what they may cost at most.
# The list may only get shorter: a lesson that is new keeps to BUDGET.
OVER = json.loads((ROOT / "scripts" / "over_budget.json").read_text(encoding="utf-8"))


def loop() -> float:
    """Seconds that a fixed amount of interpreted and of numerical work takes."""
    import numpy as np

    matrix = np.random.default_rng(0).standard_normal((192, 192)).astype(np.float32)
    started = time.perf_counter()
    digest = b""
    for i in range(120_000):
        digest = hashlib.sha256(digest + i.to_bytes(4, "little")).digest()
    for _ in range(250):
        matrix = np.tanh(matrix @ matrix)
    table: dict[int, int] = {}
    for i in range(1_000_000):
        table[i & 1023] = table.get(i & 511, 0) + i
    return time.perf_counter() - started


def speed(processes: int = 2) -> float:
    """How fast this machine is now: 1 is the reference, 0.5 half as fast."""
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    code = "from scripts.budget import loop; print(min(loop(), loop()))"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | threads | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    took = [float(process.communicate()[0]) for process in started]
    return REFERENCE / statistics.mean(took)


def sustained(speed: float) -> float:
    """The speed to reckon with, from what a short burst gave."""
    return min(speed, 1.0)


def lesson_of(where: str, lessons: list[Lesson]) -> list[Lesson]:
    """The lessons to which a test's costs belong.

    A test that names one lesson, by its path or its parameter, is that lesson's. One
    of a part's other tests is shared by the part's lessons. Any other is nobody's.
    """
    slugs = [lesson for lesson in lessons if names(where, lesson)]
    if slugs:
        longest = max(len(lesson.module) for lesson in slugs)
        return [lesson for lesson in slugs if len(lesson.module) == longest]
    return [x for x in lessons if where.startswith(f"tests.{x.package}.")]


def names(where: str, lesson: Lesson) -> bool:
    """Whether a test's address, as JUnit has it, contains the lesson's name."""
    by_slug = lesson.slug in where or lesson.slug.replace("/", ".") in where
    folders = rf"tests\.(checks\.)?{lesson.package}\."
    return by_slug or bool(re.match(rf"{folders}(test_)?{lesson.module}\b", where))


def costs(
    cases: list[dict], speeds: dict[str, float], processes: dict[str, int]
) -> dict:
    """{stage: {slug: reference seconds of wall clock}} of each built lesson."""
    lessons = built_lessons(ROOT)
    found: dict[str, dict[str, float]] = {stage: defaultdict(float) for stage in BUDGET}
    for case in cases:
        stage = case["stage"]
        if stage not in BUDGET or stage not in speeds:
            continue
        owners = lesson_of(case["where"], lessons)
        for owner in owners:
            share = case["seconds"] / len(owners) / processes[stage]
            found[stage][owner.slug] += share * sustained(speeds[stage])
    return found


def over(found: dict[str, dict[str, float]]) -> list[str]:
    """One sentence for each lesson that costs more than it may."""
    faults = []
    for stage, by_lesson in found.items():
        for slug, seconds in sorted(by_lesson.items()):
            allowed = max(BUDGET[stage], OVER.get(stage, {}).get(slug, 0.0))
            if seconds > allowed:
                faults.append(
                    f"{slug} costs {seconds:.1f} reference seconds of the stage "
                    f"'{stage}'; it may cost {allowed:.1f}. Make its tests or its "
                    "experiment smaller (scripts/budget.py)"
                )
    return faults


def projection(
    found: dict, stages: dict[str, float], speeds: dict[str, float]
) -> float:
    """Minutes on the reference machine for all lessons of the course.

    What the present lessons cost on average, times the number of lessons, and what
    belongs to no lesson as it is.
    """
    count = len(built_lessons(ROOT))
    total = sum(s * sustained(speeds.get(name, 1.0)) for name, s in stages.items())
    per_lesson = sum(sum(by_lesson.values()) for by_lesson in found.values()) / count
    fixed = total - per_lesson * count
    return (fixed + per_lesson * LESSONS) / 60


def report(found: dict[str, dict[str, float]]) -> str:
    """A table: each stage's budget, the mean cost, and the costliest lessons."""
    lines = ["Budget of a lesson   may cost   mean   costliest (reference seconds)"]
    for stage, by_lesson in found.items():
        if not by_lesson:
            continue
        most = sorted(by_lesson.items(), key=lambda item: -item[1])[:3]
        named = ", ".join(f"{slug} {seconds:.1f}" for slug, seconds in most)
        mean = statistics.mean(by_lesson.values())
        lines.append(f"  {stage:<18} {BUDGET[stage]:>8.1f} {mean:>6.1f}   {named}")
    return "\n".join(lines)
