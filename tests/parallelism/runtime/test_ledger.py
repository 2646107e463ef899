"""The ledger's bytes against closed forms, and against the algorithms themselves run
message by message.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.parallelism import Link, World
from llmlab.parallelism.runtime import cost

SIZES = (1, 2, 3, 4, 5, 8)


def ledger(p, fn, **kw):
    world = World(p, **kw)
    world.run(fn)
    return world.ledger


def ring_all_reduce(comm, x):
    """The algorithm itself: p − 1 steps of reduce-scatter, p − 1 of all-gather, a chunk
    to the right each time.
    """
    p, r = comm.size, comm.rank
    pieces = list(x.clone().split(cost.chunks(len(x), p)))
    for step in range(p - 1):
        got = comm.sendrecv(pieces[(r - step) % p], (r + 1) % p, (r - 1) % p)
        pieces[(r - step - 1) % p] = pieces[(r - step - 1) % p] + got
    for step in range(p - 1):
        pieces[(r - step) % p] = comm.sendrecv(
            pieces[(r + 1 - step) % p], (r + 1) % p, (r - 1) % p
        )
    return torch.cat(pieces)


def ring_reduce_scatter(comm, x):
    p, r = comm.size, comm.rank
    pieces = list(x.clone().split(cost.chunks(len(x), p)))
    for step in range(p - 1):
        got = comm.sendrecv(pieces[(r - step - 1) % p], (r + 1) % p, (r - 1) % p)
        pieces[(r - step - 2) % p] = pieces[(r - step - 2) % p] + got
    return pieces[r]


def ring_all_gather(comm, x):
    p, r = comm.size, comm.rank
    pieces = [x] * p
    for step in range(p - 1):
        pieces[(r - step - 1) % p] = comm.sendrecv(
            pieces[(r - step) % p], (r + 1) % p, (r - 1) % p
        )
    return torch.cat(pieces)


def tree_broadcast(comm, x, root):
    p, v = comm.size, (comm.rank - root) % comm.size
    for k in range((p - 1).bit_length()):
        if v < 1 << k and v + (1 << k) < p:
            comm.send(x, (v + (1 << k) + root) % p)
        elif 1 << k <= v < 2 << k:
            x = comm.recv((v - (1 << k) + root) % p)
    return x


@settings(max_examples=20, deadline=None)
@given(p=st.sampled_from(SIZES), n=st.integers(1, 23))
def test_ring_bytes_are_those_of_the_ring(p, n):
    """Each rank of the real ring, uneven chunks included, sends exactly what the ledger
    says.
    """
    x = torch.arange(float(n))
    real = ledger(
        p,
        lambda c: torch.testing.assert_close(
            ring_all_reduce(c, x + c.rank), p * x + p * (p - 1) / 2
        ),
    )
    assert real.per_rank("send") == ledger(p, lambda c: c.all_reduce(x)).per_rank(
        "all_reduce"
    )
    gathered = ledger(p, lambda c: ring_all_gather(c, x[: c.rank + 1]))
    assert gathered.per_rank("send") == ledger(
        p, lambda c: c.all_gather(x[: c.rank + 1])
    ).per_rank("all_gather")
    y = torch.arange(float(p * n))
    scattered = ledger(
        p,
        lambda c: torch.testing.assert_close(
            ring_reduce_scatter(c, y), p * y.chunk(p)[c.rank]
        ),
    )
    assert scattered.per_rank("send") == ledger(
        p, lambda c: c.reduce_scatter(y)
    ).per_rank("reduce_scatter")


@pytest.mark.parametrize("p", SIZES)
@pytest.mark.parametrize("root", [0, 1])
def test_tree_bytes_are_those_of_the_tree(p, root):
    x, root = torch.ones(6), root % p
    real = ledger(p, lambda c: tree_broadcast(c, x, root))
    assert real.per_rank("send") == ledger(
        p, lambda c: c.broadcast(x, root), algorithm="tree"
    ).per_rank("broadcast")


@pytest.mark.parametrize("p", SIZES)
@pytest.mark.parametrize(
    ("op", "call", "closed"),
    [
        ("all_reduce", lambda c, x: c.all_reduce(x), lambda p, n: 2 * (p - 1) * n),
        ("reduce_scatter", lambda c, x: c.reduce_scatter(x), lambda p, n: (p - 1) * n),
        (
            "all_gather",
            lambda c, x: c.all_gather(x.chunk(c.size)[c.rank]),
            lambda p, n: (p - 1) * n,
        ),
        (
            "broadcast",
            lambda c, x: c.broadcast(x, c.size - 1),
            lambda p, n: (p - 1) * n,
        ),
        ("reduce", lambda c, x: c.reduce(x, c.size - 1), lambda p, n: (p - 1) * n),
        (
            "all_to_all",
            lambda c, x: c.all_to_all(list(x.chunk(c.size))),
            lambda p, n: (p - 1) * n,
        ),
        (
            "gather",
            lambda c, x: c.gather(x.chunk(c.size)[c.rank]),
            lambda p, n: (p - 1) * n / p,
        ),
        (
            "scatter",
            lambda c, x: c.scatter(list(x.chunk(c.size)) if c.rank == 0 else None),
            lambda p, n: (p - 1) * n / p,
        ),
        ("barrier", lambda c, x: c.barrier(), lambda p, n: 0),
    ],
)
def test_totals_have_their_closed_form(p, op, call, closed):
    """Summed over ranks, in every algorithm that moves no byte in vain."""
    x = torch.ones(120 * p)
    assert ledger(p, lambda c: call(c, x)).bytes(op) == closed(p, x.numel() * 4)


@pytest.mark.parametrize("p", SIZES[1:])
def test_ring_sends_p_times_less_than_naive_through_one_rank(p):
    x = torch.ones(60 * p)
    ring = ledger(p, lambda c: c.all_reduce(x)).per_rank()
    naive = ledger(p, lambda c: c.all_reduce(x), algorithm="naive").per_rank()
    tree = ledger(p, lambda c: c.all_reduce(x), algorithm="tree")
    n = x.numel() * 4
    assert set(ring) == {2 * (p - 1) * n // p} and max(naive) == (p - 1) * n
    assert tree.bytes() == 2 * (p - 1) * n


@pytest.mark.parametrize("p", SIZES[1:])
def test_naive_bytes(p):
    x = torch.ones(12 * p)
    n = x.numel() * 4

    def run(fn):
        return ledger(p, fn, algorithm="naive").per_rank()

    assert run(lambda c: c.broadcast(x, 1)) == [
        (p - 1) * n if r == 1 else 0 for r in range(p)
    ]
    assert run(lambda c: c.all_gather(x)) == [(p - 1) * n] * p
    assert run(lambda c: c.reduce_scatter(x)) == [n - n // p, *[n] * (p - 1)]


def test_filters_and_table():
    def fn(comm):
        comm.all_reduce(torch.ones(4))
        comm.mesh(2, 2).axes[1].all_gather(torch.ones(2))
        comm.sendrecv(torch.ones(3), comm.rank ^ 1, comm.rank ^ 1)

    out = ledger(4, fn)
    assert out.count("all_reduce") == 4 and out.count("all_reduce", 0) == 1
    assert (
        out.bytes(group=(2, 3), op="all_gather") == 16
        and out.bytes("send", rank=0) == 12
    )
    table = str(out)
    assert "all_reduce" in table and table.splitlines()[-1].split() == [
        "total",
        *[str(24 + 8 + 12)] * 4,
    ]
    assert "nothing sent" in repr(World(2).ledger)
    out.clear()
    assert len(out) == 0


def test_events_say_where():
    event = ledger(2, lambda c: c.all_reduce(torch.ones(2, 3))).events(rank=1)[0]
    assert event.shape == (2, 3) and event.payload == 24 and event.group == (0, 1)
    assert event.site.startswith("test_ledger.py:")


def test_it_draws_itself():
    import matplotlib

    matplotlib.use("Agg")
    out = ledger(
        2, lambda c: (c.work(1.0), c.all_reduce(torch.ones(2))), link=Link(0.1, 8.0)
    )
    assert [p.get_height() for p in out.draw().patches] == [8, 8]
    bars = out.draw(timeline=True).patches
    assert sorted({round(b.get_x() + b.get_width(), 6) for b in bars}) == [1.0, 2.2]


@pytest.mark.parametrize("p", SIZES)
def test_time_is_steps_times_alpha_plus_volume_over_beta(p):
    link, n = Link(0.25, 64.0), 480
    assert cost.seconds("all_reduce", p, n, link) == pytest.approx(
        2 * (p - 1) * 0.25 + 2 * (p - 1) / p * n / 64
    )
    assert cost.seconds("all_reduce", p, n, link, "tree") == pytest.approx(
        2 * math.ceil(math.log2(p)) * (0.25 + n / 64)
    )


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="op='all_sum'"):
        cost.sent("all_sum", 0, [1, 2])
    with pytest.raises(ValueError, match="algorithm='fast'"):
        cost.sent("broadcast", 0, [1, 2], algorithm="fast")
