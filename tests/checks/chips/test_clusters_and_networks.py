"""Wrong answers to 09-chips/05-clusters-and-networks, each with its diagnosis."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest

from llmlab.checks.chips import clusters_and_networks as checks
from llmlab.checks.chips.clusters_and_networks import check
from llmlab.chips import clusters_and_networks as cn
from llmlab.chips.clusters_and_networks import challenge
from tests.checks.rejecting import (
    ByCases,
    Wrong,
    accepts,
    all_foreseen,
    kept_apart,
    rejects,
    solved,
)

SLUG = "09-chips/05-clusters-and-networks"

# Right, written otherwise ------------------------------------------------------------


def hash_by_arrays(hashes, sizes, ports):
    ports = np.array(ports)
    up = np.flatnonzero(ports)
    load = np.bincount(np.array(hashes) % len(up), sizes, len(up))
    return (load / ports[up]).max()


def hash_by_counter(hashes, sizes, ports):
    up = [rate for rate in ports if rate]
    load = Counter()
    for value, size in zip(hashes, sizes, strict=True):
        load[value % len(up)] += size
    return float(max(Fraction(load[i]) / Fraction(up[i]) for i in load))


def fill_by_arrays(ways, rates, capacity):
    uses = np.zeros((len(capacity), len(ways)))
    for f, way in enumerate(ways):
        uses[way, f] = 1
    rising = np.array([rate is None for rate in rates])
    stopped = np.array([rate or 0.0 for rate in rates])
    many = uses @ rising
    left = np.array(capacity) - uses @ stopped
    levels = np.where(many > 0, left / np.maximum(many, 1), np.inf)
    hit = uses[np.isclose(levels, levels.min())].any(axis=0) & rising
    return [float(levels.min()) if h else r for h, r in zip(hit, rates, strict=True)]


def fill_by_rising(ways, rates, capacity):
    """One link after the other, the best so far kept."""
    best, links = float("inf"), []
    for link in range(len(capacity)):
        left, many = capacity[link], 0
        for way, rate in zip(ways, rates, strict=True):
            if link in way:
                many += rate is None
                left -= rate if rate is not None else 0
        if not many:
            continue
        if left / many < best:
            best, links = left / many, [link]
        elif left / many == best:
            links.append(link)
    found = list(rates)
    for f, way in enumerate(ways):
        if rates[f] is None and any(link in way for link in links):
            found[f] = best
    return found


def ring_by_leaves(hosts, per_leaf, n, host_rate, leaf_rate, hop):
    leaves = np.array(hosts) // per_leaf
    away = leaves != np.roll(leaves, -1)
    p = len(hosts)
    rate = host_rate
    if away.any():
        rate = min(rate, leaf_rate / np.bincount(leaves[away]).max())
    return 2 * (p - 1) * (n / (p * rate) + (4 if away.any() else 2) * hop)


def ring_by_entering(hosts, per_leaf, n, host_rate, leaf_rate, hop):
    p = len(hosts)
    entering = Counter()
    for r in range(p):
        if hosts[r - 1] // per_leaf != hosts[r] // per_leaf:
            entering[hosts[r] // per_leaf] += 1
    slowest = max([1 / host_rate, *(c / leaf_rate for c in entering.values())])
    cables = 4 if entering else 2
    return sum(n / p * slowest + cables * hop for _ in range(2 * p - 2))


def save_by_times(parameters, each, writers, gbit, over, storage, every):
    size = parameters * each
    card = size / writers / (gbit / 8 * 1e9) * over
    t = max(card, size / storage)
    return [t, 1 / (1 + every / t)]


def save_by_arrays(parameters, each, writers, gbit, over, storage, every):
    rates = np.array([writers * gbit * 125e6 / over, storage])
    t = parameters * each / rates.min()
    return t, 1 - every / (t + every)


RIGHT = {
    "ecmp_seconds": (hash_by_arrays, hash_by_counter),
    "fill": (fill_by_arrays, fill_by_rising),
    "ring_seconds": (ring_by_leaves, ring_by_entering),
    "checkpoint": (save_by_times, save_by_arrays),
}


# Placements: leaves in an order, filled by cells in an order


def along(cluster, job, chain, cells=None):
    """Whole tp groups along a chain of leaves, stage after stage."""
    each = cluster.nodes * cluster.gpus
    free = [leaf * each + i for leaf in chain for i in range(each)]
    cells = cells or [(s, d) for s in range(job.pp) for d in range(job.dp)]
    found = [0] * job.ranks
    for gpu, (cell, t) in zip(free, product(cells, range(job.tp)), strict=True):
        found[job.rank(t, *cell)] = gpu
    return found


def place_the_other_way(cluster, job):
    worst = sorted(range(cluster.leaves), key=lambda leaf: (cluster.up(leaf), -leaf))
    return along(cluster, job, [worst[1], *worst[2:], worst[0]])


def place_by_trying(cluster, job):
    """All pairs of leaves at the ends, measured."""
    every = range(cluster.leaves)
    tried = [
        along(cluster, job, [a, *(leaf for leaf in every if leaf not in (a, b)), b])
        for a, b in combinations(every, 2)
    ]
    return min(tried, key=lambda gpus: challenge.step(cluster, job, gpus).seconds)


def place_by_swaps(cluster, job):
    """From the leaves' own order, exchange two leaves as long as it gets quicker."""
    chain = [*range(cluster.leaves)]

    def seconds(chain):
        return challenge.step(cluster, job, along(cluster, job, chain)).seconds

    best, going = seconds(chain), True
    while going:
        going = False
        for i, j in combinations(range(cluster.leaves), 2):
            other = [*chain]
            other[i], other[j] = other[j], other[i]
            if seconds(other) < best - 1e-9:
                chain, best, going = other, seconds(other), True
    return np.array(along(cluster, job, chain))


