"""When does each op of a pipeline schedule run? A pure simulator, and the Gantt chart
of what it, or a real run, found.

    T_F, T_I, T_W   seconds of a rank's whole share of a microbatch; a chunk takes 1/v
                    of it; T_B = T_I + T_W
    T_comm          seconds from the end of an op to the arrival of its result on
                    another rank

An op begins when its rank is free and its input is there: F needs F of the stage
before; I and B need that of the stage after, and on the last stage the F of the same
microbatch; W needs its I. Sending costs the sender nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from llmlab.parallelism.pipeline.schedules import Op, Schedule, check, chunks, stage_of


@dataclass(frozen=True)
class Costs:
    """Seconds (or any unit) of a microbatch's forward, input gradient, weight gradient,
    and of a message.
    """

    F: float = 1.0
    I: float = 1.0  # noqa: E741  the paper's letter
    W: float = 1.0
    comm: float = 0.0

    @property
    def B(self) -> float:
        """A whole backward."""
        return self.I + self.W

    @property
    def work(self) -> float:
        """All of a microbatch."""
        return self.F + self.I + self.W


class Bar(NamedTuple):
    """One op of one rank, and when it ran."""

    rank: int
    kind: str
    microbatch: int
    chunk: int
    start: float
    end: float


class Timeline:
    """What p ranks did when. Bars may come from `simulate` or from a clock."""

    def __init__(self, bars: Iterable[Bar], p: int) -> None:
        self.bars, self.p = [Bar(*bar) for bar in bars], p

    @property
    def start(self) -> float:
        """When the first op begins."""
        return min(bar.start for bar in self.bars)

    @property
    def makespan(self) -> float:
        """From the first op of any rank to the last."""
        return max(bar.end for bar in self.bars) - self.start

    @property
    def span(self) -> float:
        """The longest that a rank is occupied, from its own first op to its own last:
        Qi et al.'s cost of a step.
        """
        own = [[bar for bar in self.bars if bar.rank == r] for r in range(self.p)]
        return max(
            max(b.end for b in bars) - min(b.start for b in bars) for bars in own
        )

    def busy(self, rank: int) -> float:
        """How long a rank computes."""
        return sum(bar.end - bar.start for bar in self.bars if bar.rank == rank)

    @property
    def bubble(self) -> float:
        """The share of p · makespan in which ranks wait."""
        return 1 - sum(map(self.busy, range(self.p))) / (self.p * self.makespan)

    @property
    def bubble_rate(self) -> float:
        """Qi et al.'s bubble rate, (span − work) / span: what is lost when steps may
        follow one another in a parallelogram.
        """
        return 1 - max(map(self.busy, range(self.p))) / self.span

    def draw(self, ax=None, *, until: float | None = None, labels: bool = True):
        """A row a rank, a bar an op with its microbatch's number; a second chunk is
        paler. Returns the axes.

        Args:
            until: the end of the time axis, to compare charts.
            labels: whether bars that are wide enough show their microbatch's number.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            _, ax = plt.subplots()
        until = until or self.makespan
        for kind, pale in sorted({(bar.kind, bar.chunk % 2) for bar in self.bars}):
            for r in range(self.p):
                mine = [
                    b
                    for b in self.bars
                    if (b.rank, b.kind, b.chunk % 2) == (r, kind, pale)
                ]
                spans, style = (
                    [(b.start - self.start, b.end - b.start) for b in mine],
                    {"edgecolor": "white", "lw": 0.4},
                )
                ax.broken_barh(
                    spans,
                    (r - 0.43, 0.86),
                    color=COLORS[kind],
                    alpha=0.55 if pale else 1,
                    **style,
                )
        for bar in self.bars if labels else ():
            if bar.end - bar.start > until * 0.02 * len(str(bar.microbatch)):  # it fits
                middle = (bar.start + bar.end) / 2 - self.start
                color = "black" if bar.chunk % 2 else "white"
                text = ax.text(
                    middle,
                    bar.rank,
                    bar.microbatch,
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=color,
                )
                text.set(clip_on=True, in_layout=False)
        ax.set(
            xlim=(0, until),
            ylim=(self.p - 0.5, -0.5),
            yticks=range(self.p),
            ylabel="rank",
        )
        ax.grid(False)
        return ax


COLORS = {"F": "C0", "B": "C1", "I": "C1", "W": "C2"}


def simulate(
    schedule: Schedule, costs: Costs = Costs(), layout: str = "loop"
) -> Timeline:
    """When each op runs, as early as its inputs allow and in the order of its rank's
    list.

    Raises:
        ValueError: the schedule is not complete or a rank's list is out of order (see
            `check`), or the ranks wait for one
            another in a circle: the message says who waits for what.
    """
    check(schedule)
    p, v = len(schedule), chunks(schedule)
    # (F or I, microbatch, stage) → when and by whom
    done: dict[tuple[str, int, int], Bar] = {}
    bars: list[Bar] = []
    at, free = [0] * p, [0.0] * p
    waiting = True
    while waiting and any(at[r] < len(schedule[r]) for r in range(p)):
        waiting = False
        for r in range(p):
            while (
                at[r] < len(schedule[r])
                and (ready := _ready(schedule[r][at[r]], r, p, v, layout, done, costs))
                is not None
            ):
                kind, i, chunk = schedule[r][at[r]]
                start = max(free[r], ready)
                bar = Bar(r, kind, i, chunk, start, start + getattr(costs, kind) / v)
                done["I" if kind == "B" else kind, i, stage_of(r, chunk, p, layout)] = (
                    bar
                )
                bars.append(bar)
                at[r], free[r], waiting = at[r] + 1, bar.end, True
    if len(bars) < sum(map(len, schedule)):
        raise ValueError(_deadlock(schedule, at, p, v, layout, done))
    return Timeline(bars, p)


def needs(op: Op, rank: int, p: int, v: int, layout: str) -> list[tuple[str, int, int]]:
    """The results, as (F or I, microbatch, stage), that an op waits for."""
    kind, i, chunk = op
    stage = stage_of(rank, chunk, p, layout)
    if kind == "F":
        return [("F", i, stage - 1)] if stage else []
    if kind == "W":
        return [("I", i, stage)]
    return [("F", i, stage)] + ([("I", i, stage + 1)] if stage < p * v - 1 else [])


def _ready(
    op: Op, rank: int, p: int, v: int, layout: str, done: dict, costs: Costs
) -> float | None:
    """When the op's inputs are all there; None: not yet known."""
    inputs = needs(op, rank, p, v, layout)
    if any(result not in done for result in inputs):
        return None
    return max(
        (done[x].end + (costs.comm if done[x].rank != rank else 0) for x in inputs),
        default=0.0,
    )


def _deadlock(
    schedule: Schedule, at: list[int], p: int, v: int, layout: str, done: dict
) -> str:
    lines = ["deadlock: no rank can go on"]
    for r in range(p):
        if at[r] < len(schedule[r]):
            kind, i, chunk = op = schedule[r][at[r]]
            what, j, stage = next(
                x for x in needs(op, r, p, v, layout) if x not in done
            )
            waits = f"waits for {what} of microbatch {j}, stage {stage}"
            lines.append(
                f"  rank {r}, at {kind} of microbatch {i}, chunk {chunk}, {waits}"
            )
    return "\n".join(lines)
