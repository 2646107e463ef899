"""Flows through a fat tree of 1,024 hosts: `python -m benchmarks.network`.

Random pairs of hosts, sizes from an exponential distribution; ECMP chooses ways. Two
loads: all flows at once, finishes merged by a hundredth, and flows that arrive one
after the other, exact. The first call, which compiles, is not counted.
"""

from __future__ import annotations

import time

import numpy as np

from llmlab.chips.clusters_and_networks import Flow, fat_tree, simulate

TARGET = 5.0  # seconds, for 10,000 flows


def random_flows(hosts: int, count: int, apart: float) -> list[Flow]:
    """Flows between random hosts, whose starts lie `apart` seconds apart."""
    draw = np.random.default_rng(0)
    flows = []
    for i in range(count):
        src, dst = draw.choice(hosts, 2, replace=False)
        size = float(draw.exponential(1e9))
        flows.append(Flow(int(src), int(dst), size, start=apart * i))
    return flows


def main() -> int:
    net = fat_tree(16)
    simulate(net, random_flows(net.endpoints, 10, 0.0))
    worst = 0.0
    print("| flows | seconds | events | (flow, link) pairs seen |")
    print("|---|---|---|---|")
    for name, apart, merge in (("at once", 0.0, 0.01), ("arriving", 1e-4, 0.0)):
        for count in (2_500, 5_000, 10_000):
            flows = random_flows(net.endpoints, count, apart)
            started = time.perf_counter()
            run = simulate(net, flows, merge=merge)
            took = time.perf_counter() - started
            worst = max(worst, took)
            print(
                f"| {count:,} {name} | {took:.2f} | {run.events:,} | {run.touched:,} |"
            )
    print(f"\nthe slowest took {worst:.2f} s; the target is {TARGET:.0f} s")
    return int(worst > TARGET)


if __name__ == "__main__":
    raise SystemExit(main())