RIGHT["placement"] = (place_the_other_way, place_by_trying, place_by_swaps)

test_right_answers_written_otherwise = accepts(check, RIGHT)


# Wrong --------------------------------------------------------------------------------

KINDS = {
    "ecmp_seconds": ByCases(
        checks.run_hash, checks.hashing(), checks.wrong_hashes, checks.HASH_CASES
    ),
    "fill": ByCases(
        checks.run_fill, checks.filling(), checks.wrong_fills, checks.FILL_CASES
    ),
    "ring_seconds": ByCases(
        checks.run_ring, checks.ringing(), checks.wrong_rings, checks.RING_CASES
    ),
    "checkpoint": ByCases(
        checks.run_save, checks.right_save, checks.wrong_saves, checks.SAVE_CASES
    ),
}

test_no_two_mistakes_come_to_the_same = kept_apart(KINDS)


def test_filling_to_the_end_gives_the_rooms_rates():
    net = cn.leaf_spine(3, 3, 2, bandwidth=1.0)
    draw = np.random.default_rng(0)
    ends = [draw.choice(9, 2, replace=False) for _ in range(12)]
    flows = [cn.Flow(int(a), int(b), 1.0, port=i) for i, (a, b) in enumerate(ends)]
    ways = cn.routes(net, flows)
    links = [ways.of(f).tolist() for f in range(12)]
    rates = [None] * 12
    while None in rates:
        rates = checks.filling()(links, rates, net.bandwidth.tolist())
    np.testing.assert_allclose(rates, cn.fair_rates(net, ways))


@pytest.mark.parametrize("case", checks.RING_CASES)
def test_the_rings_bottleneck_is_that_of_the_simulator(case):
    hosts, per_leaf, n, host_rate, leaf_rate, hop = case
    leaves = max(hosts) // per_leaf + 1
    net = cn.leaf_spine(leaves, per_leaf, 2, host_rate, leaf_rate / 2, hop)
    wanted = cn.ring_seconds(net, hosts, n, "spray")
    assert checks.ringing()(*case) == pytest.approx(wanted)


def changes_capacity(ways, rates, capacity):
    found = solved(SLUG)["fill"](ways, rates, capacity)
    capacity.pop()
    return found


def changes_rates(ways, rates, capacity):
    rates[:] = solved(SLUG)["fill"](ways, rates, capacity)
    return rates


def sorts_hosts(hosts, *rest):
    found = solved(SLUG)["ring_seconds"](hosts, *rest)
    hosts.sort()
    return found


def drops_down_ports(hashes, sizes, ports):
    found = solved(SLUG)["ecmp_seconds"](hashes, sizes, ports)
    ports[:] = [rate for rate in ports if rate]
    return found


def fill_takes_zero_for_none(ways, rates, capacity):
    return fill_by_rising(ways, [rate if rate else None for rate in rates], capacity)


def fill_of_all_links(ways, rates, capacity):
    """A link on which no flow rises divides by 1."""
    levels = []
    for link, most in enumerate(capacity):
        there = [r for way, r in zip(ways, rates, strict=True) if link in way]
        left = most - sum(r for r in there if r is not None)
        levels.append(left / max(1, there.count(None)))
    full = {link for link, level in enumerate(levels) if level == min(levels)}
    return [
        min(levels) if rate is None and full & {*way} else rate
        for way, rate in zip(ways, rates, strict=True)
    ]


def ring_of_sorted_hosts(hosts, *rest):
    return ring_by_leaves(sorted(hosts), *rest)


def ring_of_ranks(hosts, *rest):
    return ring_by_leaves([*range(len(hosts))], *rest)


def ring_by_its_first_leaf(hosts, per_leaf, n, host_rate, leaf_rate, hop):
    """As many leave each leaf as leave that of rank 0."""
    p = len(hosts)
    leaves = np.array(hosts) // per_leaf
    away = leaves != np.roll(leaves, -1)
    many = (away & (leaves == leaves[0])).sum()
    rate = min(host_rate, leaf_rate / many) if many else host_rate
    return 2 * (p - 1) * (n / (p * rate) + (4 if away.any() else 2) * hop)


