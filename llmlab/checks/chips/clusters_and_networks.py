"""Checks of 09-chips/05-clusters-and-networks.

An answer is run on cases, and what it returns is compared with what usual mistakes make
of them. Numbers count to nine digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from llmlab.checks.judging import Outcome, judge, number
from llmlab.chips.clusters_and_networks import (
    challenge,
    checkpoint_bytes,
    write_seconds,
)
from llmlab.course.grading.checking import Checks, Mistake

check = Checks("09-chips/05-clusters-and-networks")

# 1 ------------------------------------------------------------------------------------

# the hash of each flow, its bytes, and bytes per second of each port (0: down)
HASH_CASES = [
    ([0, 1, 2, 3], [8.0, 8.0, 8.0, 8.0], [4.0, 4.0, 4.0, 4.0]),
    ([4, 1, 8, 3], [6.0, 8.0, 10.0, 5.0], [4.0, 4.0, 4.0, 4.0]),
    ([7, 12, 9, 30, 2], [8.0, 4.0, 2.0, 9.0, 7.0], [4.0, 0.0, 4.0, 2.0]),
    ([5, 6, 13, 11, 19, 23], [3.0, 5.0, 1.0, 9.0, 2.0, 7.0], [0.0, 8.0, 5.0, 0.0, 3.0]),
    ([10, 21], [30.0, 12.0], [1.0, 5.0, 0.0, 2.0]),
    ([3, 6, 9, 12, 15, 18, 5], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 40.0], [2.0, 9.0, 4.0]),
    ([1, 1, 1, 0], [2.0, 2.0, 2.0, 7.0], [1.0, 1.0]),
]


def run_hash(answer: Callable, n: int) -> Outcome:
    """Case n: seconds."""
    given = (list(each) for each in HASH_CASES[n])
    found = number(answer(*given), "ecmp_seconds(…)")
    return {"the number of seconds": found}


def hashing(
    group: Callable = lambda ports: [i for i, rate in enumerate(ports) if rate > 0],
    pick: Callable = lambda value, group: group[value % len(group)],
    counted: Callable = lambda size: size,
    result: Callable = max,
    rate: Callable = lambda ports, i: ports[i],
) -> Callable:
    """`ecmp_seconds`, and what comes out with one thing changed."""

    def way(hashes, sizes, ports):
        up = group(ports)
        load = [0.0] * len(ports)
        for value, size in zip(hashes, sizes, strict=True):
            load[pick(value, up)] += counted(size)
        return result([load[i] / rate(ports, i) for i in up if ports[i] > 0])

    return way


def _next_up(ports: Sequence[float]) -> list[int]:
    """For each port itself, or the first after it that is up."""
    count = len(ports)
    return [next(j % count for j in range(i, i + count) if ports[j % count] > 0)
            for i in range(count)]  # fmt: skip


def _alone(hashes, sizes, ports):
    up = [i for i, rate in enumerate(ports) if rate > 0]
    return max(
        size / ports[up[value % len(up)]]
        for value, size in zip(hashes, sizes, strict=True)
    )


def _last(hashes, sizes, ports):
    up = [i for i, rate in enumerate(ports) if rate > 0]
    load = dict(zip((up[h % len(up)] for h in hashes), sizes, strict=True))
    return max(size / ports[i] for i, size in load.items())


def _most_bytes(hashes, sizes, ports):
    up = [rate for rate in ports if rate > 0]
    load = [0.0] * len(up)
    for value, size in zip(hashes, sizes, strict=True):
        load[value % len(up)] += size
    size, rate = max(zip(load, up, strict=True))
    return size / rate


def _shares_kept(hashes, sizes, ports):
    up = [rate for rate in ports if rate > 0]
    chosen = [value % len(up) for value in hashes]
    return max(
        size * chosen.count(i) / up[i] for i, size in zip(chosen, sizes, strict=True)
    )


def wrong_hashes() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    right = hashing()
    return {
        "a flow was sent to a port that is down: number only those that are up": (
            hashing(group=lambda ports: [*range(len(ports))])
        ),
        "flows of a port that is down went to the next one: the hash counts only ports"
        " that are up": hashing(group=_next_up, result=lambda each: max(each)),
        "flows were counted, not their bytes": hashing(counted=lambda size: 1.0),
        "the ports' times were added: they send at the same time": hashing(result=sum),
        "the mean of the ports was taken: the last one decides": hashing(
            result=lambda each: sum(each) / len(each)
        ),
        "the first port that is done was taken: wait for the last": hashing(result=min),
        "bytes were not divided by the port's rate": hashing(rate=lambda ports, i: 1.0),
        "all ports were given the rate of the fastest: each has its own": hashing(
            rate=lambda ports, i: max(ports)
        ),
        "flows of one port share it: their bytes add up": _alone,
        "of several flows on a port only the last was kept: their bytes add up": _last,
        "the bytes were spread over all ports evenly: a hash keeps a flow on one": (
            lambda hashes, sizes, ports: sum(sizes) / sum(ports)
        ),
        "the hash was divided by the number of ports: what is left of the division"
        " counts": hashing(pick=lambda value, up: up[value // len(up) % len(up)]),
        "ports were numbered from 1": hashing(
            pick=lambda value, up: up[(value + 1) % len(up)]
        ),
        "the flow's place in the list was used, not its hash": (
            lambda hashes, sizes, ports: right([*range(len(hashes))], sizes, ports)
        ),
        "bytes were divided by the rate of another port: numbers count only ports that"
        " are up, the list has all": hashing(
            group=lambda ports: range(sum(rate > 0 for rate in ports))
        ),
        "the port with the most bytes was taken: one that is slower may need"
        " longer": _most_bytes,
        "each flow kept its first share of the port: when one is through, the others"
        " share what it had": _shares_kept,
    }


@check.exercise(
    points=2,
    minutes=12,
    difficulty=2,
    importance=5,
    hints=(
        "Which ports are up? A flow takes the one whose place in *that* list is its"
        " hash modulo the list's length.",
        "Add up bytes for each port. A port takes its bytes over its rate.",
        "`up = [i for i, rate in enumerate(ports) if rate > 0]`, then"
        " `load[up[h % len(up)]] += size`, and the largest `load[i] / ports[i]`.",
    ),
)
def ecmp_seconds(answer):
    """When the last flow is through, if a hash chooses their ports."""
    judge(
        answer, run_hash, hashing(), wrong_hashes(), len(HASH_CASES), "ecmp_seconds(…)"
    )


# 2 ------------------------------------------------------------------------------------

# the links of each flow, its rate (None: it rises), bytes per second of each link
FILL_CASES = [
    ([[0], [0, 1], [1]], [None, None, None], [10.0, 30.0]),
    ([[0], [0, 1], [1]], [5.0, 5.0, None], [10.0, 30.0]),
    ([[0, 2], [0, 1], [1, 2], [2]], [None] * 4, [12.0, 8.0, 9.0]),
    ([[0, 2], [0, 1], [1, 2], [2]], [3.0, None, 3.0, 3.0], [12.0, 8.0, 9.0]),
    (
        [[3], [3, 1], [1, 0], [0], [2, 0]],
        [None, None, 2.0, None, 2.0],
        [11.0, 6.0, 4.0, 9.0],
    ),
    ([[0, 1], [1], [1], [2]], [None, 1.0, 4.0, 0.5], [3.0, 7.5, 0.5]),
    ([[0], [0], [1], [1, 2]], [None] * 4, [8.0, 8.0, 50.0]),
    ([[0], [0, 1], [1], [2]], [0.0, 0.0, None, None], [0.0, 4.0, 9.0]),
]  # fmt: skip


def run_fill(answer: Callable, n: int) -> Outcome:
    """Case n: the rates after one step."""
    ways, rates, capacity = FILL_CASES[n]
    given = list(rates)
    found = answer([list(way) for way in ways], given, list(capacity))
    if given != rates:
        raise Mistake("rates were changed in place: return a new list")
    if not isinstance(found, list) or len(found) != len(rates):
        raise Mistake(f"fill(…) returned {found!r}: return a list with a rate per flow")
    return {
        f"the rate of flow {f}": None if rate is None else number(rate, "fill(…)")
        for f, rate in enumerate(found)
    }


def filling(
    left: Callable = lambda capacity, stopped: capacity - sum(stopped),
    users: Callable = lambda rising, all_: rising,
    choose: Callable = min,
    gets: Callable = lambda way, fullest: bool(set(way) & fullest),
    ties: bool = True,
    idle: bool = False,
    kept: Callable = lambda rate, level: rate,
) -> Callable:
    """`fill`, and what comes out with one thing changed."""

    def way(ways, rates, capacity):
        levels = {}
        for link, rate in enumerate(capacity):
            there = [f for f, links in enumerate(ways) if link in links]
            rising = [f for f in there if rates[f] is None]
            stopped = [rates[f] for f in there if rates[f] is not None]
            if rising or idle:
                share = max(1, users(len(rising), len(there)))
                levels[link] = left(rate, stopped) / share
        level = choose(levels.values())
        full = {link for link, each in levels.items() if each == level}
        if not ties:
            full = {min(full)}
        return [
            kept(rate, level)
            if rate is not None
            else (level if gets(links, full) else None)
            for links, rate in zip(ways, rates, strict=True)
        ]

    return way


def _by_itself(ways, rates, capacity):
    """Each flow gets the least of its own links' levels, at once."""
    found = []
    for links, rate in zip(ways, rates, strict=True):
        if rate is not None:
            found.append(rate)
            continue
        levels = []
        for link in links:
            there = [f for f, other in enumerate(ways) if link in other]
            stopped = sum(rates[f] for f in there if rates[f] is not None)
            rising = sum(rates[f] is None for f in there)
            levels.append((capacity[link] - stopped) / rising)
        found.append(min(levels))
    return found


