"""When does each op of a pipeline schedule run? A simulator, and a Gantt chart.

    T_F, T_I, T_W   seconds of a rank's whole share of a microbatch; a chunk takes 1/v
                    of it; T_B = T_I + T_W
    T_comm          seconds from the end of an op to the arrival of its result on
                    another rank; links between two ranks may have their own
    T_F&B           seconds of a forward and a backward that a rank runs as one, where
                    the schedule pairs them (see `dualpipe`)
    p, v, m         ranks, chunks per rank, microbatches
    i, s            a microbatch, a stage (0 … S − 1; S = p·v, see `stage_count`)

An op begins when its rank is free and its inputs are there. F needs F of the stage
before. I and B need that of the stage after; on the last stage they need the F of the
same microbatch. W needs its I. Sending costs the sender nothing. A pair begins when the
inputs of both are there, and both results are there when it ends.

The chart draws what the simulator, or a real run, has found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple

from llmlab.parallelism.pipeline.schedules import (
    Kind,
    Op,
    Schedule,
    check,
    chunks,
    chunks_per_share,
    stage_count,
    stage_of,
)

Pairs = Sequence[AbstractSet[int]]  # for each rank: where in its list a pair begins


@dataclass(frozen=True)
class Costs:
    """Seconds, or any unit, of a microbatch's forward, its gradients, and a message."""

    F: float = 1.0
    I: float = 1.0  # noqa: E741  the paper's letter
    W: float = 1.0
    comm: float = 0.0
    # a forward and a backward that run as one; None: one after the other
    pair: float | None = None
    # (rank, rank), the smaller first: seconds of a message where they are not `comm`
    links: Mapping[tuple[int, int], float] = field(default_factory=dict, hash=False)

    def message(self, source: int, target: int) -> float:
        """Seconds of a message between two ranks; 0 on one rank."""
        if source == target:
            return 0.0
        ends = (min(source, target), max(source, target))
        return self.links.get(ends, self.comm)

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
        self.bars = [Bar(*bar) for bar in bars]
        self.p = p

    def bars_of(self, rank: int) -> list[Bar]:
        """One rank's bars."""
        return [bar for bar in self.bars if bar.rank == rank]

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
        """The longest time from a rank's own first op to its own last.

        It is Qi et al.'s cost of a step.
        """
        spans = []
        for rank in range(self.p):
            bars = self.bars_of(rank)
            begin = min(bar.start for bar in bars)
            end = max(bar.end for bar in bars)
            spans.append(end - begin)
        return max(spans)

    def busy(self, rank: int) -> float:
        """How long a rank computes."""
        return sum(bar.end - bar.start for bar in self.bars_of(rank))

    @property
    def bubble(self) -> float:
        """The share of p · makespan in which ranks wait."""
        busy = sum(self.busy(rank) for rank in range(self.p))
        return 1 - busy / (self.p * self.makespan)

    @property
    def bubble_rate(self) -> float:
        """Qi et al.'s bubble rate, (span − work) / span.

        It is what is lost when each rank begins its next step as soon as it is done
        with this one.
        """
        work = max(self.busy(rank) for rank in range(self.p))
        return 1 - work / self.span

    def draw(self, ax=None, *, until: float | None = None, labels: bool = True):
        """One row per rank, one bar per op with the number of its microbatch.

        Bars of a second chunk are paler.

        Args:
            until: the end of the time axis, to compare charts.
            labels: whether bars that are wide enough show their microbatch's number.
        Returns:
            The axes.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            _, ax = plt.subplots()
        until = until or self.makespan
        self._draw_bars(ax)
        if labels:
            self._draw_labels(ax, until)
        ax.set(
            xlim=(0, until),
            ylim=(self.p - 0.5, -0.5),
            yticks=range(self.p),
            ylabel="rank",
        )
        ax.grid(False)
        return ax

    def _draw_bars(self, ax) -> None:
        """All bars of one rank, kind and shade are one collection."""
        for kind, is_pale in sorted({(bar.kind, bar.chunk % 2) for bar in self.bars}):
            for rank in range(self.p):
                spans = []
                for bar in self.bars_of(rank):
                    if bar.kind == kind and bar.chunk % 2 == is_pale:
                        spans.append((bar.start - self.start, bar.end - bar.start))
                ax.broken_barh(
                    spans,
                    (rank - 0.43, 0.86),
                    color=COLORS[kind],
                    alpha=0.55 if is_pale else 1,
                    edgecolor="white",
                    lw=0.4,
                )

    def _draw_labels(self, ax, until: float) -> None:
        """Each microbatch's number in its bar, where it fits."""
        for bar in self.bars:
            label_width = until * 0.02 * len(str(bar.microbatch))
            if bar.end - bar.start <= label_width:
                continue
            text = ax.text(
                (bar.start + bar.end) / 2 - self.start,
                bar.rank,
                bar.microbatch,
                ha="center",
                va="center",
                fontsize=8,
                color="black" if bar.chunk % 2 else "white",
            )
            text.set(clip_on=True, in_layout=False)


