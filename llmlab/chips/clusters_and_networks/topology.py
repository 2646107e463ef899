"""Clusters as graphs: who is plugged into whom, with what bandwidth and latency.

A link goes one way; a cable is two links. Endpoints (hosts or GPUs) come first among
the nodes, switches after them. An endpoint forwards nothing that is not for it, but in
a torus, whose chips are also its switches.

    leaf_spine      every leaf (the switch of a rack) to every spine
    clos            pods of leaves and aggregation switches, under cores: three tiers
    fat_tree        clos of switches with k ports each, nothing oversubscribed
                    (Al-Fares et al. 2008, https://doi.org/10.1145/1402958.1402967)
    rail_optimised  GPU g of every node on leaf g, its rail; an NVSwitch in each node
    torus           a grid, closed to a ring in each direction
    dragonfly       groups of routers, a cable between any two groups
                    (Kim et al. 2008, https://doi.org/10.1109/ISCA.2008.19)

Simplified: a port's rate is its rate one way, what headers take is left out, and a
switch can do whatever its ports can.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from llmlab.chips.checked import counts

GBIT = 1e9 / 8  # bytes per second
NDR = 400 * GBIT  # a port of InfiniBand NDR, or of Ethernet with 400 Gbit/s
NVLINK = 450e9  # of an H100 to its NVSwitches, bytes per second one way
HOP = 1e-6  # seconds: a cable and the switch at its end, about

Cable = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Topology:
    """Nodes and links; link i goes from node src[i] to node dst[i].

    Attributes:
        nodes: names; the first `endpoints` of them send and receive.
        bandwidth: of each link, bytes per second.
        latency: of each link, seconds.
        forwarding: whether endpoints pass on what is for others.

    Raises:
        ValueError: a rate is not above 0, a latency below 0, a link leads nowhere, or
            some endpoint cannot reach another.
    """

    name: str
    nodes: tuple[str, ...]
    endpoints: int
    src: np.ndarray
    dst: np.ndarray
    bandwidth: np.ndarray
    latency: np.ndarray
    forwarding: bool = False
    index: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts(2, endpoints=self.endpoints)
        object.__setattr__(self, "index", {n: i for i, n in enumerate(self.nodes)})
        for i, rate in enumerate(self.bandwidth):
            if not 0 < rate < math.inf:
                raise ValueError(
                    f"{self.link_name(i)}: bandwidth={rate} must be above 0 and finite"
                )
            if not 0 <= self.latency[i] < math.inf:
                raise ValueError(
                    f"{self.link_name(i)}: latency={self.latency[i]} must be finite and"
                    " not negative"
                )
        lost = np.flatnonzero(self.distances([0])[: self.endpoints, 0] < 0)
        if len(lost):
            raise ValueError(
                f"{self.name} is cut: {self.nodes[lost[0]]} and {len(lost) - 1} more"
                f" cannot reach {self.nodes[0]}"
            )

    @property
    def links(self) -> int:
        return len(self.src)

    def link_name(self, i: int) -> str:
        return f"{self.nodes[self.src[i]]} → {self.nodes[self.dst[i]]}"

    def link(self, a: str, b: str) -> int:
        """The number of the link from a to b.

        Raises:
            ValueError: there is none.
        """
        found = self.by_ends.get((a, b))
        if found is None:
            raise ValueError(f"there is no link {a} → {b} in {self.name}")
        return found

    @cached_property
    def by_ends(self) -> dict[Cable, int]:
        """(name, name) → number of the link."""
        names = self.nodes
        ends = zip(self.src, self.dst, strict=True)
        return {(names[a], names[b]): i for i, (a, b) in enumerate(ends)}

    @cached_property
    def outgoing(self) -> tuple[np.ndarray, np.ndarray]:
        """(links by the node they leave, where each node's begin in them)."""
        order = np.argsort(self.src, kind="stable")
        begin = np.searchsorted(self.src[order], np.arange(len(self.nodes) + 1))
        return order, begin

    def cables(self, *kinds: str) -> list[Cable]:
        """Cables, by name; `kinds`: only those between these two kinds of node.

        A node's kind is the first word of its name: cables("leaf", "spine").
        """
        wanted = sorted(kinds)
        found = []
        for a, b in zip(self.src, self.dst, strict=True):
            cable = self.nodes[a], self.nodes[b]
            kind = sorted(name.split()[0] for name in cable)
            if a < b and (not kinds or kind == wanted):
                found.append(cable)
        return found

    def without(self, cables: Iterable[Cable]) -> Topology:
        """This cluster with cables down, both ways.

        Raises:
            ValueError: there is no such cable, or the cluster falls in two.
        """
        up = np.ones(self.links, dtype=bool)
        for a, b in cables:
            up[[self.link(a, b), self.link(b, a)]] = False
        down = int((~up).sum()) // 2
        return Topology(
            f"{self.name} with {down} down",
            self.nodes,
            self.endpoints,
            self.src[up],
            self.dst[up],
            self.bandwidth[up],
            self.latency[up],
            self.forwarding,
        )

    def distances(self, targets: Sequence[int]) -> np.ndarray:
        """Hops from every node to each target, shape (nodes, targets); −1: no way.

        Breadth first from all targets at once, against the links' direction.
        """
        targets = np.asarray(targets)
        order = self.outgoing[0]
        heads = self.dst[order]
        # where each node's links begin, of the nodes that have any
        nodes, begin = np.unique(self.src[order], return_index=True)
        passing = np.ones(len(self.nodes), dtype=bool)
        passing[: self.endpoints] = self.forwarding
        found = np.full((len(self.nodes), len(targets)), -1, dtype=np.int32)
        frontier = np.zeros(found.shape, dtype=bool)
        frontier[targets, np.arange(len(targets))] = True
        hops = 0
        while frontier.any():
            found[frontier] = hops
            if hops:  # what has just been reached leads on only if it forwards
                frontier &= passing[:, None]
            hops += 1
            reached = np.logical_or.reduceat(frontier[heads], begin, axis=0)
            frontier = np.zeros(found.shape, dtype=bool)
            frontier[nodes] = reached
            frontier &= found < 0
        return found


class Builder:
    """Collects nodes and cables."""

    def __init__(self, endpoints: list[str]) -> None:
        self.nodes = list(endpoints)
        self.endpoints = len(endpoints)
        self.rows: list[tuple[int, int, float, float]] = []

    def add(self, name: str) -> int:
        self.nodes.append(name)
        return len(self.nodes) - 1

    def cable(self, a: int, b: int, bandwidth: float, latency: float) -> None:
        self.rows += [(a, b, bandwidth, latency), (b, a, bandwidth, latency)]

    def build(self, name: str, forwarding: bool = False) -> Topology:
        src, dst, bandwidth, latency = zip(*self.rows, strict=True)
        return Topology(
            name,
            tuple(self.nodes),
            self.endpoints,
            np.array(src, dtype=np.int64),
            np.array(dst, dtype=np.int64),
            np.array(bandwidth, dtype=float),
            np.array(latency, dtype=float),
            forwarding,
        )


def leaf_spine(
    leaves: int,
    hosts: int,
    spines: int,
    bandwidth: float = NDR,
    uplink: float | None = None,
    latency: float = HOP,
) -> Topology:
    """Two tiers: `hosts` on each leaf, and each leaf on every spine.

    Args:
        uplink: bytes per second of a cable to a spine; a host's rate if None. What
            leaves a rack is oversubscribed hosts · bandwidth / (spines · uplink) times.
    """
    counts(leaves=leaves, hosts=hosts, spines=spines)
    uplink = bandwidth if uplink is None else uplink
    net = Builder([f"host {i}" for i in range(leaves * hosts)])
    tops = [net.add(f"spine {s}") for s in range(spines)]
    for i in range(leaves):
        leaf = net.add(f"leaf {i}")
        for h in range(hosts):
            net.cable(i * hosts + h, leaf, bandwidth, latency)
        for top in tops:
            net.cable(leaf, top, uplink, latency)
    return net.build(f"leaf–spine of {leaves} × {hosts} hosts, {spines} spines")


def clos(
    pods: int,
    leaves: int,
    hosts: int,
    aggs: int,
    cores: int,
    bandwidth: float = NDR,
    up: float | None = None,
    top: float | None = None,
    latency: float = HOP,
    name: str | None = None,
) -> Topology:
    """Three tiers: in each pod every leaf is on every aggregation switch.

    Aggregation switch a of every pod is on the same `cores` cores.

    Args:
        leaves, hosts, aggs: leaves per pod, hosts per leaf, aggregation switches per
            pod.
        up: bytes per second from a leaf to one aggregation switch; as a host's if None.
        top: from an aggregation switch to one core; as a host's if None.
    """
    counts(pods=pods, leaves=leaves, hosts=hosts, aggs=aggs, cores=cores)
    up = bandwidth if up is None else up
    top = bandwidth if top is None else top
    net = Builder([f"host {i}" for i in range(pods * leaves * hosts)])
    tops = [[net.add(f"core {a}.{c}") for c in range(cores)] for a in range(aggs)]
    host = 0
    for pod in range(pods):
        middles = [net.add(f"agg {pod}.{a}") for a in range(aggs)]
        for middle, group in zip(middles, tops, strict=True):
            for core in group:
                net.cable(middle, core, top, latency)
        for i in range(leaves):
            leaf = net.add(f"leaf {pod}.{i}")
            for middle in middles:
                net.cable(leaf, middle, up, latency)
            for _ in range(hosts):
                net.cable(host, leaf, bandwidth, latency)
                host += 1
    shape = f"{pods} pods × {leaves} leaves × {hosts} hosts"
    return net.build(name or f"three tiers, {shape}")


def fat_tree(k: int, bandwidth: float = NDR, latency: float = HOP) -> Topology:
    """k³/4 hosts on switches of k ports, all cables alike; k is even."""
    counts(2, k=k)
    if k % 2:
        raise ValueError(f"k={k} must be even: half of the ports go up")
    half = k // 2
    name = f"fat tree of {k}-port switches"
    return clos(k, half, half, half, half, bandwidth, latency=latency, name=name)


def rail_optimised(
    nodes: int,
    gpus: int = 8,
    spines: int = 0,
    bandwidth: float = NDR,
    nvlink: float = NVLINK,
    uplink: float | None = None,
    latency: float = HOP,
) -> Topology:
    """Nodes of `gpus` GPUs on an NVSwitch; GPU g of each node is on leaf g, its rail.

    Each GPU has a network card of its own, as in a DGX H100.

    Args:
        spines: above the rails; with none ("rail-only") GPUs of different nodes reach
            each other on their own rail only, so a message changes GPU inside a node.
        uplink: bytes per second of a cable to a spine; as many as a rail needs to lose
            nothing if None.
    """
    counts(nodes=nodes, gpus=gpus)
    counts(0, spines=spines)
    if uplink is None and spines:
        uplink = nodes * bandwidth / spines
    names = [f"gpu {n}.{g}" for n in range(nodes) for g in range(gpus)]
    net = Builder(names)
    for n in range(nodes):
        switch = net.add(f"nvswitch {n}")
        for g in range(gpus):
            net.cable(n * gpus + g, switch, nvlink, latency)
    tops = [net.add(f"spine {s}") for s in range(spines)]
    for g in range(gpus):
        rail = net.add(f"rail {g}")
        for n in range(nodes):
            net.cable(n * gpus + g, rail, bandwidth, latency)
        for top in tops:
            net.cable(rail, top, uplink, latency)
    # without spines the GPUs of a node pass on what comes by NVLink
    return net.build(f"rails of {nodes} × {gpus} GPUs", forwarding=not spines)


def torus(
    dims: Sequence[int], bandwidth: float = 100e9, latency: float = HOP
) -> Topology:
    """Chips on a grid, each on both neighbours in every direction.

    A direction of two has one cable. The default is about a link of a TPU's.
    """
    for i, size in enumerate(dims):
        counts(2, **{f"dims[{i}]": size})
    if not dims:
        raise ValueError("dims=() must have a direction")
    places = list(np.ndindex(*dims))
    net = Builder([f"chip {'.'.join(map(str, place))}" for place in places])
    at = {place: i for i, place in enumerate(places)}
    for place in places:
        for axis, size in enumerate(dims):
            if size == 2 and place[axis] == 1:
                continue  # the cable that is there already
            on = list(place)
            on[axis] = (place[axis] + 1) % size
            net.cable(at[place], at[tuple(on)], bandwidth, latency)
    name = " × ".join(map(str, dims))
    return net.build(f"torus of {name}", forwarding=True)


def dragonfly(
    a: int,
    h: int,
    p: int,
    g: int | None = None,
    bandwidth: float = NDR,
    latency: float = HOP,
) -> Topology:
    """g groups of a routers with p hosts and h cables to other groups each.

    Inside a group all routers are on one another. Every two groups have as many cables
    as go into the a · h ports of a group evenly; ports that are left stay empty.

    Args:
        g: a · h + 1 if None, the largest.
    """
    counts(a=a, h=h, p=p)
    g = a * h + 1 if g is None else g
    counts(2, g=g)
    if g > a * h + 1:
        raise ValueError(f"g={g} must be at most a · h + 1 = {a * h + 1}")
    net = Builder([f"host {i}" for i in range(g * a * p)])
    routers = [[net.add(f"router {i}.{r}") for r in range(a)] for i in range(g)]
    host = 0
    for group in routers:
        for r, router in enumerate(group):
            for _ in range(p):
                net.cable(host, router, bandwidth, latency)
                host += 1
            for other in group[r + 1 :]:
                net.cable(router, other, bandwidth, latency)
    # port q of group i leads to group i + q + 1; parallel cables become a wider one
    wide: dict[tuple[int, int], float] = {}
    for i in range(g):
        for q in range(a * h // (g - 1) * (g - 1)):
            j = (i + q % (g - 1) + 1) % g
            if i > j:
                continue
            back = q - q % (g - 1) + (g - 2 - q % (g - 1))
            ends = (routers[i][q // h], routers[j][back // h])
            wide[ends] = wide.get(ends, 0.0) + bandwidth
    for ends, rate in wide.items():
        net.cable(*ends, rate, latency)
    return net.build(f"dragonfly of {g} groups × {a} routers × {p} hosts")