def _zero_rises(ways, rates, capacity):
    return filling()(ways, [rate or None for rate in rates], capacity)


def _to_the_end(ways, rates, capacity):
    while None in rates:
        rates = filling()(ways, rates, capacity)
    return rates


def _others_at_zero(ways, rates, capacity):
    return [rate or 0.0 for rate in filling()(ways, rates, capacity)]


def _narrowest(size: Callable) -> Callable:
    """The link with the least `size(capacity, stopped)` is full, at its right level."""

    def way(ways, rates, capacity):
        sizes = {}
        for link, most in enumerate(capacity):
            there = [r for links, r in zip(ways, rates, strict=True) if link in links]
            if None in there:
                sizes[link] = size(most, [r for r in there if r is not None])
        narrow = min(sizes, key=sizes.__getitem__)
        only = [c if link == narrow else 1e30 for link, c in enumerate(capacity)]
        return filling()(ways, rates, only)

    return way


def wrong_fills() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "what stopped flows take was not taken off the link": filling(
            left=lambda capacity, stopped: capacity
        ),
        "only one of a link's stopped flows was taken off": filling(
            left=lambda capacity, stopped: capacity - (stopped[0] if stopped else 0)
        ),
        "a link's rest was divided by all of its flows: only those that rise share"
        " it": filling(users=lambda rising, all_: all_),
        "a link's rest was not divided by the flows that rise on it": filling(
            users=lambda rising, all_: 1
        ),
        "the link that is full last was taken: the lowest level comes first": filling(
            choose=max
        ),
        "all rising flows were stopped: only those over the full link stop": filling(
            gets=lambda way, full: True
        ),
        "only flows whose first link is full were stopped": filling(
            gets=lambda way, full: way[0] in full
        ),
        "only flows whose last link is full were stopped": filling(
            gets=lambda way, full: way[-1] in full
        ),
        "flows that are not over the full link were stopped, and the others not": (
            filling(gets=lambda way, full: not set(way) & full)
        ),
        "two links were full at the same level, and flows of one rose on": filling(
            ties=False
        ),
        "a flow that had stopped was changed": filling(kept=lambda rate, level: level),
        "every flow was stopped at its own lowest level: those over other links may"
        " still rise, once these have stopped": _by_itself,
        "the link with the smallest capacity was taken: its level counts": (
            _narrowest(lambda capacity, stopped: capacity)
        ),
        "the link with the least left was taken: its level counts, so divide"
        " first": _narrowest(lambda capacity, stopped: capacity - sum(stopped)),
        "a link on which no flow rises any more was taken: it stops none": (
            filling(idle=True)
        ),
        "a rate of 0 was taken for None: a flow that stopped at 0 does not rise": (
            _zero_rises
        ),
        "only flows all of whose links are full were stopped: one full link"
        " stops": filling(gets=lambda way, full: set(way) <= full),
        "flows that still rise were given 0: they stay None": _others_at_zero,
        "links were filled until no flow rises: one step is asked": _to_the_end,
    }


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=5,
    hints=(
        "For each link: what is left of it, and how many flows still rise on it? Links"
        " on which none rises do not matter.",
        (
            "The level is what is left, over how many rise. The lowest level of all"
            " links is the new rate; whose?"
        ),
        "Flows that rise and go over a link with the lowest level. All others are"
        " returned as they came.",
    ),
)
def fill(answer):
    """One step of filling: the next link is full, and its flows stop."""
    judge(answer, run_fill, filling(), wrong_fills(), len(FILL_CASES), "fill(…)")