COLORS = {"F": "C0", "B": "C1", "I": "C1", "W": "C2"}


class Result(NamedTuple):
    """What an op makes, and other ops wait for."""

    kind: str  # "F": hidden states, or "I": their gradient (B makes it, too)
    microbatch: int
    stage: int


def simulate(
    schedule: Schedule,
    costs: Costs = Costs(),
    layout: str = "loop",
    pairs: Pairs = (),
) -> Timeline:
    """When each op runs: as early as its inputs allow, in the order of its rank's list.

    Args:
        pairs: for each rank the places in its list at which a forward and the backward
            after it run as one, in `costs.pair`. The chart shows them one after the
            other, in that time.
    Raises:
        ValueError: the schedule is not complete or a rank's list is out of order (see
            `check`); a pair is not a forward and a backward; or the ranks wait for one
            another in a circle: the message says who waits for what.
    """
    check(schedule, layout=layout)
    for rank, places in enumerate(pairs):
        for k in places:
            kinds = [kind for kind, _, _ in schedule[rank][k : k + 2]]
            if kinds not in (["F", "B"], ["F", "I"]):
                raise ValueError(
                    f"pairs: rank {rank} has {kinds} at {k}, not a forward and a"
                    " backward"
                )
    return _Simulation(schedule, costs, layout, pairs).run()


class Wait(NamedTuple):
    """An op that a rank cannot begin, and a result that it lacks."""

    rank: int
    op: Op
    lacks: Result


def until_stuck(
    schedule: Schedule, costs: Costs = Costs(), layout: str = "loop"
) -> tuple[list[Bar], list[Wait]]:
    """What `simulate` finds before it raises: the ops that run, and who waits for what.

    A list that is out of order runs as far as it can: an op that stands before what it
    needs waits for ever.

    Returns:
        The bars, and for each rank that is not done the op at which it stands.
    """
    simulation = _Simulation(schedule, costs, layout)
    simulation.go_on()
    return simulation.bars, simulation.waits()


class Made(NamedTuple):
    """A result that is there."""

    rank: int
    when: float


