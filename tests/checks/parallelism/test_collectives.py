"""Wrong answers to the exercises of 05-parallelism/01-collectives, each with the
diagnosis that it must get.
"""

import math

import pytest
import torch

from llmlab.checks.parallelism.collectives import check
from tests.checks.rejecting import Wrong, rejects, verdict

# Exercise 1


def ring(p, chunk, steps=None):
    steps = 2 * (p - 1) if steps is None else steps
    return [
        (s, r, (r + 1) % p, chunk(r, s) % p) for s in range(steps) for r in range(p)
    ]


def same_chunk_always(p):
    return ring(p, lambda r, s: r)


def other_direction_of_chunks(p):
    return ring(p, lambda r, s: r + s)


def own_chunk_handed_around(p):
    return ring(p, lambda r, s: r - s if s < p - 1 else r - (s - p + 1))


def first_half_only(p):
    return ring(p, lambda r, s: r - s, steps=p - 1)


def steps_start_again(p):
    half = ring(p, lambda r, s: r - s, steps=p - 1)
    return half + [(s, r, d, (r + 1 - s) % p) for s, r, d, _ in half]


def to_the_left(p):
    return [
        (s, r, (r - 1) % p, (r + s) % p) for s in range(2 * (p - 1)) for r in range(p)
    ]


def no_modulo(p):
    return [(s, r, (r + 1) % p, r - s) for s in range(2 * (p - 1)) for r in range(p)]


def one_step_too_many(p):
    return ring(p, lambda r, s: r - s, steps=2 * p - 1)


def without_steps(p):
    return [(r, (r + 1) % p, (r - s) % p) for s in range(2 * (p - 1)) for r in range(p)]


def rank_zero_only(p):
    return [(s, 0, 1 % p, -s % p) for s in range(2 * (p - 1))]


# Exercise 2


def terms(p, link):
    return link.latency, link.bandwidth, math.ceil(math.log2(p)), (p - 1) / p


def divided(p, link):
    a, b, L, part = terms(p, link)
    return a / b * (p - 1 - L) / (L - part)


def not_rounded(p, link):
    a, b, _, part = terms(p, link)
    return a * b * (p - 1 - math.log2(p)) / (math.log2(p) - part)


def whole_tensor_each_step(p, link):
    a, b, L, _ = terms(p, link)
    return a * b * (p - 1 - L) / (L - (p - 1))


def tree_once(p, link):
    a, b, L, part = terms(p, link)
    return a * b * (2 * (p - 1) - L) / (L - 2 * part)


def ring_once(p, link):
    a, b, L, part = terms(p, link)
    return a * b * (p - 1 - 2 * L) / (2 * L - part)


def negative(p, link):
    a, b, L, part = terms(p, link)
    return a * b * (p - 1 - L) / (part - L)


def in_bits(p, link):
    a, b, L, part = terms(p, link)
    return 8 * a * b * (p - 1 - L) / (L - part)


# Exercise 3


def tree(comm, x, root, place=None, guard=True):
    p = comm.size
    place = (comm.rank - root) % p if place is None else place
    hop = 1
    while hop < p:
        if place < hop and (place + hop < p or not guard):
            comm.send(x, (place + hop + root) % p)
        elif hop <= place < 2 * hop:
            x = comm.recv((place - hop + root) % p)
        hop *= 2
    return x


def root_is_zero(comm, x, root):
    return tree(comm, x, 0)


def star(comm, x, root):
    if comm.rank != root:
        return comm.recv(root)
    for r in range(comm.size):
        if r != root:
            comm.send(x, r)
    return x


def chain(comm, x, root):
    place = (comm.rank - root) % comm.size
    if place:
        x = comm.recv((comm.rank - 1) % comm.size)
    if place < comm.size - 1:
        comm.send(x, (comm.rank + 1) % comm.size)
    return x


def the_library(comm, x, root):
    return comm.broadcast(torch.zeros(3, 2) if x is None else x, root)


def root_returns_nothing(comm, x, root):
    got = tree(comm, x, root)
    return None if comm.rank == root else got


def powers_of_two_only(comm, x, root):
    return tree(comm, x, root, guard=False)


def all_receive_first(comm, x, root):
    if comm.rank != root:
        x = comm.recv((comm.rank ^ 1) % comm.size)
    return x


def copies_of_zeros(comm, x, root):
    return torch.zeros(3, 2) if x is None else x


# Exercise 4


def parts_of(comm, x):
    chunks = x.chunk(comm.size)
    return [chunks[(comm.rank + i) % comm.size] for i in range(comm.size)]