# 3 ------------------------------------------------------------------------------------

# hosts, hosts per leaf, bytes, a host's rate, a leaf's rate to its spines, a hop
RING_CASES = [
    ([0, 1, 2, 3], 4, 4e6, 1e9, 4e9, 1e-6),
    ([0, 4, 1, 5, 2, 6, 3, 7], 4, 8e6, 1e9, 2e9, 1e-6),
    ([0, 1, 2, 3, 4, 5, 6, 7], 4, 8e6, 1e9, 2e9, 3e-6),
    ([0, 4, 8, 1, 9, 5, 2], 4, 3e6, 1e9, 1.5e9, 2e-6),
    ([3, 2, 7, 6, 11, 0], 3, 9e6, 2e9, 1e9, 5e-6),
    ([5, 0, 3], 2, 1e3, 1e9, 8e9, 1e-5),
    ([0, 6, 1, 7, 2, 8, 3, 12], 6, 6e6, 1e9, 2.5e9, 1e-6),
    ([12, 0, 6, 1, 7, 13], 6, 6e6, 1e9, 1.5e9, 1e-6),
]


def run_ring(answer: Callable, n: int) -> Outcome:
    """Case n: seconds."""
    hosts, *rest = RING_CASES[n]
    given = list(hosts)
    found = number(answer(given, *rest), "ring_seconds(…)")
    if given != hosts:
        raise Mistake("hosts were changed in place: their order is the placement")
    return {"the number of seconds": found}


