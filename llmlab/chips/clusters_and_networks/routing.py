"""Which links a flow takes.

All shortest paths count as equally good. Between them decides

    ecmp      a hash of (sender, receiver, port, seed, switch) at each switch, so that
              all packets of a flow stay in order on one path (RFC 2992)
    spray     every packet takes the next port in turn: a flow is split evenly at each
              switch, and the receiver sorts its packets
    adaptive  the port with the least on it, flow by flow in the order of the list

Simplified: real hashes differ from ours in every number and in none of the statistics;
no switch hashes as the one before it does ("polarisation"); sprayed packets are sorted
for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llmlab.chips.clusters_and_networks.topology import Topology

HOW = ("ecmp", "spray", "adaptive")


class Flow(NamedTuple):
    """Bytes from one endpoint to another.

    Attributes:
        start: seconds, at the earliest.
        after: numbers of the flows that must have arrived before.
        port: tells flows between the same two apart, as a queue pair's UDP port does.
    """

    src: int
    dst: int
    bytes: float
    start: float = 0.0
    after: tuple[int, ...] = ()
    port: int = 0


@dataclass(frozen=True, eq=False)
class Routes:
    """Flow f takes the links link[begin[f] : begin[f + 1]], and puts that share of
    itself on each (1 but where it is sprayed).
    """

    begin: np.ndarray
    link: np.ndarray
    share: np.ndarray
    latency: np.ndarray  # of each flow's way, seconds

    def of(self, flow: int) -> np.ndarray:
        """The links of one flow."""
        return self.link[self.begin[flow] : self.begin[flow + 1]]

    def load(self, links: int, bytes: np.ndarray) -> np.ndarray:
        """Bytes on each link, once all flows are through."""
        each = np.repeat(bytes, np.diff(self.begin)) * self.share
        return np.bincount(self.link, each, links)


def check_flows(topology: Topology, flows: Sequence[Flow]) -> None:
    """Nothing, if each can be sent.

    Raises:
        ValueError: names the first that cannot.
    """
    for f, flow in enumerate(flows):
        for name in ("src", "dst"):
            end = getattr(flow, name)
            if not 0 <= end < topology.endpoints:
                raise ValueError(
                    f"flow {f}: {name}={end} must be one of the endpoints 0 …"
                    f" {topology.endpoints - 1}"
                )
        if flow.src == flow.dst:
            raise ValueError(f"flow {f} goes from {flow.src} to itself")
        if not 0 <= flow.bytes < np.inf:
            raise ValueError(f"flow {f}: bytes={flow.bytes} must be finite, at least 0")
        if not 0 <= flow.start < np.inf:
            raise ValueError(f"flow {f}: start={flow.start} must be finite, at least 0")


def mix(*parts: np.ndarray | int) -> np.ndarray:
    """A hash of 64 bits of whole numbers (splitmix64's last step, once for each)."""
    result = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in parts:
            result = result + np.asarray(part).astype(np.uint64)
            result = result + np.uint64(0x9E3779B97F4A7C15)
            result = (result ^ (result >> np.uint64(30))) * np.uint64(
                0xBF58476D1CE4E5B9
            )
            result = (result ^ (result >> np.uint64(27))) * np.uint64(
                0x94D049BB133111EB
            )
            result = result ^ (result >> np.uint64(31))
    return result


class _Walk:
    """From each flow's sender to its receiver, all flows at once, hop by hop."""

    def __init__(self, topology: Topology, flows: Sequence[Flow]) -> None:
        check_flows(topology, flows)
        self.topology = topology
        self.src = np.array([flow.src for flow in flows], dtype=np.int64)
        self.dst = np.array([flow.dst for flow in flows], dtype=np.int64)
        targets, self.column = np.unique(self.dst, return_inverse=True)
        self.hops = topology.distances(targets)
        lost = np.flatnonzero(self.hops[self.src, self.column] < 0)
        if len(lost):
            a, b = self.src[lost[0]], self.dst[lost[0]]
            raise ValueError(
                f"flow {lost[0]}: no way from {topology.nodes[a]} to"
                f" {topology.nodes[b]} in {topology.name}"
            )

    def choices(
        self, flow: np.ndarray, node: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(row, link): all links that bring the flow of a row one hop nearer."""
        order, begin = self.topology.outgoing
        degree = begin[node + 1] - begin[node]
        row = np.repeat(np.arange(len(node)), degree)
        first = np.cumsum(degree) - degree
        link = order[begin[node][row] + np.arange(len(row)) - first[row]]
        column = self.column[flow][row]
        head = self.topology.dst[link]
        left = self.hops[node[row], column]
        nearer = self.hops[head, column] == left - 1
        if not self.topology.forwarding:
            # another endpoint is as near, but passes nothing on
            nearer &= (head >= self.topology.endpoints) | (left == 1)
        return row[nearer], link[nearer]


def routes(
    topology: Topology, flows: Sequence[Flow], how: str = "ecmp", seed: int = 0
) -> Routes:
    """The links of each flow.

    Args:
        how: "ecmp", "spray" or "adaptive".
        seed: of the hash.
    Raises:
        ValueError: another `how`, or a flow that cannot be sent, by number.
    """
    if how not in HOW:
        raise ValueError(f"how={how!r} must be one of {', '.join(HOW)}")
    walk = _Walk(topology, flows)
    if how == "adaptive":
        flow, link, share = _least_loaded(walk, flows)
    else:
        port = np.array([each.port for each in flows], dtype=np.int64)
        flow, link, share = _spread(walk, port, None if how == "spray" else seed)
    order = np.argsort(flow, kind="stable")
    flow, link, share = flow[order], link[order], share[order]
    begin = np.searchsorted(flow, np.arange(len(flows) + 1))
    # with a share on each of several ways, the mean of their latencies
    latency = np.bincount(flow, topology.latency[link] * share, len(flows))
    return Routes(begin, link, share, latency)


def _spread(
    walk: _Walk, port: np.ndarray, seed: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(flow, link, share); one link a hop by hash, or with no seed all of them."""
    topology = walk.topology
    flow, node = np.arange(len(walk.src)), walk.src
    share = np.ones(len(flow))
    found = [(flow[:0], flow[:0], share[:0])]
    while len(flow):
        row, link = walk.choices(flow, node)
        many = np.bincount(row, minlength=len(flow))
        if seed is None:
            flow, share = flow[row], (share / many)[row]
        else:
            end = walk.src[flow], walk.dst[flow]
            drawn = mix(*end, port[flow], seed, node) % many.astype(np.uint64)
            first = np.cumsum(many) - many
            link = link[first + drawn.astype(np.int64)]
        found.append((flow, link, share))
        node = topology.dst[link]
        going = node != walk.dst[flow]
        flow, node, share = flow[going], node[going], share[going]
        if seed is None and len(flow):
            # parts of a flow that meet again at a switch go on as one
            key, where = np.unique(
                flow * len(topology.nodes) + node, return_inverse=True
            )
            flow, node = key // len(topology.nodes), key % len(topology.nodes)
            share = np.bincount(where, share)
    flow, link, share = (np.concatenate(part) for part in zip(*found, strict=True))
    return flow, link, share


def _least_loaded(
    walk: _Walk, flows: Sequence[Flow]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(flow, link, share): flow after flow, at each hop the emptiest port so far."""
    topology = walk.topology
    load = np.zeros(topology.links)
    found = []
    for f, flow in enumerate(flows):
        node = flow.src
        while node != flow.dst:
            _, links = walk.choices(np.array([f]), np.array([node]))
            link = links[np.argmin(load[links])]
            load[link] += flow.bytes / topology.bandwidth[link]
            found.append((f, link))
            node = topology.dst[link]
    flow, link = np.array(found, dtype=np.int64).reshape(-1, 2).T
    return flow, link, np.ones(len(flow))