def hops(p):
    return [2**k for k in range((p - 1).bit_length())]


def scatter_half(comm, parts, order=reversed):
    p, r = comm.size, comm.rank
    for hop in order(hops(p)):
        n = min(hop, p - hop)
        got = comm.sendrecv(
            torch.cat(parts[hop : hop + n]), (r + hop) % p, (r - hop) % p
        )
        parts[:n] = [a + b for a, b in zip(parts, got.chunk(n), strict=False)]
    return parts


def gather_half(comm, parts):
    p, r = comm.size, comm.rank
    for hop in hops(p):
        n = min(hop, p - hop)
        parts[hop : hop + n] = comm.sendrecv(
            torch.cat(parts[:n]), (r - hop) % p, (r + hop) % p
        ).chunk(n)
    return parts


def in_order(comm, parts):
    return torch.cat([parts[(c - comm.rank) % comm.size] for c in range(comm.size)])


def rotated(comm, x):
    return torch.cat(gather_half(comm, scatter_half(comm, parts_of(comm, x))))


def scatter_only(comm, x):
    return in_order(comm, scatter_half(comm, parts_of(comm, x)))


def gather_only(comm, x):
    return in_order(comm, gather_half(comm, parts_of(comm, x)))


def wrong_order_of_hops(comm, x):
    return in_order(
        comm, gather_half(comm, scatter_half(comm, parts_of(comm, x), order=list))
    )


def ring_of_chunks(comm, x):
    p, r = comm.size, comm.rank
    parts = list(x.clone().chunk(p))
    for s in range(2 * (p - 1)):
        got = comm.sendrecv(parts[(r - s) % p], (r + 1) % p, (r - 1) % p)
        parts[(r - s - 1) % p] = parts[(r - s - 1) % p] + got if s < p - 1 else got
    return torch.cat(parts)


def whole_tensors(comm, x):
    """Bruck's steps, with all n numbers in each message."""
    p, r, got = comm.size, comm.rank, [x]
    for hop in hops(p):
        n = min(hop, p - hop)
        got += comm.sendrecv(
            torch.stack(got[:n]), (r - hop) % p, (r + hop) % p
        ).unbind()
    return torch.stack(got).sum(0)


def whole_tensors_hypercube(comm, x):
    for hop in hops(comm.size):
        partner = comm.rank ^ hop
        x = x + comm.sendrecv(x, partner, partner)
    return x


def library_all_reduce(comm, x):
    return comm.all_reduce(x)


def averaged(comm, x):
    return (
        in_order(comm, gather_half(comm, scatter_half(comm, parts_of(comm, x))))
        / comm.size
    )


def star_of_isends(comm, x, root):
    if comm.rank != root:
        return comm.recv(root)
    for handle in [comm.isend(x, r) for r in range(comm.size) if r != root]:
        handle.wait()
    return x


# Right, and written differently


def farthest_first(comm, x, root):
    p, place, hop = comm.size, (comm.rank - root) % comm.size, 1
    while hop < p:
        hop *= 2
    while hop > 1:
        hop //= 2
        if place % (2 * hop) == 0 and place + hop < p:
            comm.send(x, (place + hop + root) % p)
        elif place % (2 * hop) == hop:
            x = comm.recv((place - hop + root) % p)
    return x


def with_isend(comm, x, root):
    p, place = comm.size, (comm.rank - root) % comm.size
    if place:
        x = comm.recv((place - 2 ** (place.bit_length() - 1) + root) % p)
    hops = [2**k for k in range(place.bit_length(), p.bit_length()) if place + 2**k < p]
    for handle in [comm.isend(x, (place + hop + root) % p) for hop in hops]:
        handle.wait()
    return x


def on_a_copy(comm, x):
    p, r, x = comm.size, comm.rank, x.clone()
    chunks = x.chunk(p)
    for hop in reversed(hops(p)):
        mine = [(r + hop + i) % p for i in range(min(hop, p - hop))]
        handle = comm.isend(torch.cat([chunks[c] for c in mine]), (r + hop) % p)
        got = comm.recv((r - hop) % p)
        handle.wait()
        for i, part in enumerate(got.chunk(len(mine))):
            chunks[(r + i) % p].add_(part)
    for hop in hops(p):
        n = min(hop, p - hop)
        got = comm.sendrecv(
            torch.cat([chunks[(r + i) % p] for i in range(n)]),
            (r - hop) % p,
            (r + hop) % p,
        )
        for i, part in enumerate(got.chunk(n)):
            chunks[(r + hop + i) % p].copy_(part)
    return x