def ringing(
    pairs: Callable = lambda hosts: zip(hosts, hosts[1:] + hosts[:1], strict=True),
    steps: Callable = lambda p: 2 * (p - 1),
    part: Callable = lambda n, p: n / p,
    busiest: Callable = lambda leaving, p: max(leaving.values(), default=0),
    crosses: Callable = lambda a, b: a != b,
    rate: Callable = min,
    hops: Callable = lambda crossing: 4 if crossing else 2,
    once: bool = False,
) -> Callable:
    """`ring_seconds`, and what comes out with one thing changed."""

    def way(hosts, per_leaf, n, host_rate, leaf_rate, hop):
        p = len(hosts)
        leaving: dict[int, int] = {}
        for a, b in pairs(hosts):
            if crosses(a // per_leaf, b // per_leaf):
                leaving[a // per_leaf] = leaving.get(a // per_leaf, 0) + 1
        most = busiest(leaving, p)
        speed = rate(host_rate, leaf_rate / most) if most else host_rate
        moving, waiting = part(n, p) / speed, hops(bool(leaving)) * hop
        if once:
            return steps(p) * moving + waiting
        return steps(p) * (moving + waiting)

    return way


def _ranks_for_hosts(hosts, *rest):
    return ringing()([*range(len(hosts))], *rest)


def _divided_by(count: Callable) -> Callable:
    """The leaf's rate divided by `count(hosts, per_leaf)`, where messages leave."""

    def way(hosts, per_leaf, *rest):
        always = ringing(busiest=lambda leaving, p: leaving and count(hosts, per_leaf))
        return always(hosts, per_leaf, *rest)

    return way


def _ranks_of_a_leaf(hosts, per_leaf):
    """How many ranks the leaf with the most has."""
    leaves = [host // per_leaf for host in hosts]
    return max(map(leaves.count, leaves))


def wrong_rings() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "the last rank sends to the first, too": ringing(pairs=pairwise),
        "a ring takes p − 1 steps to sum and p − 1 to spread: 2 (p − 1)": ringing(
            steps=lambda p: p - 1
        ),
        "a ring takes 2 (p − 1) steps, not 2 p": ringing(steps=lambda p: 2 * p),
        "a step moves n / p bytes, not n": ringing(part=lambda n, p: n),
        "a step moves n / p bytes, not n / (p − 1)": ringing(
            part=lambda n, p: n / (p - 1)
        ),
        "messages that stay on their leaf do not use its cables to the spines": ringing(
            crosses=lambda a, b: True
        ),
        "the messages that leave all leaves were counted together: each leaf has cables"
        " of its own": ringing(busiest=lambda leaving, p: sum(leaving.values())),
        "the messages of the first leaf were counted: the ring waits for the leaf that"
        " most leave": ringing(
            busiest=lambda leaving, p: next(iter(leaving.values()), 0)
        ),
        "the mean over leaves was taken: the ring waits for the busiest": ringing(
            busiest=lambda leaving, p: sum(leaving.values()) / max(1, len(leaving))
        ),
        "one message was counted for each leaf: in the order of the ranks, not sorted,"
        " several may leave it, and share its rate": ringing(
            busiest=lambda leaving, p: min(1, max(leaving.values(), default=0))
        ),
        "the leaf's rate was divided by its ranks: only messages that leave it"
        " share": _divided_by(_ranks_of_a_leaf),
        "the leaf's rate was divided by its hosts: only messages that leave it"
        " share": _divided_by(lambda hosts, per_leaf: per_leaf),
        "the leaf was taken from the rank: rank r is on host hosts[r]": (
            _ranks_for_hosts
        ),
        "a message is never faster than its host's card": ringing(
            rate=lambda host, leaf: leaf
        ),
        "the leaf's share was left out: with many messages it is less than the card's"
        " rate": ringing(rate=lambda host, leaf: host),
        "the faster of the two rates was taken: the slower one decides": ringing(
            rate=max
        ),
        "the latency was left out: one hop after the other": ringing(
            hops=lambda crossing: 0
        ),
        "one hop was counted: a message goes over two cables on its leaf, over four"
        " across": ringing(hops=lambda crossing: 1),
        "over a spine a message takes four cables": ringing(hops=lambda crossing: 2),
        "on one leaf a message takes two cables": ringing(hops=lambda crossing: 4),
        "the latency comes with each step, not once": ringing(once=True),
    }


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=4,
    hints=(
        "Which messages of a step leave their leaf? Count them for each leaf; the last"
        " rank sends to the first.",
        (
            "The busiest leaf gives each of its messages leaf_rate / count, and no host"
            " more than host_rate. All wait for the slowest."
        ),
        "`2 * (p - 1) * (n / p / rate + cables * hop)`: four cables if any message"
        " leaves its leaf, else two.",
    ),
)
def ring_seconds(answer):
    """A ring all-reduce on leaves and spines, by its bottleneck."""
    judge(
        answer, run_ring, ringing(), wrong_rings(), len(RING_CASES), "ring_seconds(…)"
    )


# 4 ------------------------------------------------------------------------------------

# parameters, bytes of each, hosts, Gbit/s of each, oversubscription, storage, interval
SAVE_CASES = [
    (405e9, 14, 2048, 400, 7, 2e12, 600),
    (7e9, 14, 8, 100, 1, 2e12, 300),
    (70e9, 16, 64, 200, 4, 1e12, 900),
    (1e12, 2, 16, 25, 2, 7e12, 3600),
    (13e9, 14, 4, 400, 1, 1e11, 100),
    (1e9, 14, 2, 400, 1, 1e9, 50),
]


def run_save(answer: Callable, n: int) -> Outcome:
    """Case n: seconds, and the share of time."""
    found = answer(*SAVE_CASES[n])
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise Mistake(f"checkpoint(…) returned {found!r}: return seconds and a share")
    return {
        "the number of seconds": number(found[0], "checkpoint(…)[0]"),
        "the share of time": number(found[1], "checkpoint(…)[1]"),
    }


def saving(
    bits: float = 8.0,
    each: Callable = lambda size: size,
    network: Callable = lambda cards, over: cards / over,
    storage: Callable = lambda rate, writers: rate,
    total: Callable = lambda cards, writers: cards * writers,
    limit: Callable = min,
    share: Callable = lambda t, every: t / (t + every),
    giga: float = 1e9,
) -> Callable:
    """`checkpoint`, and what comes out with one thing changed."""

    def way(parameters, size, writers, gbit, over, stored, every):
        cards = total(gbit * giga / bits, writers)
        rate = limit(network(cards, over), storage(stored, writers))
        t = parameters * each(size) / rate
        return t, share(t, every)

    return way


def right_save(parameters, size, writers, gbit, over, stored, every):
    """From the room."""
    held = checkpoint_bytes(parameters, size)
    t, _ = write_seconds(held, writers, gbit * 1e9 / 8, stored, over)
    return t, t / (t + every)


def wrong_saves() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "bits were taken for bytes: divide by 8": saving(bits=1.0),
        "the bytes of a parameter were left out": saving(each=lambda size: 1),
        "oversubscription was left out: between the racks there is less": saving(
            network=lambda cards, over: cards
        ),
        "oversubscription was multiplied: the network carries less, not more": saving(
            network=lambda cards, over: cards * over
        ),
        "the storage's rate is that of all hosts together": saving(
            storage=lambda rate, writers: rate * writers
        ),
        "the storage's rate was divided by the hosts: it is that of all"
        " together": saving(storage=lambda rate, writers: rate / writers),
        "all hosts write at once: their cards add up": saving(
            total=lambda cards, writers: cards
        ),
        "the faster of network and storage was taken: the slower decides": saving(
            limit=max
        ),
        "network and storage were added: bytes go through one after the other, at the"
        " pace of the slower": saving(limit=lambda a, b: a + b),
        "both times were added: bytes are on both at once": saving(
            limit=lambda a, b: 1 / (1 / a + 1 / b)
        ),
        "the storage was left out": saving(limit=lambda a, b: a),
        "the network was left out": saving(limit=lambda a, b: b),
        "the share is of all time, that of writing too: t / (t + every)": saving(
            share=lambda t, every: t / every
        ),
        "this is the share that is left for training": saving(
            share=lambda t, every: every / (t + every)
        ),
        "a Gbit is 10⁹ bits here, not 2³⁰": saving(giga=2.0**30),
    }


