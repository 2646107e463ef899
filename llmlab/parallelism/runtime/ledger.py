"""The ledger: who sent how many bytes, in which collective, when and from where.

An `Event` is one operation of one rank. Its clock is virtual: it stands still while a
rank computes (unless the rank says `comm.work(seconds)`) and moves by the α-β cost of
each message, so a timeline does not depend on the machine that drew it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

OPS = (
    *(
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "broadcast",
        "reduce",
        "gather",
        "scatter",
        "all_to_all",
    ),
    *("send", "recv", "barrier", "work"),
)


@dataclass(frozen=True)
class Event:
    """One operation of one rank.

    Bytes are those that this rank puts on the wire; times are virtual seconds.
    """

    rank: int
    op: str
    group: tuple[int, ...]
    bytes: int
    payload: int
    shape: tuple[int, ...] = ()
    peer: int | None = None
    start: float = 0.0
    end: float = 0.0
    label: str = ""
    site: str = field(default="", compare=False)


class Ledger:
    """All events of a run.

    `bytes()` and `count()` add up what the filters let through; `table()` and `draw()`
    show it.
    """

    def __init__(self, size: int, events: Iterable[Event] = ()) -> None:
        self.size = size
        self._events = list(events)

    def add(self, event: Event) -> None:
        """Write one line. Ranks write their own, in their own order."""
        self._events.append(event)

    def clear(self) -> None:
        """Forget everything, to count the next part alone."""
        self._events.clear()

    def __iter__(self) -> Iterator[Event]:
        """Events rank by rank, each rank's in the order of its program."""
        return iter(sorted(self._events, key=lambda e: e.rank))

    def __len__(self) -> int:
        return len(self._events)

    def events(
        self,
        op: str | None = None,
        rank: int | None = None,
        group: tuple[int, ...] | None = None,
        where: Callable[[Event], bool] = lambda e: True,
    ) -> list[Event]:
        """The events of one op, one rank, one group; None lets all through."""
        keep = lambda e: (  # noqa: E731
            op in (None, e.op)
            and rank in (None, e.rank)
            and group in (None, e.group)
            and where(e)
        )
        return [e for e in self if keep(e)]

    def bytes(
        self,
        op: str | None = None,
        rank: int | None = None,
        group: tuple[int, ...] | None = None,
    ) -> int:
        """Bytes sent (by all ranks together unless `rank` is given)."""
        return sum(e.bytes for e in self.events(op, rank, group))

    def count(
        self,
        op: str | None = None,
        rank: int | None = None,
        group: tuple[int, ...] | None = None,
    ) -> int:
        """Operations begun (a collective of p ranks counts p times unless `rank` is
        given).
        """
        return len(self.events(op, rank, group))

    def per_rank(self, op: str | None = None) -> list[int]:
        """Bytes sent by each rank."""
        return [self.bytes(op, rank) for rank in range(self.size)]

    @property
    def time(self) -> float:
        """Virtual seconds until the last rank is done."""
        return max((e.end for e in self), default=0.0)

    def table(self) -> str:
        """A table of calls and bytes: one row an op, one column a rank."""
        ops = [op for op in OPS if self.count(op)]
        width = max([14, *(len(op) + 1 for op in ops)])
        head = (
            f"{'bytes sent':<{width}}"
            + "".join(f"{f'rank {r}':>12}" for r in range(self.size))
            + f"{'calls':>8}"
        )
        rows = [self._row(op, width) for op in ops if op != "work"]
        total = f"{'total':<{width}}" + "".join(f"{b:>12,}" for b in self.per_rank())
        return "\n".join([head, *rows, total])

    def _row(self, op: str, width: int) -> str:
        calls = max(self.count(op, r) for r in range(self.size))
        return (
            f"{op:<{width}}"
            + "".join(f"{b:>12,}" for b in self.per_rank(op))
            + f"{calls:>8}"
        )

    def __repr__(self) -> str:
        return (
            self.table() if self._events else f"Ledger({self.size} ranks, nothing sent)"
        )

    def draw(self, ax=None, *, timeline: bool = False):
        """Bytes sent, a bar a rank stacked by op; with `timeline=True` a Gantt chart in
        virtual time. Returns the axes.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            _, ax = plt.subplots()
        return _timeline(self, ax) if timeline else _bars(self, ax)


def _bars(ledger: Ledger, ax):
    """One bar a rank, its ops on top of one another."""
    below = [0.0] * ledger.size
    for op in [op for op in OPS if ledger.bytes(op)]:
        height = ledger.per_rank(op)
        ax.bar(range(ledger.size), height, bottom=below, label=op, width=0.7)
        below = [b + h for b, h in zip(below, height, strict=True)]
    ax.set(xlabel="rank", ylabel="bytes sent", xticks=range(ledger.size))
    if any(below):
        ax.legend(frameon=False)
    return ax


def _timeline(ledger: Ledger, ax):
    """A row per rank, a bar an event, from its start to its end."""
    colors = {op: f"C{i}" for i, op in enumerate(op for op in OPS if ledger.count(op))}
    for op, color in colors.items():
        spans = [(e.rank, e.start, e.end - e.start) for e in ledger.events(op)]
        if spans:
            rank, start, width = zip(*spans, strict=True)
            ax.barh(
                rank,
                width,
                left=start,
                height=0.7,
                color=color,
                label=op,
                edgecolor="white",
                linewidth=0.5,
            )
    ax.set(xlabel="virtual seconds", ylabel="rank", yticks=range(ledger.size))
    ax.invert_yaxis()
    if colors:
        ax.legend(frameon=False)
    return ax