def with_floor_and_log(p, link):
    L = math.floor(math.log2(p - 1)) + 1
    return (
        (2 * (p - 1) - 2 * L)
        * link.latency
        / ((2 * L - 2 * (p - 1) / p) / link.bandwidth)
    )


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("crossover", with_floor_and_log),
        ("tree_broadcast", farthest_first),
        ("tree_broadcast", with_isend),
        ("log_all_reduce", on_a_copy),
    ],
)
def test_other_right_answers(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)


def steps_from_one(p):
    return [(s + 1, r, d, c) for s, r, d, c in ring(p, lambda r, s: r - s)]


def a_message_to_itself(p):
    return ring(p, lambda r, s: r - s) if p > 1 else [(0, 0, 0, 0)]


def upside_down(p, link):
    L = math.ceil(math.log2(p))
    a, b = link.latency, link.bandwidth
    return a * b * (L - (p - 1) / p) / max(p - 1 - L, 1)


def a_two_left_over(p, link):
    return 2 * with_floor_and_log(p, link)


def tree_without_latency(p, link):
    L = math.ceil(math.log2(p))
    return link.latency * link.bandwidth * (p - 1) / (L - (p - 1) / p)


def volumes_added(p, link):
    L = math.ceil(math.log2(p))
    return link.latency * link.bandwidth * (p - 1 - L) / (L + (p - 1) / p)


def levels(p, link, L):
    return link.latency * link.bandwidth * (p - 1 - L) / (L - (p - 1) / p)


def one_level_more(p, link):
    return levels(p, link, p.bit_length())


def rounded_down(p, link):
    return levels(p, link, math.floor(math.log2(p)))


def rounds_rounded_down(comm, x, root):
    place = (comm.rank - root) % comm.size
    for k in range(math.floor(math.log2(comm.size))):
        hop = 2**k
        if place < hop and place + hop < comm.size:
            comm.send(x, (comm.rank + hop) % comm.size)
        elif hop <= place < 2 * hop:
            x = comm.recv((comm.rank - hop) % comm.size)
    return x


def root_not_added(comm, x, root):
    place, hop = (comm.rank - root) % comm.size, 1
    while hop < comm.size:
        if place < hop and place + hop < comm.size:
            comm.send(x, place + hop)
        elif hop <= place < 2 * hop:
            x = comm.recv(place - hop)
        hop *= 2
    return x


def everybody_sends(comm, x, root):
    hop = 1
    while hop < comm.size:
        comm.send(x, (comm.rank + hop) % comm.size)
        x = comm.recv((comm.rank - hop) % comm.size)
        hop *= 2
    return x


def receives_from_itself(comm, x, root):
    return comm.recv(root) if comm.size == 1 else tree(comm, x, root)


def bruck(comm, x, *, adds=True, first=-1, back=1, turned=1):
    p, r = comm.size, comm.rank
    y = x.reshape(p, -1).roll(-r, 0).clone()
    sizes = [(2**k, min(2**k, p - 2**k)) for k in range((p - 1).bit_length())]
    for hop, n in sizes[::first]:
        got = comm.sendrecv(y[hop : hop + n], (r + hop) % p, (r - hop) % p)
        y[:n] = y[:n] + got if adds else got
    y = y[:1]
    for hop, n in sizes:
        to, source = (r - back * hop) % p, (r + back * hop) % p
        y = torch.cat([y, comm.sendrecv(y[:n], to, source)])
    return y.roll(turned * r, 0).reshape(-1)


def replaced(comm, x):
    return bruck(comm, x, adds=False)


def smallest_hop_first(comm, x):
    return bruck(comm, x, first=1)


def gathered_forwards(comm, x):
    return bruck(comm, x, back=-1)


def turned_the_wrong_way(comm, x):
    return bruck(comm, x, turned=-1)


def partners_by_xor(comm, x):
    p, r = comm.size, comm.rank
    low, high, done = 0, p, []
    y = x.reshape(p, -1).clone()
    while high - low > 1:
        middle = (low + high) // 2
        partner = r ^ (high - middle)
        mine, theirs = (low, middle), (middle, high)
        if r >= middle:
            mine, theirs = theirs, mine
        got = comm.sendrecv(y[slice(*theirs)], partner, partner)
        y[slice(*mine)] += got
        done.append((partner, mine, theirs))
        low, high = mine
    for partner, mine, theirs in reversed(done):
        y[slice(*theirs)] = comm.sendrecv(y[slice(*mine)], partner, partner)
    return y.reshape(-1)


def one_chunk_behind(p):
    return ring(p, lambda r, s: r - s - 1)