class _Simulation:
    """How far each rank has come in its list, and what is done.

    next_op   for each rank: the place in its list of the op that it does next
    free      for each rank: when it is done with the op before
    done      result → when it was there, and on which rank
    """

    def __init__(
        self, schedule: Schedule, costs: Costs, layout: str, pairs: Pairs = ()
    ) -> None:
        self.schedule = schedule
        self.costs = costs
        self.layout = layout
        self.p = len(schedule)
        self.v = chunks(schedule)
        self.pairs = pairs
        self.per_share = chunks_per_share(self.v, layout)
        self.next_op = [0] * self.p
        self.free = [0.0] * self.p
        self.done: dict[Result, Made] = {}
        self.bars: list[Bar] = []

    def run(self) -> Timeline:
        self.go_on()
        if self.waits():
            raise ValueError(self.deadlock())
        return Timeline(self.bars, self.p)

    def go_on(self) -> None:
        """Do all ops that can be done."""
        # One round lets each rank go as far as it can. A round in which nobody gets
        # further is the last: all lists are done, or all that are left wait.
        has_advanced = True
        while has_advanced:
            has_advanced = False
            for rank in range(self.p):
                if self.advance(rank):
                    has_advanced = True

    def has_ops_left(self, rank: int) -> bool:
        return self.next_op[rank] < len(self.schedule[rank])

    def together(self, rank: int) -> list[Op]:
        """The op that a rank does next, or the two of a pair."""
        k = self.next_op[rank]
        is_pair = bool(self.pairs) and k in self.pairs[rank]
        return self.schedule[rank][k : k + 2 if is_pair else k + 1]

    def advance(self, rank: int) -> bool:
        """Do a rank's ops until one has to wait. Whether any was done."""
        has_advanced = False
        while self.has_ops_left(rank):
            ops = self.together(rank)
            ready = self.when_ready(ops, rank)
            if ready is None:
                break
            self.do(ops, rank, ready)
            has_advanced = True
        return has_advanced

    def when_ready(self, ops: list[Op], rank: int) -> float | None:
        """When the ops' inputs are all there; None: not yet known."""
        ready = 0.0
        for op in ops:
            for result in self.inputs(op, rank):
                if result not in self.done:
                    return None
                made = self.done[result]
                arrival = made.when + self.costs.message(made.rank, rank)
                ready = max(ready, arrival)
        return ready

    def do(self, ops: list[Op], rank: int, ready: float) -> None:
        """Write down when the ops run, and what they make."""
        times = [getattr(self.costs, kind) / self.per_share for kind, _, _ in ops]
        shrink = 1.0
        if len(ops) == 2 and self.costs.pair is not None:
            shrink = self.costs.pair / self.per_share / sum(times)
        start = max(self.free[rank], ready)
        finish = start + shrink * sum(times)
        for op, seconds in zip(ops, times, strict=True):
            kind, i, chunk = op
            end = start + seconds * shrink
            self.bars.append(Bar(rank, kind, i, chunk, start, end))
            start = end
            stage = stage_of(rank, chunk, self.p, self.layout)
            made = Kind.INPUT_GRAD.value if kind == Kind.BACKWARD else kind
            self.done[Result(made, i, stage)] = Made(rank, finish)
        self.free[rank] = finish
        self.next_op[rank] += len(ops)

    def inputs(self, op: Op, rank: int) -> list[Result]:
        return needs(op, rank, self.p, self.v, self.layout)

    def waits(self) -> list[Wait]:
        """For each rank that is not done: its next op, and what it lacks first."""
        found = []
        for rank in range(self.p):
            if not self.has_ops_left(rank):
                continue
            for op in self.together(rank):
                missing = [x for x in self.inputs(op, rank) if x not in self.done]
                if missing:
                    found.append(Wait(rank, op, missing[0]))
                    break
        return found

    def deadlock(self) -> str:
        """Who waits for what."""
        lines = ["deadlock: no rank can go on"]
        for rank, (kind, i, chunk), lacks in self.waits():
            lines.append(
                f"  rank {rank}, at {kind} of microbatch {i}, chunk {chunk}, waits for"
                f" {lacks.kind} of microbatch {lacks.microbatch}, stage {lacks.stage}"
            )
        return "\n".join(lines)


def needs(op: Op, rank: int, p: int, v: int, layout: str) -> list[Result]:
    """The results that an op waits for."""
    kind, i, chunk = op
    stage = stage_of(rank, chunk, p, layout)
    if kind == Kind.FORWARD:
        if stage == 0:
            return []
        return [Result("F", i, stage - 1)]
    if kind == Kind.WEIGHT_GRAD:
        return [Result("I", i, stage)]
    # B and I need the graph of the forward, and the gradient of its output
    own_forward = Result("F", i, stage)
    if stage == stage_count(p, v, layout) - 1:
        return [own_forward]
    return [own_forward, Result("I", i, stage + 1)]
