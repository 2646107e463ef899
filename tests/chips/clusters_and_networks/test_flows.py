"""Max–min fairness against its definition, a linear program and textbook cases."""

from __future__ import annotations

import numpy as np
import pytest

from llmlab.chips import clusters_and_networks as cn
from llmlab.chips.clusters_and_networks import flows as module
from tests.chips.clusters_and_networks.test_routing import some_flows
from tests.chips.clusters_and_networks.test_topology import NETS


def chain(*rates):
    """Hosts 0 … n on a line of switches, cables between the switches as given."""
    count = len(rates) + 1
    net = module.Topology
    names = [f"host {i}" for i in range(count)] + [f"switch {i}" for i in range(count)]
    src, dst, rate = [], [], []
    cables = [(i, count + i, 1e6) for i in range(count)]
    cables += [(count + i, count + i + 1, r) for i, r in enumerate(rates)]
    for a, b, r in cables:
        src += [a, b]
        dst += [b, a]
        rate += [r, r]
    zero = np.zeros(len(src))
    return net(
        "chain", tuple(names), count, np.array(src), np.array(dst), np.array(rate), zero
    )


def rates_of(net, flows, how="ecmp", seed=0):
    ways = cn.routes(net, flows, how, seed)
    return cn.fair_rates(net, ways), ways


def used(net, ways, rates):
    each = np.repeat(rates, np.diff(ways.begin)) * ways.share
    return np.bincount(ways.link, each, net.links)


@pytest.mark.parametrize("how", ["ecmp", "spray"])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_flow_has_a_bottleneck(name, how, seed):
    """Bertsekas and Gallager: rates are max–min fair if and only if this holds."""
    net = NETS[name]
    flows = some_flows(net, 60, seed)
    rates, ways = rates_of(net, flows, how, seed)
    load = used(net, ways, rates)
    assert (load <= net.bandwidth * (1 + 1e-9)).all()
    fastest = np.zeros(net.links)
    owner = np.repeat(np.arange(len(flows)), np.diff(ways.begin))
    np.maximum.at(fastest, ways.link, rates[owner])
    for f in range(len(flows)):
        links = ways.of(f)
        full = load[links] >= net.bandwidth[links] * (1 - 1e-9)
        assert (full & (fastest[links] <= rates[f] * (1 + 1e-9))).any(), f


def by_linear_programs(net, ways):
    """The lexicographic maximum of the sorted rates, one level at a time."""
    from scipy.optimize import linprog

    count = len(ways.begin) - 1
    owner = np.repeat(np.arange(count), np.diff(ways.begin))
    uses = np.zeros((net.links, count))
    np.add.at(uses, (ways.link, owner), ways.share)
    capacity = net.bandwidth / net.bandwidth.max()
    fixed: dict[int, float] = {}
    while len(fixed) < count:
        free = [f for f in range(count) if f not in fixed]

        def best(goal, floor, free=free):
            """max goal · (x, t) with x[f] ≥ floor, or ≥ t where no floor is given."""
            bounds = [(fixed.get(f, 0), fixed.get(f)) for f in range(count)]
            rows, limits = [np.append(row, 0) for row in uses], list(capacity)
            for f in free:
                row = np.zeros(count + 1)
                row[f], row[-1] = -1, 1
                rows.append(row)
                limits.append(0)
            bounds.append((floor, floor) if floor is not None else (0, None))
            found = linprog(-goal, np.array(rows), limits, bounds=bounds)
            return -found.fun

        t = best(np.eye(count + 1)[-1], None)
        for f in free:  # who cannot have more, if all others have at least t
            if best(np.eye(count + 1)[f], t * (1 - 1e-9)) <= t * (1 + 1e-6):
                fixed[f] = t
    return np.array([fixed[f] for f in range(count)]) * net.bandwidth.max()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("how", ["ecmp", "spray"])
