"""Collectives as flows against the lesson on collectives, bounds and figures."""

from __future__ import annotations

import numpy as np
import pytest

from llmlab.chips import clusters_and_networks as cn
from llmlab.parallelism.collectives import bruck, halving, schedule, tree
from llmlab.parallelism.collectives import ring as rings
from llmlab.parallelism.runtime import Link


def equal(p, n):
    return [n / p] * p


@pytest.mark.parametrize("p", [2, 3, 8])
def test_the_ring_is_that_of_the_lesson_on_collectives(p):
    theirs = cn.messages(rings.all_reduce(p), equal(p, 12.0))
    np.testing.assert_allclose(sorted(theirs), cn.ring(p, 12.0))
    half = cn.messages(rings.reduce_scatter(p), equal(p, 12.0))
    np.testing.assert_allclose(sorted(half), cn.ring(p, 12.0, rounds=1))


@pytest.mark.parametrize("p", [2, 5])
def test_an_all_to_all_sends_what_that_of_the_lesson_on_collectives_sends(p):
    theirs = cn.messages(rings.all_to_all(p), [3.0 / p] * p * p)
    ours = cn.all_to_all(p, 3.0)
    assert {m[1:] for m in theirs} == {m[1:] for m in ours}
    assert len(theirs) == len(ours) == p * (p - 1)