@check.exercise(
    points=2,
    minutes=12,
    difficulty=2,
    importance=4,
    hints=(
        "Three numbers: bytes in all, bytes per second that the network brings, and"
        " those that the storage takes.",
        "The network brings hosts · Gbit/s · 10⁹ / 8 / oversubscription.",
        "`t = bytes / min(network, storage)`; the share is `t / (t + every)`.",
    ),
)
def checkpoint(answer):
    """How long a checkpoint takes, and what share of time it costs."""
    cases = len(SAVE_CASES)
    judge(answer, run_save, right_save, wrong_saves(), cases, "checkpoint(…)")


# 5 ------------------------------------------------------------------------------------

# As they were when this file was read: no answer reaches them.
CASES, checked, step = challenge.CASES, challenge.checked, challenge.step

DOES = {
    "tp": "the sums inside of layers (tp)",
    "pp": "what stages hand on (pp)",
    "dp": "gradients (dp)",
}


@check.exercise(
    points=6,
    minutes=45,
    difficulty=5,
    importance=4,
    hints=(
        "Fill nodes with whole tp groups, stage after stage (Megatron's tp-dp-pp), and"
        " look at `challenge.step`: which link is the slowest, whose is it?",
        "A leaf in the middle holds parts of two stages, so two rings leave it. A leaf"
        " at either end of the chain has one. Leaves may be filled in any order.",
        "Sort leaves by `cluster.up`. The worst comes first, the second worst last, so"
        " that they share no stage; all others stand between them.",
    ),
)
def placement(answer):
    """Challenge: ranks on GPUs, so that a step is quick with two cables down."""
    for n, case in enumerate(CASES):
        own = replace(case.cluster)
        found = answer(own, replace(case.job))
        judge_placement(n, found)