def test_rates_are_those_of_linear_programs(seed, how):
    net = cn.clos(2, 2, 2, 2, 1, bandwidth=4.0, up=3.0, top=2.0)
    flows = some_flows(net, 7, seed)
    rates, ways = rates_of(net, flows, how, seed)
    np.testing.assert_allclose(rates, by_linear_programs(net, ways), rtol=1e-4)


def test_the_textbooks_parking_lot():
    """One flow over all links, and one over each: everyone has a half."""
    net = chain(1.0, 1.0, 1.0)
    flows = [cn.Flow(0, 3, 1.0), *(cn.Flow(i, i + 1, 1.0) for i in range(3))]
    assert rates_of(net, flows)[0] == pytest.approx([0.5] * 4)


def test_the_textbooks_network():
    """Bertsekas and Gallager, example 6.5: three share the first link, one of them and
    another the second; a third link is wide.
    """
    net = chain(1.0, 1.0, 2.0)
    flows = [
        cn.Flow(0, 2, 1.0),
        cn.Flow(0, 1, 1.0),
        cn.Flow(0, 1, 1.0),
        cn.Flow(1, 3, 1.0),
        cn.Flow(2, 3, 1.0),
    ]
    rates = rates_of(net, flows)[0]
    assert rates == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3, 4 / 3])


def test_only_active_flows_share():
    net = chain(1.0)
    ways = cn.routes(net, [cn.Flow(0, 1, 1.0, port=i) for i in range(3)])
    rates = cn.fair_rates(net, ways, np.array([0, 2]))
    assert rates == pytest.approx([0.5, 0.0, 0.5])


def test_without_numba_the_rates_are_the_same(monkeypatch):
    import builtins

    net = NETS["fat tree"]
    flows = some_flows(net, 30)
    wanted = rates_of(net, flows)[0]
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "numba":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    module._filling.cache_clear()
    monkeypatch.setattr(builtins, "__import__", missing)
    assert (rates_of(net, flows)[0] == wanted).all()
    monkeypatch.undo()
    module._filling.cache_clear()


# from event to event ------------------------------------------------------------------


def test_a_flow_takes_bytes_over_rate_and_its_latency():
    net = cn.leaf_spine(2, 2, 2, bandwidth=10.0, latency=0.25)
    run = cn.simulate(net, [cn.Flow(0, 2, 50.0, start=3.0), cn.Flow(0, 1, 0.0)])
    assert run.start == pytest.approx([3.0, 0.0])
    assert run.finish == pytest.approx([3 + 5 + 4 * 0.25, 2 * 0.25])
    assert run.rate([cn.Flow(0, 2, 50.0)] * 2)[0] == pytest.approx(50 / 6)


def test_what_a_finished_flow_leaves_is_shared_again():
    """10 and 30 bytes over 1 byte/s: half each for 20 s, then the rest alone."""
    net = chain(1.0)
    run = cn.simulate(net, [cn.Flow(0, 1, 10.0), cn.Flow(0, 1, 30.0, port=1)])
    assert run.finish == pytest.approx([20.0, 40.0])
    late = [cn.Flow(0, 1, 10.0), cn.Flow(0, 1, 10.0, start=4.0, port=1)]
    assert cn.simulate(net, late).finish == pytest.approx([16.0, 20.0])


def test_flows_wait_for_the_last_of_those_before_them():
    net = cn.leaf_spine(1, 4, 1, bandwidth=1.0, latency=0.5)
    flows = [
        cn.Flow(2, 3, 2.0, after=(1, 2)),
        cn.Flow(0, 1, 3.0),
        cn.Flow(1, 2, 5.0, start=1.0),
        cn.Flow(3, 0, 0.0, after=(0,)),
    ]
    run = cn.simulate(net, flows)
    assert run.finish == pytest.approx([10.0, 4.0, 7.0, 11.0])
    assert run.start == pytest.approx([7.0, 0.0, 1.0, 10.0])
    assert run.seconds == pytest.approx(11.0)