SCHEDULES = {
    "ring": (rings.all_reduce, lambda p: p),
    "tree": (tree.all_reduce, lambda p: 1),
    "halving": (halving.all_reduce, lambda p: p),
    "doubling": (halving.all_reduce_doubling, lambda p: 1),
    "bruck": (bruck.all_reduce, lambda p: p),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("p", [4, 8])
def test_on_one_switch_a_collective_takes_what_alpha_and_beta_say(name, p):
    """A port sends and receives at once; what passes no cable twice never waits."""
    make, pieces = SCHEDULES[name]
    n, alpha, beta = 8e6, 2e-6, 1e9
    sizes = [n / pieces(p)] * pieces(p)
    net = cn.leaf_spine(1, p, 1, bandwidth=beta, latency=alpha / 2)
    flows = cn.as_flows(cn.messages(make(p), sizes), range(p))
    found = cn.simulate(net, flows).seconds
    wanted = schedule.seconds(make(p), sizes, Link(alpha, beta))
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize("p", [2, 8, 64])
def test_a_ring_without_collisions_reaches_its_bound(p):
    net = cn.leaf_spine(1, p, 1)
    found = cn.ring_seconds(net, range(p), 1e9)
    assert found == pytest.approx(cn.ring_bound(p, 1e9, 2 * cn.HOP, cn.NDR))
    assert cn.busbw(p, 1e9, found) < cn.NDR


@pytest.mark.parametrize("seed", range(4))
def test_nothing_beats_the_bound_and_lock_step_is_the_pace_of_all(seed):
    net = cn.leaf_spine(4, 4, 4)
    hosts = np.random.default_rng(seed).permutation(16)
    n = 1e8
    whole = cn.simulate(net, cn.as_flows(cn.ring(16, n), hosts), seed=seed).seconds
    steps = cn.ring_seconds(net, hosts, n, seed=seed)
    assert whole <= steps * (1 + 1e-9)
    assert whole >= cn.ring_bound(16, n, 2 * cn.HOP, cn.NDR) * (1 - 1e-9)
    assert whole > 0.9 * steps


def test_one_collision_halves_an_all_reduce():
    """Two racks, four spines, two flows up: on one spine, or on two."""
    net = cn.leaf_spine(2, 4, 4)
    hosts = [0, 4, 1, 5]  # every message changes the rack
    n = 1e9
    times = {cn.ring_seconds(net, hosts, n, seed=s) for s in range(20)}
    bound = cn.ring_bound(4, n, 4 * cn.HOP, cn.NDR)
    assert min(times) == pytest.approx(bound)
    assert max(times) == pytest.approx(2 * bound, rel=1e-3)
    for how in ("spray", "adaptive"):
        assert cn.ring_seconds(net, hosts, n, how) == pytest.approx(bound)


def test_more_queue_pairs_even_out_the_load():
    net = cn.leaf_spine(4, 8, 8)
    hosts = [leaf * 8 + host for host in range(8) for leaf in range(4)]
    bound = cn.ring_bound(32, 1e9, 4 * cn.HOP, cn.NDR)
    means = []
    for qps in (1, 4, 16):
        times = [cn.ring_seconds(net, hosts, 1e9, seed=s, qps=qps) for s in range(10)]
        means.append(np.mean(times) / bound)
    assert means[0] > 1.3 * means[1] > 1.3 * means[2] > 1.3


def test_hierarchical_counts_as_its_three_rings():
    nodes, gpus, n = 3, 4, 24.0
    found = cn.hierarchical(nodes, gpus, n)
    sent = np.zeros(nodes * gpus)
    for message in found:
        sent[message.src] += message.bytes
    inside = 2 * (gpus - 1) / gpus * n
    across = 2 * (nodes - 1) / nodes * n / gpus
    assert sent == pytest.approx([inside + across] * nodes * gpus)
    assert {m.step for m in found} == set(range(2 * (gpus - 1) + 2 * (nodes - 1)))
    for message in found:  # only along rails, or inside of a node
        same_node = message.src // gpus == message.dst // gpus
        assert same_node != (message.src % gpus == message.dst % gpus)


def test_rails_never_collide_and_their_time_is_that_of_the_rings():
    nodes, gpus, n = 4, 8, 1e9
    net = cn.rail_optimised(nodes, gpus, spines=2)
    flows = cn.as_flows(cn.hierarchical(nodes, gpus, n), range(nodes * gpus))
    found = cn.simulate(net, flows).seconds
    hop = 2 * cn.HOP
    inside = 2 * (gpus - 1) * (hop + n / gpus / cn.NVLINK)
    across = cn.ring_bound(nodes, n / gpus, hop, cn.NDR)
    assert found == pytest.approx(inside + across)


def test_flows_of_a_step_wait_for_what_was_received_and_sent_before():
    sent = [
        cn.Message(0, 0, 1, 4.0),
        cn.Message(1, 1, 2, 4.0),
        cn.Message(1, 0, 2, 2.0),
    ]
    flows = cn.as_flows(sent, [5, 6, 7], qps=2, start=1.0)
    assert flows[0] == cn.Flow(5, 6, 2.0, 1.0, (), 0)
    assert flows[1] == cn.Flow(5, 6, 2.0, 1.0, (), 1)
    assert flows[2] == cn.Flow(5, 7, 1.0, 1.0, (0, 1), 0)
    assert flows[4] == cn.Flow(6, 7, 2.0, 1.0, (0, 1), 0)


REFUSED = {
    "p=1 must": lambda: cn.ring(1, 1.0),
    "n=0 must": lambda: cn.ring(2, 0),
    "gpus=1 must": lambda: cn.hierarchical(2, 1, 1.0),
    "qps=0": lambda: cn.as_flows([], [], qps=0),
    "hosts[1]=9 must": lambda: cn.ring_seconds(cn.leaf_spine(2, 2, 2), [0, 9], 1.0),
    "hosts[2]=0 has rank 0": lambda: cn.ring_seconds(
        cn.leaf_spine(2, 2, 2), [0, 1, 0], 1.0
    ),
    "seconds=0": lambda: cn.busbw(2, 1.0, 0),
    "beta=-1": lambda: cn.ring_bound(2, 1.0, 0.0, -1),
    "ports=0": lambda: cn.no_collision(1, 0),
}


@pytest.mark.parametrize("says", REFUSED)
def test_nonsense_is_refused_by_name(says):
    with pytest.raises(ValueError) as error:
        REFUSED[says]()
    assert says in str(error.value)
