"""Ways: shortest, spread as the birthday problem says, and kept by a flow."""

from __future__ import annotations

import itertools

import networkx as nx
import numpy as np
import pytest

from llmlab.chips import clusters_and_networks as cn
from llmlab.chips.clusters_and_networks.routing import mix
from tests.chips.clusters_and_networks.test_topology import NETS, graph


def some_flows(net, count=40, seed=0):
    draw = np.random.default_rng(seed)
    ends = [draw.choice(net.endpoints, 2, replace=False) for _ in range(count)]
    return [cn.Flow(int(a), int(b), 1.0, port=i) for i, (a, b) in enumerate(ends)]


@pytest.mark.parametrize("how", cn.HOW)
@pytest.mark.parametrize("name", NETS)
def test_every_way_is_a_shortest_path(name, how):
    net = NETS[name]
    flows = some_flows(net)
    ways = cn.routes(net, flows, how)
    for f, flow in enumerate(flows):
        links = ways.of(f)
        share = ways.share[ways.begin[f] : ways.begin[f + 1]]
        hops = net.distances([flow.dst])[flow.src, 0]
        assert share.sum() == pytest.approx(hops)
        # what comes into a node goes out of it again
        balance = np.zeros(len(net.nodes))
        np.add.at(balance, net.dst[links], share)
        np.add.at(balance, net.src[links], -share)
        wanted = np.zeros(len(net.nodes))
        wanted[flow.src], wanted[flow.dst] = -1, 1
        np.testing.assert_allclose(balance, wanted, atol=1e-12)
        if not net.forwarding:  # nobody's card passes on what is for others
            ends = set(net.dst[links]) & set(range(net.endpoints))
            assert ends == {flow.dst}
        if how != "spray":
            assert len(links) == hops
            assert (share == 1).all()
            assert (net.src[links[1:]] == net.dst[links[:-1]]).all()


def test_spraying_uses_all_shortest_paths():
    net = cn.fat_tree(4)
    ways = cn.routes(net, [cn.Flow(0, 15, 1.0)], "spray")
    paths = list(nx.all_shortest_paths(graph(net), 0, 15))
    used = {(p[i], p[i + 1]) for p in paths for i in range(len(p) - 1)}
    found = {(int(net.src[i]), int(net.dst[i])) for i in ways.of(0)}
    assert found == used


def test_the_hash_keeps_a_flow_and_moves_with_port_and_seed():
    net = cn.leaf_spine(2, 2, 8)
    flows = [cn.Flow(0, 2, 1.0, port=7)] * 2
    ways = cn.routes(net, flows, seed=3)
    assert (ways.of(0) == ways.of(1)).all()
    spines = {
        int(cn.routes(net, [cn.Flow(0, 2, 1.0, port=p)], seed=s).of(0)[1])
        for p in range(8)
        for s in range(8)
    }
    assert len(spines) == 8


def test_hashes_spread_evenly():
    """χ² of 16 bins over 16,000 values: below 40 but once in 2,000 times."""
    values = mix(np.arange(16_000), 5, 1) % np.uint64(16)
    seen = np.bincount(values.astype(int), minlength=16)
    assert ((seen - 1000) ** 2 / 1000).sum() < 40


@pytest.mark.parametrize(("flows", "ports"), [(2, 4), (3, 4), (4, 4), (5, 4), (1, 3)])
def test_the_birthday_problem_by_enumeration(flows, ports):
    ways = list(itertools.product(range(ports), repeat=flows))
    free = sum(len(set(way)) == flows for way in ways)
    assert cn.no_collision(flows, ports) == pytest.approx(free / len(ways))


def test_collisions_are_as_frequent_as_the_birthday_problem_says():
    net = cn.leaf_spine(2, 3, 8)
    flows = [cn.Flow(i, 3 + i, 1.0) for i in range(3)]
    free = 0
    for seed in range(1000):
        ways = cn.routes(net, flows, seed=seed)
        free += len({int(ways.of(f)[1]) for f in range(3)}) == 3
    wanted = cn.no_collision(3, 8)
    spread = np.sqrt(wanted * (1 - wanted) / 1000)
    assert abs(free / 1000 - wanted) < 4 * spread


def test_the_emptiest_port_avoids_collisions_where_that_is_possible():
    net = cn.leaf_spine(2, 8, 8)
    flows = [cn.Flow(i, 8 + i, 1.0) for i in range(8)]
    ways = cn.routes(net, flows, "adaptive")
    assert ways.load(net.links, np.ones(8)).max() == 1


def test_loads_are_bytes_on_links():
    net = cn.leaf_spine(2, 2, 2)
    flows = [cn.Flow(0, 2, 4.0), cn.Flow(0, 1, 3.0)]
    ways = cn.routes(net, flows, "spray")
    load = ways.load(net.links, np.array([4.0, 3.0]))
    assert load[net.link("host 0", "leaf 0")] == 7
    assert load[net.link("leaf 0", "host 1")] == 3
    assert load[net.link("leaf 0", "spine 1")] == 2
    assert ways.latency == pytest.approx([4e-6, 2e-6])


REFUSED = {
    "flow 0: src=9": [cn.Flow(9, 0, 1.0)],
    "flow 1: dst=-1": [cn.Flow(0, 1, 1.0), cn.Flow(0, -1, 1.0)],
    "flow 0 goes from 2 to itself": [cn.Flow(2, 2, 1.0)],
    "flow 0: bytes=-1.0": [cn.Flow(0, 1, -1.0)],
    "flow 0: bytes=nan": [cn.Flow(0, 1, float("nan"))],
    "flow 0: start=inf": [cn.Flow(0, 1, 1.0, start=float("inf"))],
}


@pytest.mark.parametrize("says", REFUSED)
def test_flows_that_cannot_be_sent_are_refused(says):
    with pytest.raises(ValueError) as error:
        cn.routes(cn.leaf_spine(2, 2, 2), REFUSED[says])
    assert says in str(error.value)


def test_another_way_of_choosing_is_refused():
    with pytest.raises(ValueError, match="how='random' must be one of ecmp, spray"):
        cn.routes(cn.leaf_spine(2, 2, 2), [], "random")