@pytest.mark.parametrize("name", NETS)
def test_bytes_are_conserved_and_no_link_carries_more_than_it_can(name):
    net = NETS[name]
    draw = np.random.default_rng(3)
    flows = [
        flow._replace(
            bytes=float(draw.exponential(1e9)), start=float(draw.random()) / 9
        )
        for flow in some_flows(net, 50)
    ]
    run = cn.simulate(net, flows)
    ways = cn.routes(net, flows)
    hops = sum(f.bytes * len(ways.of(i)) for i, f in enumerate(flows))
    assert run.carried.sum() == pytest.approx(hops)
    assert (run.carried / net.bandwidth <= run.seconds * (1 + 1e-9)).all()
    for i, flow in enumerate(flows):  # nobody is faster than alone
        alone = flow.bytes / net.bandwidth[ways.of(i)].min() + ways.latency[i]
        assert run.finish[i] - run.start[i] >= alone * (1 - 1e-9)


def test_merged_finishes_come_near_to_exact_ones():
    net = cn.fat_tree(8)
    draw = np.random.default_rng(0)
    flows = [
        f._replace(bytes=float(draw.exponential(1e9))) for f in some_flows(net, 400)
    ]
    exact = cn.simulate(net, flows, merge=0.0)
    near = cn.simulate(net, flows, merge=0.01)
    assert exact.events == 400
    assert near.events < 300
    assert np.abs(near.finish / exact.finish - 1).max() < 0.03
    assert np.abs(near.finish / exact.finish - 1).mean() < 0.005
    assert cn.simulate(net, flows).finish == pytest.approx(exact.finish)


def test_cost_grows_with_the_number_of_flows_and_no_faster():
    """Flows arrive at a fixed rate; pairs of (flow, link) that were looked at."""
    net = cn.fat_tree(8)
    draw = np.random.default_rng(1)

    def cost(count):
        flows = [
            flow._replace(bytes=float(draw.exponential(1e8)), start=1e-4 * i)
            for i, flow in enumerate(some_flows(net, count))
        ]
        return cn.simulate(net, flows, merge=0.0).touched / count

    assert cost(1600) < 1.3 * cost(400)


def test_many_flows_of_many_sizes_cost_a_bounded_number_of_rounds():
    """Ten times as many flows, all at once, are two times as many events."""
    net = cn.fat_tree(8)
    draw = np.random.default_rng(2)

    def events(count):
        flows = some_flows(net, count)
        flows = [f._replace(bytes=float(draw.exponential(1e9))) for f in flows]
        return cn.simulate(net, flows, merge=0.01).events

    assert events(4000) < 3 * events(400)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_order_of_flows_changes_nothing(seed):
    net = NETS["dragonfly"]
    flows = some_flows(net, 40, seed)
    order = np.random.default_rng(seed).permutation(40)
    one = cn.simulate(net, flows).finish
    other = cn.simulate(net, [flows[i] for i in order]).finish
    np.testing.assert_allclose(other, one[order], rtol=1e-9)


def test_waiting_in_a_circle_is_refused():
    net = chain(1.0)
    two = [cn.Flow(0, 1, 1.0, after=(1,)), cn.Flow(1, 0, 1.0, after=(0,))]
    with pytest.raises(ValueError, match="flow 0 and 1 more wait for each other"):
        cn.simulate(net, two)
    for wrong in (5, 0, -1):
        with pytest.raises(ValueError, match=rf"flow 0: after=\({wrong},\) names flow"):
            cn.simulate(net, [cn.Flow(0, 1, 1.0, after=(wrong,))])
    with pytest.raises(ValueError, match="merge=1"):
        cn.simulate(net, [cn.Flow(0, 1, 1.0)], merge=1.0)


def test_nothing_to_send_takes_no_time():
    assert cn.simulate(chain(1.0), []).seconds == 0.0
