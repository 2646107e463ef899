"""Collectives as flows: each message of a schedule, and what it waits for.

    ring         2(p−1) steps; in each, every rank sends n/p bytes to the next
    hierarchical a ring in each node sums, so that GPU g holds part g of it; a ring of
                 all GPUs g (along their rail) sums over nodes; a ring in each node
                 spreads the result
    any other    `messages` takes a schedule of the lesson on collectives

    T ≥ 2(p−1) (α + n / (p β))                 the α–β bound of a ring
    busbw = 2(p−1)/p · n / T                   what nccl-tests prints: β at best

    p  ranks            α  seconds of a message: the latencies on its way
    n  bytes            β  bytes per second of the slowest link, one way
    hosts[r]  the endpoint on which rank r is: the placement

Simplified: a rank sends a step's message when that of the step before has arrived and
its own is sent. NCCL cuts messages into slices and overlaps the two; it also opens
several rings ("channels").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from llmlab.chips.checked import counts, positive
from llmlab.chips.clusters_and_networks.flows import simulate
from llmlab.chips.clusters_and_networks.routing import Flow
from llmlab.chips.clusters_and_networks.topology import Topology


class Message(NamedTuple):
    """In one step, rank `src` sends bytes to rank `dst`."""

    step: int
    src: int
    dst: int
    bytes: float


class Move(Protocol):
    """What the lesson on collectives makes its schedules of."""

    step: int
    src: int
    dst: int
    chunks: tuple[int, ...]


def messages(schedule: Iterable[Move], sizes: Sequence[float]) -> list[Message]:
    """A schedule's moves, with bytes; chunk c has sizes[c] of them."""
    return [
        Message(move.step, move.src, move.dst, sum(sizes[c] for c in move.chunks))
        for move in schedule
    ]


def ring_step(p: int, n: float, step: int = 0) -> list[Message]:
    """One step of a ring over n bytes; all steps are alike."""
    counts(2, p=p)
    positive(n=n)
    return [Message(step, r, (r + 1) % p, n / p) for r in range(p)]


def ring(p: int, n: float, rounds: int = 2) -> list[Message]:
    """An all-reduce of n bytes; with one round a reduce-scatter or an all-gather."""
    counts(2, p=p)
    counts(rounds=rounds)
    steps = range(rounds * (p - 1))
    return [message for step in steps for message in ring_step(p, n, step)]


def hierarchical(nodes: int, gpus: int, n: float) -> list[Message]:
    """An all-reduce of n bytes by ranks node · gpus + gpu."""
    counts(2, nodes=nodes, gpus=gpus)
    positive(n=n)
    found = []
    inside = ring(gpus, n, rounds=1)
    first = gpus - 1  # steps so far
    across = ring(nodes, n / gpus)
    last = first + 2 * (nodes - 1)
    for node in range(nodes):
        base = node * gpus
        for step, src, dst, bytes in inside:
            found.append(Message(step, base + src, base + dst, bytes))
            found.append(Message(last + step, base + src, base + dst, bytes))
    for gpu in range(gpus):
        for step, src, dst, bytes in across:
            ends = (src * gpus + gpu, dst * gpus + gpu)
            found.append(Message(first + step, *ends, bytes))
    return sorted(found)


def all_to_all(p: int, n: float) -> list[Message]:
    """Every rank sends n/p bytes to every other, all at once."""
    counts(2, p=p)
    positive(n=n)
    return [
        Message(0, i, j, n / p) for i in range(p) for j in range(p) if i != j
    ]  # fmt: skip


def check_hosts(topology: Topology, hosts: Sequence[int]) -> None:
    """Nothing, if each rank has an endpoint of its own.

    Raises:
        ValueError: one is not there, or has two ranks.
    """
    counts(2, ranks=len(hosts))
    seen: dict[int, int] = {}
    for rank, host in enumerate(hosts):
        if not 0 <= host < topology.endpoints:
            raise ValueError(
                f"hosts[{rank}]={host} must be one of 0 … {topology.endpoints - 1}"
            )
        if host in seen:
            raise ValueError(f"hosts[{rank}]={host} has rank {seen[host]} already")
        seen[host] = rank


def as_flows(
    sent: Sequence[Message], hosts: Sequence[int], qps: int = 1, start: float = 0.0
) -> list[Flow]:
    """A flow for each message, or `qps` of them: queue pairs, with ports of their own.

    It waits for what its sender received and sent last in earlier steps.
    """
    counts(qps=qps)
    flows: list[Flow] = []
    received: dict[int, tuple[int, ...]] = {}  # rank → flows of its last step
    sent_by: dict[int, tuple[int, ...]] = {}
    step = -1
    new_received: dict[int, tuple[int, ...]] = {}
    new_sent: dict[int, tuple[int, ...]] = {}
    for message in sorted(sent):
        if message.step != step:
            received.update(new_received)
            sent_by.update(new_sent)
            new_received, new_sent = {}, {}
            step = message.step
        src, dst = message.src, message.dst
        after = received.get(src, ()) + sent_by.get(src, ())
        numbers = tuple(range(len(flows), len(flows) + qps))
        for port in range(qps):
            part = message.bytes / qps
            flows.append(Flow(hosts[src], hosts[dst], part, start, after, port))
        new_received[dst] = new_received.get(dst, ()) + numbers
        new_sent[src] = new_sent.get(src, ()) + numbers
    return flows


def ring_bound(p: int, n: float, alpha: float, beta: float) -> float:
    """Seconds of a ring all-reduce at least."""
    counts(2, p=p)
    positive(n=n, beta=beta)
    return 2 * (p - 1) * (alpha + n / (p * beta))


def busbw(p: int, n: float, seconds: float) -> float:
    """Bytes per second as nccl-tests counts an all-reduce: comparable over p."""
    counts(2, p=p)
    positive(n=n, seconds=seconds)
    return 2 * (p - 1) / p * n / seconds


def ring_seconds(
    topology: Topology,
    hosts: Sequence[int],
    n: float,
    how: str = "ecmp",
    seed: int = 0,
    qps: int = 1,
) -> float:
    """A ring all-reduce in lock-step: 2(p−1) times its slowest message.

    All steps are alike, so one is simulated. Ranks that need not wait for all others
    are never later; on a ring the slowest link soon sets everyone's pace.
    """
    check_hosts(topology, hosts)
    p = len(hosts)
    flows = as_flows(ring_step(p, n), hosts, qps)
    return 2 * (p - 1) * simulate(topology, flows, how, seed, merge=0.0).seconds


def no_collision(flows: int, ports: int) -> float:
    """The chance that a hash gives each of the flows a port of its own: the birthday
    problem, ports! / (ports − flows)! / portsᶠˡᵒʷˢ.
    """
    counts(flows=flows, ports=ports)
    return math.prod(1 - i / ports for i in range(flows))