def judge_placement(n: int, found: object) -> None:
    """A placement of case n, under its bound."""
    cluster, job, bound = CASES[n].cluster, CASES[n].job, CASES[n].bound
    down = " and ".join(" – ".join(cable) for cable in cluster.down)
    where = f"case {n + 1} of {len(CASES)} ({down} down)"
    try:
        gpus = checked(cluster, job, found)
    except ValueError as refusal:
        raise Mistake(f"{where}: {refusal}") from None
    done = step(cluster, job, gpus)
    if done.seconds <= bound:
        return
    ranks = [0] * len(gpus)
    for rank, gpu in enumerate(gpus):
        ranks[gpu] = rank
    if step(cluster, job, ranks).seconds <= bound:
        raise Mistake(
            f"{where}: this is the other way round. placement[rank] is a GPU, not"
            " placement[gpu] a rank"
        )
    worst = done.worst
    over = done.seconds - bound
    stages = ", ".join(map(str, worst.stages))
    many = f"{worst.messages} message" + ("s" if worst.messages > 1 else "")
    raise Mistake(
        f"{where}: the step takes {done.seconds:.2f} s, and at most {bound:.2f} s are"
        f" asked: {over:.2f} s ({over / bound:.0%}) too long. {worst.seconds:.2f} s of"
        f" it are {DOES[worst.kind]}; the slowest link is {worst.slowest}, with {many}"
        f" of stage {stages} on it at once"
    )