def port_with_most_bytes(hashes, sizes, ports):
    up = np.array([rate for rate in ports if rate])
    load = np.bincount(np.array(hashes) % len(up), sizes, len(up))
    return load.max() / up[load.argmax()]


def rates_of_all_ports(hashes, sizes, ports):
    up = np.count_nonzero(ports)
    load = np.bincount(np.array(hashes) % up, sizes, up)
    rates = zip(load, ports, strict=False)
    return max(size / rate for size, rate in rates if rate)


def fill_as_tuple(ways, rates, capacity):
    return tuple(solved(SLUG)["fill"](ways, rates, capacity))


def seconds_alone(*values):
    return solved(SLUG)["checkpoint"](*values)[0]


def as_text(*values):
    return str(solved(SLUG)["ecmp_seconds"](*values))


def two_percent_more(*values):
    return 1.02 * solved(SLUG)["ring_seconds"](*values)


def by_rank(cluster, job):
    return challenge.in_order(job, "tp-pp-dp")


def by_megatron(cluster, job):
    return challenge.in_order(job)


def worst_first(cluster, job):
    return along(cluster, job, sorted(range(cluster.leaves), key=cluster.up))


def learned_by_heart(cluster, job):
    """Right in the first case."""
    return along(cluster, job, [1, 0, *range(3, cluster.leaves), 2])


def best_first(cluster, job):
    chain = sorted(range(cluster.leaves), key=cluster.up, reverse=True)
    return along(cluster, job, chain)


def ring_out_of_order(cluster, job):
    worst = sorted(range(cluster.leaves), key=cluster.up)
    order = [*range(0, job.dp, 2), *range(1, job.dp, 2)]
    cells = [*product(range(job.pp), order)]
    return along(cluster, job, [worst[0], *worst[2:], worst[1]], cells)


def tp_over_nodes(cluster, job):
    found = [0] * job.ranks
    cells = product(range(job.tp), range(job.pp), range(job.dp))
    for gpu, cell in enumerate(cells):
        found[job.rank(*cell)] = gpu
    return found


def inverse(cluster, job):
    return np.argsort(solved(SLUG)["placement"](cluster, job)).tolist()


def spoiled(change):
    def wrong(cluster, job):
        found = solved(SLUG)["placement"](cluster, job)
        return change(found)

    return wrong


P = "placement"
WRONGS = [
    Wrong(
        P, by_rank, "leaf 1 – spine 0 and leaf 2 – spine 1 down): the step takes 4.31"
    ),
    Wrong(P, by_megatron, "with 8 messages of stage 1, 2 on it at once"),
    Wrong(P, worst_first, "too long"),
    Wrong(P, best_first, "too long"),
    Wrong(P, learned_by_heart, "case 3 of 3"),
    Wrong(P, ring_out_of_order, "gradients (dp)"),
    Wrong(P, tp_over_nodes, "the sums inside of layers (tp)"),
    Wrong(P, inverse, "this is the other way round"),
    Wrong(P, spoiled(lambda found: found[:-1]), "has 47 GPUs: 48 ranks need one each"),
    Wrong(P, spoiled(lambda found: [*found[:-1], found[0]]), "has ranks 0 and 47"),
    Wrong(P, spoiled(lambda found: [48, *found[1:]]), "one of the GPUs 0 … 47"),
    Wrong(P, spoiled(lambda found: [-1, *found[1:]]), "placement[0]=-1"),
    Wrong(P, spoiled(lambda found: [True, *found[1:]]), "must be a whole number"),
    Wrong(P, spoiled(lambda found: [1.0, *found[1:]]), "placement[0]=1.0 must be"),
    Wrong(P, spoiled(set), "a placement is a list, not set"),
    Wrong(P, spoiled(lambda found: None), "a list, not NoneType"),
    *all_foreseen(KINDS),
    Wrong("fill", changes_capacity, "in place"),
    Wrong("fill", fill_takes_zero_for_none, "a rate of 0 was taken for None"),
    Wrong("fill", fill_of_all_links, "on which no flow rises any more"),
    Wrong("fill", changes_rates, "in place"),
    Wrong("fill", fill_as_tuple, "return a list with a rate per flow"),
    Wrong("ring_seconds", sorts_hosts, "in place"),
    Wrong("ring_seconds", ring_of_sorted_hosts, "order of the ranks, not sorted"),
    Wrong("ring_seconds", ring_of_ranks, "taken from the rank"),
    Wrong("ring_seconds", ring_by_its_first_leaf, "of the first leaf were counted"),
    Wrong("ring_seconds", two_percent_more, "the number of seconds"),
    Wrong("ecmp_seconds", drops_down_ports, "in place"),
    Wrong("ecmp_seconds", port_with_most_bytes, "the port with the most bytes"),
    Wrong("ecmp_seconds", rates_of_all_ports, "the rate of another port"),
    Wrong("ecmp_seconds", as_text, "return a number"),
    Wrong("checkpoint", seconds_alone, "return seconds and a share"),
]

test_wrong_answers = rejects(SLUG, WRONGS, drawing_nothing=("placement",))
