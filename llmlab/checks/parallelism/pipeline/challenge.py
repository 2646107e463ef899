"""Judges a learner's own schedule: is it complete, does it run, what does it cost?

time     the longest time from a rank's own first op to its own last, F, I and W of
         one unit each, as in Qi et al.: a rank begins its next step when it is done
memory   the most microbatches that any rank holds, each from its F to its W (or B)
"""

from __future__ import annotations

from llmlab.course.grading.checking import Mistake
from llmlab.parallelism.pipeline import Schedule, schedules, simulate, zb_h1

KINDS = ("F", "I", "W", "B")


def check_challenge(lists: object, p: int, m: int) -> None:
    """`lists` is the answer for p ranks and m microbatches."""
    what = f"beat_h1({p}, {m})"
    schedule = _as_schedule(lists, p, m, what)
    _check_complete(schedule, m, what)
    time = _time(schedule, what)
    _check_memory(schedule, p, m, what, time)
    of_h1 = simulate(zb_h1(p, m)).span
    if time > of_h1:
        raise Mistake(
            f"{what} takes {time:g} units, where ZB-H1 takes {of_h1:g}: ranks wait"
            f" {1 - 3 * m / time:.0%} of the time"
        )
    if time == of_h1:
        raise Mistake(
            f"{what} takes {time:g} units, exactly as ZB-H1 does: with its memory"
            " doubled, more forwards can be ahead"
        )


def _as_schedule(lists: object, p: int, m: int, what: str) -> Schedule:
    """The lists with a chunk of 0 in each op."""
    if not isinstance(lists, (list, tuple)) or len(lists) != p:
        raise Mistake(f"{what} shall return {p} lists, one for each rank")
    schedule: Schedule = []
    for rank, ops in enumerate(lists):
        if not isinstance(ops, (list, tuple)):
            raise Mistake(f"{what}[{rank}] shall be the list of rank {rank}'s ops")
        for op in ops:
            good = (
                isinstance(op, tuple)
                and len(op) == 2
                and op[0] in KINDS
                and type(op[1]) is int
            )
            if not good:
                raise Mistake(
                    f'{what}[{rank}] has {op!r}, where a pair ("F", "I" or "W",'
                    " microbatch) is asked"
                )
            if not 0 <= op[1] < m:
                raise Mistake(
                    f"{what}[{rank}] has {op[0]} of microbatch {op[1]}; there are"
                    f" m={m}, numbered from 0"
                )
        schedule.append([(kind, i, 0) for kind, i in ops])
    return schedule


def _check_complete(schedule: Schedule, m: int, what: str) -> None:
    for rank, ops in enumerate(schedule):
        done = {(kind, i) for kind, i, _ in ops}
        for i in range(m):
            if ("I", i) in done and not done & {("W", i), ("B", i)}:
                raise Mistake(
                    f"{what}: rank {rank} never computes W of microbatch {i}: its"
                    " weights get no gradient from it"
                )
    try:
        schedules.check(schedule, m)
    except ValueError as error:
        text = str(error).replace(", chunk 0", "")
        raise Mistake(f"{what}: {text}") from error


def _time(schedule: Schedule, what: str) -> float:
    try:
        return simulate(schedule).span
    except ValueError as error:
        text = str(error).replace(", chunk 0", "")
        raise Mistake(
            f"{what} never ends, the ranks wait for one another. {text}"
        ) from error


def _check_memory(schedule: Schedule, p: int, m: int, what: str, time: float) -> None:
    held = schedules.peak_microbatches(schedule, full=1, pending=1)
    allowed = 2 * max(schedules.peak_microbatches(zb_h1(p, m), full=1, pending=1))
    rank = max(range(p), key=lambda r: held[r])
    if held[rank] > allowed:
        raise Mistake(
            f"{what} takes {time:g} units, but rank {rank} holds {held[rank]:g}"
            f" microbatches between their F and their W, where {allowed:g} are"
            " allowed, twice what ZB-H1 holds"
        )
