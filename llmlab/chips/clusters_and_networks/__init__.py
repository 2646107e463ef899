"""Clusters and networks.

topology.py     who is plugged into whom: five kinds of network, cables down
routing.py      the links that a flow takes: ECMP's hash, spraying, the emptiest port
flows.py        max–min fair rates, from event to event; start here
collectives.py  an all-reduce as flows that wait for each other, and its bounds
congestion.py   many to one: a queue, PFC's pauses and ECN's marks
storage.py      checkpoints: bytes over bandwidth
packets.py      runs of ns-3, packet by packet, to compare with

    net = fat_tree(16).without([("leaf 0.0", "agg 0.3")])
    run = simulate(net, [Flow(0, 5, 1e9), Flow(1, 5, 2e9, after=(0,))])
    run.finish                                    # seconds, of each flow
    ring_seconds(net, hosts, 13e9, seed=1)        # hosts[r]: where rank r is
"""

from llmlab.chips.clusters_and_networks.collectives import (
    Message,
    all_to_all,
    as_flows,
    busbw,
    hierarchical,
    messages,
    no_collision,
    ring,
    ring_bound,
    ring_seconds,
)
from llmlab.chips.clusters_and_networks.congestion import Switches, Trace, incast
from llmlab.chips.clusters_and_networks.flows import Run, fair_rates, simulate
from llmlab.chips.clusters_and_networks.packets import Packets, packets
from llmlab.chips.clusters_and_networks.routing import HOW, Flow, Routes, routes
from llmlab.chips.clusters_and_networks.storage import (
    TRAINING,
    checkpoint_bytes,
    share_lost,
    write_seconds,
)
from llmlab.chips.clusters_and_networks.topology import (
    GBIT,
    HOP,
    NDR,
    NVLINK,
    Topology,
    clos,
    dragonfly,
    fat_tree,
    leaf_spine,
    rail_optimised,
    torus,
)

__all__ = [
    "GBIT",
    "HOP",
    "HOW",
    "NDR",
    "NVLINK",
    "TRAINING",
    "Flow",
    "Message",
    "Packets",
    "Routes",
    "Run",
    "Switches",
    "Topology",
    "Trace",
    "all_to_all",
    "as_flows",
    "busbw",
    "checkpoint_bytes",
    "clos",
    "dragonfly",
    "fair_rates",
    "fat_tree",
    "hierarchical",
    "incast",
    "leaf_spine",
    "messages",
    "no_collision",
    "packets",
    "rail_optimised",
    "ring",
    "ring_bound",
    "ring_seconds",
    "routes",
    "share_lost",
    "simulate",
    "torus",
    "write_seconds",
]