def tens(p, link):
    return levels(p, link, math.ceil(math.log10(p)))


def tree_volume_alone(p, link):
    L = math.ceil(math.log2(p))
    return link.latency * link.bandwidth * (p - 1 - L) / L


test_wrong_answers = rejects(
    "05-parallelism/01-collectives",
    [
        Wrong("ring_moves", same_chunk_always, "is then in the sum twice"),
        Wrong("ring_moves", other_direction_of_chunks, "no rank has the whole sum"),
        Wrong("ring_moves", own_chunk_handed_around, "has only"),
        Wrong("ring_moves", first_half_only, "only the first half is there"),
        Wrong("ring_moves", steps_start_again, "sends more than one message"),
        Wrong("ring_moves", to_the_left, "right neighbour only"),
        Wrong("ring_moves", no_modulo, "modulo p"),
        Wrong("ring_moves", one_step_too_many, "steps are 0 … 3"),
        Wrong("ring_moves", without_steps, "four integers"),
        Wrong("ring_moves", rank_zero_only, "only 1 of 3 ranks send"),
        Wrong("crossover", divided, "α / β instead of α · β"),
        Wrong("crossover", not_rounded, "not rounded up"),
        Wrong("crossover", whole_tensor_each_step, "a chunk of n/p"),
        Wrong("crossover", tree_once, "tree is counted once"),
        Wrong("crossover", ring_once, "ring is counted once"),
        Wrong("crossover", negative, "sign"),
        Wrong("crossover", in_bits, "in bits"),
        Wrong("tree_broadcast", root_is_zero, "count places from the root"),
        Wrong("tree_broadcast", star, "takes 7 rounds, where 3 are enough"),
        Wrong("tree_broadcast", star_of_isends, "takes 7 rounds, where 3 are enough"),
        Wrong("tree_broadcast", chain, "takes 7 rounds, where 3 are enough"),
        Wrong("tree_broadcast", the_library, "build it from comm.send"),
        Wrong("tree_broadcast", root_returns_nothing, "the root too"),
        Wrong("tree_broadcast", powers_of_two_only, "with 8 ranks it works"),
        Wrong("tree_broadcast", all_receive_first, "do not fit together"),
        Wrong("tree_broadcast", copies_of_zeros, "on rank 1"),
        Wrong("log_all_reduce", rotated, "in the order of this rank's list"),
        Wrong("log_all_reduce", scatter_only, "the all-gather is missing"),
        Wrong("log_all_reduce", gather_only, "the reduce-scatter is missing"),
        Wrong("log_all_reduce", wrong_order_of_hops, "hops in the order"),
        Wrong("log_all_reduce", ring_of_chunks, "messages one after another"),
        Wrong("log_all_reduce", whole_tensors, "send chunks, never the whole tensor"),
        Wrong(
            "log_all_reduce",
            whole_tensors_hypercube,
            "send chunks, never the whole tensor",
        ),
        Wrong("log_all_reduce", library_all_reduce, "build it from comm.sendrecv"),
        Wrong("log_all_reduce", averaged, "this is the mean"),
        Wrong("ring_moves", steps_from_one, "they begin with 0"),
        Wrong("ring_moves", a_message_to_itself, "sends no message"),
        Wrong("crossover", upside_down, "upside down"),
        Wrong("crossover", a_two_left_over, "a 2 is left over"),
        Wrong("crossover", tree_without_latency, "latencies of the tree"),
        Wrong("crossover", volumes_added, "volumes are added"),
        Wrong("crossover", one_level_more, "bit_length() counts digits"),
        Wrong("crossover", rounded_down, "rounded down"),
        Wrong("tree_broadcast", rounds_rounded_down, "nobody sends to rank"),
        Wrong("tree_broadcast", root_not_added, "with root 0 it works"),
        Wrong("tree_broadcast", everybody_sends, "it has not received yet"),
        Wrong("tree_broadcast", receives_from_itself, "a rank that is alone"),
        Wrong("log_all_reduce", replaced, "it is to be added"),
        Wrong("log_all_reduce", smallest_hop_first, "begins with the largest"),
        Wrong("log_all_reduce", gathered_forwards, "sends 2^k ranks on"),
        Wrong("log_all_reduce", turned_the_wrong_way, "the wrong way at the end"),
        Wrong("log_all_reduce", partners_by_xor, "need a power of two"),
        Wrong("ring_moves", one_chunk_behind, "begins with chunk r"),
        Wrong("crossover", tens, "log₁₀"),
        Wrong("crossover", tree_volume_alone, "the ring's volume is missing"),
    ],
)
