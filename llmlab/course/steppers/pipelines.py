"""The trace of a pipeline schedule: the Gantt chart grows op by op.

The page works out the same steps itself (static/steps_pipeline.js), because it lets a
reader move ops and says at once what becomes of time, bubble and memory. A test holds
the two to each other.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmlab.course.steppers.trace import Lanes, Mark, Step, Trace, number, percent
from llmlab.parallelism.pipeline import (
    Costs,
    Schedule,
    schedules,
    stage_of,
    until_stuck,
)

COLOURS = {"F": "blue", "B": "orange", "I": "orange", "W": "green"}
HOLDS = {"F": 1, "B": -1, "I": -1, "W": 0}  # what an op adds to what its rank holds
GOALS = {
    "time": "it takes at most {}",
    "bubble": "the ranks wait at most {} of the time",
    "peak": "no rank holds more than {} microbatches at once",
}


def schedule_trace(
    schedule: Schedule,
    *,
    costs: Costs | None = None,
    layout: str = "loop",
    edit: bool = True,
    goal: Mapping[str, float] | None = None,
) -> Trace:
    """What p ranks do when, op by op; up to where they are stuck, if they are.

    Beside each rank stands how many microbatches' activations it holds, and the most
    that it ever held.

    Args:
        schedule: for each rank the list of its ops, (kind, microbatch, chunk).
        costs: how long each kind takes; None: one unit each, a backward two.
        layout: which stages a rank has; see `stage_of`.
        edit: whether the reader can move ops within their lists.
        goal: what to reach by moving ops: the most that "time", "bubble" (a share) or
            "peak" (of any rank) may be.
    Raises:
        ValueError: an op is missing, double or unknown; a goal is unknown.
    """
    schedule = [[(str(kind), i, chunk) for kind, i, chunk in ops] for ops in schedule]
    _check_complete(schedule)
    for name in goal or {}:
        if name not in GOALS:
            raise ValueError(f"goal={dict(goal)} must name {', '.join(GOALS)}")
    costs = costs or Costs()
    bars, waits = until_stuck(schedule, costs, layout)
    told = _Telling(schedule, costs, layout)
    for bar in sorted(bars, key=lambda bar: (bar.start, bar.rank)):
        told.add(bar)
    if waits:
        told.deadlock(waits)
    plan = {
        "lists": schedule,
        "costs": {"F": costs.F, "I": costs.I, "W": costs.W, "comm": costs.comm},
        "layout": layout,
        "edit": edit,
        "goal": dict(goal or {}),
        "goal_text": goal_text(goal or {}),
    }
    scene = Lanes(len(schedule), told.until)
    stop = len(told.steps) - 1 if waits else None
    fault = told.steps[-1].alt if waits else ""
    return Trace(scene, tuple(told.steps), stop, fault, plan)


def goal_text(goal: Mapping[str, float]) -> str:
    """A goal as a sentence, '' for none."""
    said = []
    for name, most in goal.items():
        shown = percent(most) if name == "bubble" else number(most)
        said.append(GOALS[name].format(shown))
    return ", and ".join(said)


def op_name(op: tuple[str, int, int], v: int) -> str:
    """'F3', or with several chunks per rank 'F3a'."""
    kind, i, chunk = op
    letter = schedules.CHUNK_LETTERS[chunk] if v > 1 else ""
    return f"{kind}{i}{letter}"


def _check_complete(schedule: Schedule) -> None:
    """Each op once. Their order may be wrong: the trace shows where it gets stuck."""
    if not schedule or not any(schedule):
        raise ValueError("schedule is empty: it needs a list of ops for each rank")
    kinds = [*schedules.KINDS]
    for rank, ops in enumerate(schedule):
        for op in ops:
            if op[0] not in kinds:
                raise ValueError(
                    f"rank {rank}: {op} is no op; kinds are {', '.join(kinds)}"
                )
    in_order = [
        sorted(ops, key=lambda op: (op[1], op[2], kinds.index(op[0])))
        for ops in schedule
    ]
    schedules.check(in_order)


class _Telling:
    """Makes the steps, one op after another.

    now     how much each rank holds, in chunks
    peak    the most that each rank held, in chunks
    busy    how long all ranks have computed
    end     when the last op so far ends
    """

    def __init__(self, schedule: Schedule, costs: Costs, layout: str) -> None:
        self.schedule = schedule
        self.costs = costs
        self.layout = layout
        self.p = len(schedule)
        self.v = schedules.chunks(schedule)
        self.now = [0] * self.p
        self.peak = [0] * self.p
        self.free = [0.0] * self.p
        self.busy = 0.0
        self.end = 0.0
        self.until = 0.0
        m = schedules.microbatch_count(schedule)
        opening = f"{self.p} ranks, {m} microbatches. Nothing has run yet."
        self.steps = [Step((), opening, sides=self.sides())]

    def sides(self) -> tuple[tuple[float, float], ...]:
        """What each rank holds and held at most, in microbatches of all its layers."""
        return tuple(
            (now / self.v, peak / self.v)
            for now, peak in zip(self.now, self.peak, strict=True)
        )

    def facts(self) -> dict[str, str]:
        bubble = 1 - self.busy / (self.p * self.end)
        return {"time": number(self.end), "waiting": percent(bubble)}

    def mark(self, rank: int, op, start: float, end: float, **more: str) -> Mark:
        """The bar of an op."""
        kind, i, chunk = op
        colour = COLOURS[kind]
        if chunk % 2:
            colour = f"pale-{colour}"
        place = self.schedule[rank].index(op)
        settings = {"kind": colour} | more
        return Mark(
            f"{rank}/{op_name(op, self.v)}",
            "bar",
            (start, end, rank),
            str(i),
            line=f"schedule[{rank}][{place}] is {op}",
            **settings,
        )

    def add(self, bar) -> None:
        """The step in which this op runs."""
        rank = bar.rank
        op = (bar.kind, bar.microbatch, bar.chunk)
        value = (
            f"{op_name(op, self.v)} on rank {rank}: from {number(bar.start)} to"
            f" {number(bar.end)}"
        )
        waited = bar.start - self.free[rank]
        if waited > 0:
            value += f", after waiting {number(waited)}"
        self.free[rank] = bar.end
        self.busy += bar.end - bar.start
        self.end = max(self.end, bar.end)
        self.until = max(self.until, bar.end)
        self.now[rank] += HOLDS[bar.kind]
        self.peak[rank] = max(self.peak[rank], self.now[rank])
        held, most = self.sides()[rank]
        alt = (
            f"{value}. Rank {rank} holds {number(held)}, at most {number(most)} so far."
        )
        if len(self.steps) == sum(len(ops) for ops in self.schedule):
            alt += self.summary()
        mark = self.mark(rank, op, bar.start, bar.end, value=value)
        self.steps.append(Step((mark,), alt, facts=self.facts(), sides=self.sides()))

    def summary(self) -> str:
        """What the whole schedule costs."""
        facts = self.facts()
        peaks = ", ".join(number(peak) for _, peak in self.sides())
        return (
            f" All is done after {facts['time']}: the ranks wait {facts['waiting']} of"
            f" the time, and hold at most {peaks} microbatches."
        )

    def deadlock(self, waits) -> None:
        """The last step: who is stuck, at which op, and whose op that one lacks."""
        said = []
        marks = []
        for rank, op, lacks in waits:
            maker_rank, maker = self.maker(lacks)
            own = " of its own list, further down" if maker_rank == rank else ""
            whose = own or f" of rank {maker_rank}"
            sentence = (
                f"rank {rank} cannot begin {op_name(op, self.v)}: it waits for"
                f" {op_name(maker, self.v)}{whose}"
            )
            said.append(sentence)
            start = self.free[rank]
            end = start + getattr(self.costs, op[0]) / self.v
            self.until = max(self.until, end)
            mark = self.mark(rank, op, start, end, value=sentence, kind="stuck")
            marks.append(mark)
        alt = f"Deadlock: {'; '.join(said)}."
        facts = self.facts() if self.end else {}
        self.steps.append(Step(tuple(marks), alt, facts=facts, sides=self.sides()))

    def maker(self, lacks) -> tuple[int, tuple[str, int, int]]:
        """The rank and the op that make a result."""
        kinds = ("F",) if lacks.kind == "F" else ("B", "I")
        for rank, ops in enumerate(self.schedule):
            for op in ops:
                kind, i, chunk = op
                if kind not in kinds or i != lacks.microbatch:
                    continue
                if stage_of(rank, chunk, self.p, self.layout) == lacks.stage:
                    return rank, op
        raise ValueError(f"no op of the schedule makes {lacks}")
