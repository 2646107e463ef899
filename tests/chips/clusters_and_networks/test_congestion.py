"""Queues that grow as arithmetic says, pauses that spread, marks that prevent them."""

from __future__ import annotations

import numpy as np
import pytest

from llmlab.chips import clusters_and_networks as cn
from llmlab.chips.clusters_and_networks.congestion import STEP

late = slice(5000, None)  # after 5 ms, when the start is over


def test_without_brakes_the_queue_grows_by_what_comes_in_too_much():
    switches = cn.Switches(senders=4, pfc=False, ecn=False)
    trace = cn.incast(switches, 1e-4)
    growth = (np.diff(trace.queue) / STEP)[:50]
    assert growth == pytest.approx([(4 - 1) * switches.port] * 50)
    assert trace.victim[1:] == pytest.approx(switches.port)
    assert trace.lost == 0


def test_without_brakes_bytes_are_lost_and_all_are_accounted_for():
    switches = cn.Switches(senders=4, pfc=False, ecn=False)
    seconds = 2e-3
    trace = cn.incast(switches, seconds)
    sent = 5 * switches.port * seconds  # the victim's, too
    got = (trace.received.sum() + trace.victim.sum()) * STEP
    waiting = trace.queue[-1] + trace.before[-1]
    assert got + waiting + trace.lost == pytest.approx(sent)
    assert trace.lost > 0
    assert trace.queue.max() == pytest.approx(switches.buffer)


@pytest.mark.parametrize("senders", [2, 8, 15])
def test_pfc_loses_nothing_and_the_victim_pays(senders):
    """All senders and the victim share what is left of one stopped cable evenly."""
    trace = cn.incast(cn.Switches(senders=senders, ecn=False), 20e-3)
    assert trace.lost == 0
    assert trace.received[late].mean() == pytest.approx(cn.NDR, rel=1e-3)
    assert trace.victim[late].mean() == pytest.approx(cn.NDR / senders, rel=0.02)
    assert trace.paused[late].mean() > 0.4


@pytest.mark.parametrize("senders", [4, 8, 15])
def test_marks_keep_the_queue_short_and_the_victim_whole(senders):
    trace = cn.incast(cn.Switches(senders=senders), 20e-3)
    assert trace.paused[late].sum() == 0
    assert trace.queue[late].max() < cn.Switches.k_max
    assert trace.received[late].mean() > 0.95 * cn.NDR
    assert trace.victim[late].mean() == pytest.approx(cn.NDR, rel=1e-3)


def test_one_sender_is_no_incast():
    trace = cn.incast(cn.Switches(senders=1))
    assert trace.queue.max() == 0
    assert trace.rate.min() == cn.NDR


def test_marks_rise_from_k_min_to_k_max():
    switches = cn.Switches(k_min=100.0, k_max=300.0, p_max=0.5)
    found = [switches.marking(q) for q in (0, 100, 200, 299, 300, 1e9)]
    assert found == pytest.approx([0, 0, 0.25, 0.4975, 1, 1])


REFUSED = {
    "senders=0": {"senders": 0},
    "port=0": {"port": 0},
    "k_max=1.0 must be above k_min": {"k_max": 1.0},
    "x_on=9000000.0, x_off": {"x_on": 9e6},
    "x_off=20000000.0 and buffer": {"x_off": 20e6},
    "p_max=2": {"p_max": 2},
}


@pytest.mark.parametrize("says", REFUSED)
def test_nonsense_is_refused_by_name(says):
    with pytest.raises(ValueError) as error:
        cn.Switches(**REFUSED[says])
    assert says in str(error.value)
    with pytest.raises(ValueError, match="seconds=0"):
        cn.incast(cn.Switches(), 0)


# storage ------------------------------------------------------------------------------


def test_the_narrowest_place_decides_how_long_a_checkpoint_takes():
    size = cn.checkpoint_bytes(10e9)
    assert size == 140e9
    assert cn.write_seconds(size, 4, 50e9, 1e12) == pytest.approx((0.7, "hosts"))
    assert cn.write_seconds(size, 4, 50e9, 1e12, 7) == pytest.approx((4.9, "network"))
    assert cn.write_seconds(size, 40, 50e9, 1e12) == pytest.approx((0.14, "storage"))
    assert cn.share_lost(6.0, 594.0) == pytest.approx(0.01)


def test_bad_checkpoints_are_refused():
    with pytest.raises(ValueError, match=r"oversubscription=0.5 must be at least 1"):
        cn.write_seconds(1.0, 1, 1.0, 1.0, 0.5)
    with pytest.raises(ValueError, match="storage=0"):
        cn.write_seconds(1.0, 1, 1.0, 0)
    with pytest.raises(ValueError, match="parameters=-1"):
        cn.checkpoint_bytes(-1)


# packets ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cn.packets())
def test_flows_take_about_as_long_as_packets_do_in_ns_3(name):
    """Once each packet brings its headers; ns-3 was read every 20 ms."""
    case = cn.packets()[name]
    net = cn.leaf_spine(2, 4, 4, case.bandwidth, latency=10e-6)
    flows = [cn.Flow(path[0], path[-1], case.on_the_wire) for path in case.paths]
    ways = cn.routes(net, flows, seed=case.seed)
    for f, path in enumerate(case.paths):
        assert tuple(net.dst[ways.of(f)]) == path[1:]
    ours = cn.simulate(net, flows, ways=ways).finish
    slower = np.array(case.seconds) / ours
    assert (slower > 1).all()
    assert (slower < 1.03).all()
