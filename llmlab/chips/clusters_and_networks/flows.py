"""A network as flows that share links: max–min fair rates, from event to event.

Bertsekas and Gallager 1992, Data Networks, section 6.5. Rates x are max–min fair if a
flow can get more only at the cost of one whose rate is no higher. They are unique, and
filling finds them: all flows rise together; when a link is full its flows stop.

    full         Σ_f share[f, l] x[f] = c[l]
    level        (c[l] − Σ over stopped flows) / Σ over rising flows of share[f, l]:
                 the rate at which l will be full; it never falls as flows stop
    bottleneck   of f: a full link of f's on which no flow is faster. Rates with which
                 every flow has one are max–min fair, and the other way round.

    f, l     a flow, a link          c  bytes per second of a link
    x        bytes per second        share  how much of f goes over l, mostly 1

`simulate` computes the rates, runs to the next arrival or finish, and computes them
again: exact, for flows that share in this way. A flow's last byte arrives the latency
of its way after it was sent, and those that wait for it begin then.

Simplified: packets are infinitely small, rates change at once everywhere, queues and
losses do not exist. TCP and DCQCN only come near to such rates, after some round trips.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import unwrap

import numpy as np

from llmlab.chips.clusters_and_networks.routing import Flow, Routes, routes
from llmlab.chips.clusters_and_networks.topology import Topology

SAME = 1e-9  # relative: levels and times this near to each other are equal
MANY = 3000  # flows from which on finishes are merged


def fair_rates(
    topology: Topology, ways: Routes, active: np.ndarray | None = None
) -> np.ndarray:
    """Bytes per second of each flow; 0 of those that are not active (all if None)."""
    count = len(ways.begin) - 1
    active = np.arange(count) if active is None else np.asarray(active)
    rates = np.zeros(count)
    _filling()(
        ways.begin, ways.link, ways.share, topology.bandwidth, active, SAME, rates
    )
    return rates


@cache
def _filling() -> Callable:
    """`_fill`, compiled; as it is where numba is missing."""
    plain = unwrap(_fill)
    try:
        from numba import njit
    except ImportError:  # slow, and the same
        return plain
    return njit(cache=True)(plain)


def _fill(begin, link, share, bandwidth, active, same, rates):
    """Write the rates of the active flows; returns how many (flow, link) it touched.

    A link stops its flows as soon as it is the lowest on the way of each of them: the
    others' levels only grow, so none of them would stop earlier elsewhere. In a round
    many links do so at once, all over the network.
    """
    left = bandwidth.copy()
    weight = np.zeros(len(left))  # Σ share of the flows that still rise
    level = np.zeros(len(left))
    lowest = np.zeros(len(left), dtype=np.bool_)
    live = np.empty(len(left), dtype=np.int64)  # links that flows rise on
    links = 0
    touched = 0
    for f in active:
        for i in range(begin[f], begin[f + 1]):
            if weight[link[i]] == 0:
                live[links] = link[i]
                links += 1
            weight[link[i]] += share[i]
        touched += begin[f + 1] - begin[f]
    rising = active.copy()
    low = np.empty(len(active))  # the lowest level on each rising flow's way
    count = len(active)
    while count:
        kept = 0
        for one in live[:links]:
            if weight[one] > same:
                live[kept] = one
                kept += 1
                level[one] = left[one] / weight[one]
                lowest[one] = True
        links = kept
        for r in range(count):
            f = rising[r]
            least = np.inf
            for i in range(begin[f], begin[f + 1]):
                least = min(least, level[link[i]])
            low[r] = least
            for i in range(begin[f], begin[f + 1]):
                if level[link[i]] > least * (1 + same):
                    lowest[link[i]] = False
            touched += begin[f + 1] - begin[f]
        kept = 0
        for r in range(count):
            f = rising[r]
            stopped = False
            for i in range(begin[f], begin[f + 1]):
                if lowest[link[i]]:
                    stopped = True
                    break
            if not stopped:
                rising[kept] = f
                kept += 1
                continue
            rates[f] = low[r]
            for i in range(begin[f], begin[f + 1]):
                left[link[i]] -= low[r] * share[i]
                weight[link[i]] -= share[i]
        count = kept
    return touched


@dataclass(frozen=True, eq=False)
class Run:
    """What became of the flows.

    Attributes:
        start: seconds at which each began.
        finish: at which its last byte arrived.
        carried: bytes over each link.
        events: how often rates were computed.
        touched: (flow, link) pairs looked at in all: what it cost.
    """

    start: np.ndarray
    finish: np.ndarray
    carried: np.ndarray
    events: int
    touched: int

    @property
    def seconds(self) -> float:
        """Until everything had arrived."""
        return float(self.finish.max(initial=0.0))

    def rate(self, flows: Sequence[Flow]) -> np.ndarray:
        """Mean bytes per second of each flow, latency and all."""
        return np.array([flow.bytes for flow in flows]) / (self.finish - self.start)


def simulate(
    topology: Topology,
    flows: Sequence[Flow],
    how: str = "ecmp",
    seed: int = 0,
    ways: Routes | None = None,
    merge: float | None = None,
) -> Run:
    """When every flow begins and ends.

    Args:
        how, seed: how paths are chosen, see `routing`; or the `ways` themselves.
        merge: 0 is exact. Else what a finished flow leaves free is given to others a
            little later, together with what others leave: at most this share of the
            duration of the shortest flow on its way. So many flows of many sizes cost
            a fixed number of rounds, not one each. None: 0, or from MANY flows on 0.01.
    Raises:
        ValueError: a flow cannot be sent, waits for itself in a circle or for one that
            is not there.
    """
    if merge is None:
        merge = 0.0 if len(flows) < MANY else 0.01
    if not 0 <= merge < 1:
        raise ValueError(f"merge={merge} must be at least 0 and below 1")
    ways = routes(topology, flows, how, seed) if ways is None else ways
    clock = _Clock(flows, ways)
    rates = np.zeros(len(flows))
    fill, events, touched = _filling(), 0, 0
    while len(active := clock.begin()):
        touched += fill(
            ways.begin,
            ways.link,
            ways.share,
            topology.bandwidth,
            active,
            SAME,
            rates,
        )
        events += 1
        clock.run(active, rates[active], merge)
    clock.check_circles()
    bytes = np.array([flow.bytes for flow in flows], dtype=float)
    carried = ways.load(topology.links, bytes)
    return Run(clock.start, clock.finish, carried, events, touched)


class _Clock:
    """Which flows are on their way, and what happens next."""

    def __init__(self, flows: Sequence[Flow], ways: Routes) -> None:
        count = len(flows)
        self.now = 0.0
        self.latency = ways.latency
        self.left = np.array([flow.bytes for flow in flows], dtype=float)
        self.start = np.full(count, np.nan)
        self.finish = np.full(count, np.nan)
        self.waits = np.array([len(set(flow.after)) for flow in flows], dtype=np.int64)
        self.ready = np.array([flow.start for flow in flows], dtype=float)
        self.next: dict[int, list[int]] = {}
        for f, flow in enumerate(flows):
            for other in set(flow.after):
                if not 0 <= other < count or other == f:
                    raise ValueError(f"flow {f}: after={flow.after} names flow {other}")
                self.next.setdefault(other, []).append(f)
        free = np.flatnonzero(self.waits == 0)
        self.due = [(self.ready[f], int(f)) for f in free]
        heapq.heapify(self.due)
        self.active = np.empty(0, dtype=np.int64)

    def begin(self) -> np.ndarray:
        """Start what is due; with nothing on its way, go on to when something is."""
        while True:
            if not len(self.active) and self.due:
                self.now = max(self.now, self.due[0][0])
            new = []
            while self.due and self.due[0][0] <= self.now * (1 + SAME):
                new.append(heapq.heappop(self.due)[1])
            if new:
                self.start[new] = self.now
                self.active = np.concatenate([self.active, np.array(new)])
            empty = self.active[self.left[self.active] <= 0]
            if not len(empty):
                return self.active
            self.end(empty, np.full(len(empty), self.now))

    def run(self, active: np.ndarray, rates: np.ndarray, merge: float) -> None:
        """On to the next finish or arrival, with these rates."""
        needed = self.left[active] / rates
        first = needed.min()
        until = first * (1 + SAME)
        if merge:
            own = self.now + needed - self.start[active]
            until = first + merge * own.min()
        if self.due:
            until = min(until, self.due[0][0] - self.now)
        done = needed <= until
        self.left[active] -= rates * until
        ended = self.now + needed[done]
        self.now += until
        self.left[active[done]] = 0.0
        self.end(active[done], ended)

    def end(self, flows: np.ndarray, at: np.ndarray) -> None:
        """These have been sent; whoever waited for the last of them is due."""
        self.finish[flows] = at + self.latency[flows]
        self.active = self.active[np.isnan(self.finish[self.active])]
        for f in flows:
            for other in self.next.get(int(f), ()):
                self.ready[other] = max(self.ready[other], self.finish[f])
                self.waits[other] -= 1
                if not self.waits[other]:
                    heapq.heappush(self.due, (self.ready[other], other))

    def check_circles(self) -> None:
        stuck = np.flatnonzero(np.isnan(self.finish))
        if len(stuck):
            raise ValueError(
                f"flow {stuck[0]} and {len(stuck) - 1} more wait for each other"
            )
