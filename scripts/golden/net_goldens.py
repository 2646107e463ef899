"""Packets through ns-3, beside which the flow-level simulator is put.

    python -m venv ENV && ENV/bin/pip install ns3==3.44.post0        about 520 MB
    PYTHONPATH=. python scripts/golden/net_goldens.py --cases > cases.json
    ENV/bin/python scripts/golden/net_goldens.py cases.json KEPT

KEPT is llmlab/chips/data/clusters_and_networks.json. The second line writes what is to
be run with this course's environment: links, and the ways that `routes` gives to flows.
The third runs TCP over them, packet by packet, in ns-3's environment, and stores when
each receiver had everything.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

RATE = 100e6  # bit/s of every link
BYTES = 10_000_000  # of each flow


def cases() -> dict[str, dict]:
    """Name → links (pairs of nodes), and for each flow its nodes, one after another."""
    import numpy as np

    from llmlab.chips import clusters_and_networks as cn

    net = cn.leaf_spine(2, 4, 4, bandwidth=RATE / 8)
    found = {}
    two = [cn.Flow(0, 4, BYTES), cn.Flow(1, 5, BYTES)]
    four = [cn.Flow(i, 4 + i, BYTES) for i in range(4)]
    many = [cn.Flow(i, 7, BYTES) for i in range(4)]
    wanted = {
        "two flows, no collision": (two, 1),
        "two flows, a collision": (two, 2),
        "four flows, three on one cable": (four, 3),
        "incast of four": (many, None),
    }
    for name, (flows, most) in wanted.items():
        for seed in range(1000):
            ways = cn.routes(net, flows, seed=seed)
            up = [ways.of(f)[1] for f in range(len(flows))]
            if most is None or max(np.bincount(up)) == most:
                break
        paths = []
        for f, flow in enumerate(flows):
            paths.append([flow.src, *net.dst[ways.of(f)].tolist()])
        pairs = [[net.index[a], net.index[b]] for a, b in net.cables()]
        found[name] = {"seed": seed, "cables": pairs, "paths": paths}
    return found


def run(case: dict) -> list[float]:
    """Seconds from the start until each receiver has all of its bytes."""
    from ns import ns

    count = 1 + max(max(pair) for pair in case["cables"])
    nodes = ns.NodeContainer()
    nodes.Create(count)
    ns.InternetStackHelper().Install(nodes)
    wire = ns.PointToPointHelper()
    wire.SetDeviceAttribute("DataRate", ns.StringValue(f"{RATE / 1e6:.0f}Mbps"))
    wire.SetChannelAttribute("Delay", ns.StringValue("10us"))
    addresses = ns.Ipv4AddressHelper()
    at = {}  # (node, neighbour) → (the node's address there, its interface)
    for number, (a, b) in enumerate(case["cables"]):
        devices = wire.Install(nodes.Get(a), nodes.Get(b))
        base = f"10.{number // 250}.{number % 250}.0"
        addresses.SetBase(ns.Ipv4Address(base), ns.Ipv4Mask("255.255.255.0"))
        given = addresses.Assign(devices)
        at[a, b] = given.GetAddress(0), given.Get(0).second
        at[b, a] = given.GetAddress(1), given.Get(1).second
    helper = ns.Ipv4StaticRoutingHelper()

    def route(path: list[int], target) -> None:
        for here, there in pairwise(path):
            stack = nodes.Get(here).GetObject[ns.Ipv4]()
            table = helper.GetStaticRouting(stack)
            gate, interface = at[there, here][0], at[here, there][1]
            table.AddHostRouteTo(target, gate, interface)

    sinks = []
    for number, path in enumerate(case["paths"]):
        target, source = at[path[-1], path[-2]][0], at[path[0], path[1]][0]
        route(path, target)
        route(path[::-1], source)
        port = 5000 + number
        end = ns.InetSocketAddress(target, port).ConvertTo()
        send = ns.BulkSendHelper("ns3::TcpSocketFactory", end)
        send.SetAttribute("MaxBytes", ns.UintegerValue(BYTES))
        send.Install(nodes.Get(path[0])).Start(ns.Seconds(0.0))
        here = ns.InetSocketAddress(ns.Ipv4Address.GetAny(), port).ConvertTo()
        sink = ns.PacketSinkHelper("ns3::TcpSocketFactory", here)
        apps = sink.Install(nodes.Get(path[-1]))
        apps.Start(ns.Seconds(0.0))
        sinks.append(apps.Get(0))
    done = [None] * len(sinks)
    tick = 0.02
    for n in range(1, 1000):
        ns.Simulator.Stop(ns.Seconds(tick))
        ns.Simulator.Run()
        for i, sink in enumerate(sinks):
            if done[i] is None and sink.GetTotalRx() >= BYTES:
                done[i] = round(n * tick, 3)
        if None not in done:
            break
    ns.Simulator.Destroy()
    return done


def main() -> None:
    if sys.argv[1:] == ["--cases"]:
        print(json.dumps(cases()))
        return
    asked, kept = map(Path, sys.argv[1:])
    found = json.loads(asked.read_text())
    for case in found.values():
        case["seconds"] = run(case)
    said = {"made by": "ns3==3.44.post0", "rate": RATE, "bytes": BYTES}
    kept.write_text(json.dumps(said | {"cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
