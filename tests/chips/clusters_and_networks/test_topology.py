"""Topologies against networkx, and against what the papers count."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest

from llmlab.chips import clusters_and_networks as cn


def graph(net: cn.Topology) -> nx.DiGraph:
    """The same, for networkx."""
    found = nx.DiGraph()
    found.add_nodes_from(range(len(net.nodes)))
    for a, b, rate in zip(net.src, net.dst, net.bandwidth, strict=True):
        found.add_edge(int(a), int(b), capacity=float(rate))
    return found


def bisection(net: cn.Topology) -> float:
    """Bytes per second from the first half of the endpoints to the second."""
    found, half = graph(net), net.endpoints // 2
    for host in range(net.endpoints):
        if host < half:
            found.add_edge("from", host)  # no capacity: without limit
        else:
            found.add_edge(host, "to")
    return nx.maximum_flow_value(found, "from", "to")


NETS = {
    "leaf–spine": cn.leaf_spine(3, 4, 2),
    "clos": cn.clos(2, 3, 2, 2, 3),
    "fat tree": cn.fat_tree(4),
    "rails": cn.rail_optimised(3, 4, spines=2),
    "rail-only": cn.rail_optimised(3, 4),
    "torus": cn.torus((3, 4, 2)),
    "dragonfly": cn.dragonfly(3, 2, 2),
    "small dragonfly": cn.dragonfly(4, 2, 1, g=4),
}


@pytest.mark.parametrize("name", NETS)
def test_distances_are_those_of_networkx(name):
    net = NETS[name]
    targets = [0, net.endpoints // 2, net.endpoints - 1]
    found = net.distances(targets)
    full = graph(net)
    for column, target in enumerate(targets):
        seen = full
        if not net.forwarding:  # other endpoints lead nowhere
            others = [n for n in range(net.endpoints) if n != target]
            seen = full.copy()
            seen.remove_edges_from([e for n in others for e in full.in_edges(n)])
        wanted = nx.shortest_path_length(seen, target=target)
        for node in range(len(net.nodes)):
            assert found[node, column] == wanted.get(node, -1), (node, target)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_a_fat_tree_counts_and_cuts_as_in_the_paper(k):
    net = cn.fat_tree(k, bandwidth=3.0)
    assert net.endpoints == k**3 // 4
    assert len(net.nodes) - net.endpoints == 5 * k**2 // 4
    degree = np.bincount(net.src)[net.endpoints :]
    assert set(degree) == {k}  # every port is used
    # full bisection: every host of a half sends at its full rate
    assert bisection(net) == pytest.approx(net.endpoints / 2 * 3.0)


def test_the_fat_tree_of_the_course_has_1024_hosts():
    assert cn.fat_tree(16).endpoints == 1024


@pytest.mark.parametrize(("spines", "over"), [(4, 1.0), (2, 2.0), (1, 4.0)])
def test_oversubscription_divides_the_bisection(spines, over):
    net = cn.leaf_spine(4, 4, spines, bandwidth=1.0)
    assert bisection(net) == pytest.approx(8 / over)


def test_llama_3s_three_tiers_give_a_seventh_between_pods():
    """Eight hosts a leaf, one to seven above the pods."""
    net = cn.clos(2, 2, 8, 8, 1, bandwidth=1.0, up=1.0, top=2 / 7)
    assert bisection(net) == pytest.approx(16 / 7)


def test_a_torus_cuts_twice_across_its_longest_direction():
    net = cn.torus((4, 3), bandwidth=1.0)
    assert bisection(net) == 2 * 3
    assert len(net.src) == 2 * 2 * 12
    assert len(cn.torus((2, 2)).src) == 2 * 4


def group(name):
    """Of a router, from its name."""
    return name.split()[1].split(".")[0]


def test_a_dragonfly_reaches_every_group_over_one_cable():
    a, h, p = 3, 2, 2
    net = cn.dragonfly(a, h, p)
    assert net.endpoints == p * a * (a * h + 1)
    groups = {
        name: name.split()[1].split(".")[0] for name in net.nodes[net.endpoints :]
    }
    far = [c for c in net.cables("router", "router") if groups[c[0]] != groups[c[1]]]
    pairs = {frozenset((groups[x], groups[y])) for x, y in far}
    assert len(far) == len(pairs) == 7 * 6 // 2
    ports = np.bincount(net.src)[net.endpoints :]
    assert set(ports) == {p + (a - 1) + h}
    # host, router, gateway, gateway, router, host: at most five links
    assert net.distances([0])[: net.endpoints].max() == 5


def test_a_small_dragonfly_has_several_cables_between_two_groups():
    net = cn.dragonfly(4, 2, 1, g=4, bandwidth=1.0)
    far = 0.0
    for a, b in net.cables("router", "router"):
        if group(a) != group(b):
            far += net.bandwidth[net.link(a, b)]
    assert far == 6 * (4 * 2 // 3)  # six pairs of groups, two cables each


def test_rails_are_one_switch_away_and_nodes_too():
    net = cn.rail_optimised(4, 8, spines=2)
    hops = net.distances([0])[: net.endpoints, 0].reshape(4, 8)
    assert (hops[1:, 0] == 2).all()  # its own rail
    assert (hops[0, 1:] == 2).all()  # its own node
    assert (hops[1:, 1:] == 4).all()  # over a spine
    rail_only = cn.rail_optimised(4, 8)
    hops = rail_only.distances([0])[: net.endpoints, 0].reshape(4, 8)
    assert (hops[1:, 1:] == 4).all()  # through another GPU of the node


def test_cables_go_down_both_ways_and_nothing_else_changes():
    net = cn.leaf_spine(2, 2, 3)
    down = net.without([("leaf 0", "spine 1")])
    assert (net.links, down.links) == (20, 18)
    assert ("leaf 0", "spine 1") not in down.by_ends
    assert ("spine 1", "leaf 0") not in down.by_ends
    assert net.links == 20
    assert len(net.cables("leaf", "spine")) == 6
    assert len(down.cables("spine", "leaf")) == 5
    assert len(net.cables()) == 10


REFUSED = {
    "bandwidth=0.0 must": lambda: cn.leaf_spine(2, 2, 2, bandwidth=0),
    "bandwidth=nan": lambda: cn.fat_tree(4, bandwidth=float("nan")),
    "bandwidth=inf": lambda: cn.torus((3, 3), bandwidth=float("inf")),
    "bandwidth=-1": lambda: cn.leaf_spine(2, 2, 2, uplink=-1),
    "latency=-1e-06": lambda: cn.leaf_spine(2, 2, 2, latency=-1e-6),
    "dims[1]=1 must": lambda: cn.torus((4, 1)),
    "dims=() must": lambda: cn.torus(()),
    "k=5 must be even": lambda: cn.fat_tree(5),
    "k=0 must": lambda: cn.fat_tree(0),
    "hosts=0": lambda: cn.leaf_spine(2, 0, 2),
    "spines=2.5": lambda: cn.leaf_spine(2, 2, 2.5),
    "spines=-1": lambda: cn.rail_optimised(2, 8, spines=-1),
    "g=8 must be at most": lambda: cn.dragonfly(3, 2, 1, g=8),
    "endpoints=1": lambda: cn.leaf_spine(1, 1, 1),
    "is cut: host 4": lambda: cn.leaf_spine(2, 4, 1).without([("leaf 1", "spine 0")]),
    "no link leaf 0 → leaf 1": lambda: cn.fat_tree(4).without([("leaf 0", "leaf 1")]),
}


@pytest.mark.parametrize("says", REFUSED)
def test_nonsense_is_refused_by_name(says):
    with pytest.raises(ValueError) as error:
        REFUSED[says]()
    assert says in str(error.value)
