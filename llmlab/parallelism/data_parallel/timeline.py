"""When a backward pass computes and when its gradients travel, as data to be drawn.

Gradients come one after another, and a bucket is ready with its last one. There is one
wire: a bucket leaves when it is ready and the bucket before it has arrived,

    start_b = max(ready_b, end_{b−1}),    end_b = start_b + 2(p−1) α + 2 (p−1)/p · n_b/β

    b     bucket of n_b bytes
    p     ranks
    α, β  latency and bandwidth, see `runtime.cost`

What of the last end is after the last gradient is exposed: nobody computes meanwhile.
`timeline` is that formula; `keep_time` makes a real backward move the virtual clock of
a `World`, whose ledger then says the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from torch import nn

from llmlab.parallelism.runtime import Communicator, Ledger, Link, cost


class Span(NamedTuple):
    """Something that takes time: on the lane "backward" or "all-reduce", from `start`
    to `end` in seconds.
    """

    lane: str
    start: float
    end: float
    label: str = ""


def timeline(
    seconds: Sequence[float],
    nbytes: Sequence[int],
    plan: Sequence[Sequence[int]],
    p: int,
    link: Link,
    *,
    overlap: bool = True,
    before: float = 0.0,
    order: Sequence[int] | None = None,
    algorithm: str = "ring",
) -> list[Span]:
    """The spans of one backward pass.

    Args:
        seconds: to compute each parameter's gradient (and pass the error on below it).
        nbytes: of each gradient.
        plan: buckets of parameter numbers (`data_parallel.plan_buckets`).
        overlap: buckets may leave during backward.
        before: seconds that pass until the first gradient is begun (a tied head's: its
            weight's gradient is complete at the end only).
        order: in which the gradients come; by default the last parameter first.
    Returns:
        Spans of the lane "backward" in the order of computing, then those of the lane
        "all-reduce", one a bucket.
    """
    now, ready, spans = before, {}, [Span("backward", 0.0, before, "before")]
    for i in range(len(seconds) - 1, -1, -1) if order is None else order:
        spans.append(Span("backward", now, now + seconds[i], str(i)))
        now = ready[i] = now + seconds[i]
    free = 0.0
    for b, bucket in enumerate(plan):
        start = max(free, max(ready[i] for i in bucket) if overlap else now)
        free = start + cost.seconds(
            "all_reduce", p, sum(nbytes[i] for i in bucket), link, algorithm
        )
        spans.append(Span("all-reduce", start, free, str(b)))
    return spans


def exposed(spans: Sequence[Span]) -> float:
    """Seconds in which the rank waits for the wire, after its backward is done."""

    def last(lane):
        return max((s.end for s in spans if s.lane == lane), default=0.0)

    return max(0.0, last("all-reduce") - last("backward"))


def keep_time(
    module: nn.Module, comm: Communicator, seconds: Mapping[str, float]
) -> list:
    """Let each gradient's arrival move the clock of this rank's `World`.

    Call it before `DataParallel` adds its hooks.

    Args:
        seconds: by parameter name.
    Returns:
        The hooks, to be removed.
    """

    def tick(name, weight):
        return comm.work(seconds[name], name)

    return [
        w.register_post_accumulate_grad_hook(partial(tick, name))
        for name, w in module.named_parameters()
        if w.requires_grad
    ]


def from_ledger(ledger: Ledger, rank: int = 0) -> list[Span]:
    """What a rank of a `World` did since it first said that it works, as spans: its
    work, and its all-reduces.
    """
    lanes = {"work": "backward", "all_reduce": "all-reduce"}
    events = [e for e in ledger.events(rank=rank) if e.op in lanes]
    zero = min((e.start for e in events if e.op == "work"), default=0.0)
    return [
        Span(lanes[e.op], e.start - zero, e.end - zero, e.label)
        for e in events
        if e.start >= zero
    ]


def draw(spans: Sequence[Span], ax=None, unit: float = 1e3):
    """Two lanes: what the rank computes, what the wire carries; the exposed part in
    another colour. Time in 1/unit seconds.
    """
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots()
    done = max((s.end for s in spans if s.lane == "backward"), default=0.0)
    for y, lane, color in ((1, "backward", "C0"), (0, "all-reduce", "C2")):
        bars = [
            (unit * s.start, unit * (s.end - s.start))
            for s in spans
            if s.lane == lane and s.end > s.start
        ]
        # white lines between many bars would hide them
        gaps = 0.4 if len(bars) < 20 else 0.0
        ax.broken_barh(
            bars, (y - 0.36, 0.72), facecolors=color, edgecolor="white", linewidth=gaps
        )
    late = exposed(spans)
    if late:
        ax.broken_barh(
            [(unit * done, unit * late)],
            (0.64, 0.72),
            facecolors="none",
            edgecolor="C1",
            hatch="////",
        )
    ax.set(
        yticks=[0, 1],
        yticklabels=["wire", "GPU"],
        ylim=(-0.5, 1.5),
        xlabel="milliseconds" if unit == 1e3 else "time",
    )
    return ax
