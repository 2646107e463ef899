"""Schedules of collectives: on paper (who holds whose part), on World against the
meaning, on gloo against torch.distributed.
"""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.parallelism import Link, World, launch
from llmlab.parallelism.collectives import bruck, halving, ring, tree
from llmlab.parallelism.collectives import schedule as run
from llmlab.parallelism.collectives.schedule import Move
from llmlab.parallelism.runtime import cost

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 13, 16)
ALL_REDUCES = {
    "ring": ring.all_reduce,
    "tree": tree.all_reduce,
    "halving": halving.all_reduce,
    "halving, far first": lambda p: halving.all_reduce(p, near_first=False),
    "doubling": halving.all_reduce_doubling,
    "bruck": bruck.all_reduce,
}


def powers(p):
    return p & (p - 1) == 0


def reduce_scatters(p):
    far = (
        [halving.reduce_scatter(p), halving.reduce_scatter(p, near_first=False)]
        if powers(p)
        else []
    )
    return [ring.reduce_scatter(p), bruck.reduce_scatter(p), *far]


def all_gathers(p):
    far = (
        [halving.all_gather(p), halving.all_gather(p, near_first=True)]
        if powers(p)
        else []
    )
    return [ring.all_gather(p), bruck.all_gather(p), *far]


def follow(schedule, held):
    """Play a schedule with labels for numbers: held[rank][chunk] is a Counter of whose
    parts are in it.
    """
    for step in range(run.steps(schedule)):
        now = [m for m in schedule if m.step == step]
        letters = [(m, {c: held[m.src][c].copy() for c in m.chunks}) for m in now]
        for m, letter in letters:
            for c, parts in letter.items():
                held[m.dst][c] = held[m.dst][c] + parts if m.add else parts
    return held


def everyone(p):
    return Counter(range(p))


# On paper -----------------------------------------------------------------------------


@pytest.mark.parametrize("p", SIZES)
def test_in_a_step_a_rank_sends_one_message_and_receives_one(p):
    schedules = (
        [f(p) for f in ALL_REDUCES.values()] + reduce_scatters(p) + all_gathers(p)
    )
    schedules += [
        ring.all_to_all(p),
        bruck.all_to_all(p),
        tree.scatter(p, p - 1),
        tree.gather(p, p // 2),
    ]
    schedules += [
        tree.broadcast(p, p // 2),
        tree.reduce(p, p - 1),
        ring.broadcast(p, 4, p - 1),
    ]
    for schedule in schedules:
        for side in ("src", "dst"):
            busy = Counter((m.step, getattr(m, side)) for m in schedule)
            assert not busy or max(busy.values()) == 1
        assert all(
            m.src != m.dst and 0 <= m.src < p and 0 <= m.dst < p and m.chunks
            for m in schedule
        )
        assert sorted({m.step for m in schedule}) == list(range(run.steps(schedule))), (
            "no idle step"
        )


@pytest.mark.parametrize("name", ALL_REDUCES)
@pytest.mark.parametrize("p", SIZES)
def test_an_all_reduce_adds_each_part_once(name, p):
    schedule = ALL_REDUCES[name](p)
    n = run.pieces(schedule)
    held = follow(schedule, [{c: Counter([r]) for c in range(n)} for r in range(p)])
    assert all(held[r][c] == everyone(p) for r in range(p) for c in range(n))


@pytest.mark.parametrize("p", SIZES)
def test_halves_of_an_all_reduce(p):
    for schedule in reduce_scatters(p):
        held = follow(schedule, [{c: Counter([r]) for c in range(p)} for r in range(p)])
        assert all(held[r][r] == everyone(p) for r in range(p))
    for schedule in all_gathers(p):
        held = follow(schedule, [{r: Counter([r])} for r in range(p)])
        assert all(held[r] == {c: Counter([c]) for c in range(p)} for r in range(p))


@pytest.mark.parametrize("p", SIZES)
def test_roots(p):
    for root in range(p):
        start = [{c: Counter([r]) for c in range(p)} for r in range(p)]
        for schedule, n in (
            (tree.broadcast(p, root), 1),
            (ring.broadcast(p, 3, root), 3 if p > 1 else 1),
        ):
            held = follow(
                schedule,
                [
                    {c: Counter("x") for c in range(n)} if r == root else {}
                    for r in range(p)
                ],
            )
            assert all(held[r] == {c: Counter("x") for c in range(n)} for r in range(p))
        assert follow(tree.reduce(p, root), [{0: Counter([r])} for r in range(p)])[
            root
        ][0] == everyone(p)
        held = follow(
            tree.scatter(p, root), [start[root] if r == root else {} for r in range(p)]
        )
        assert all(held[r][r] == Counter([root]) for r in range(p))
        held = follow(tree.gather(p, root), [{r: Counter([r])} for r in range(p)])
        assert held[root] == {r: Counter([r]) for r in range(p)}


@pytest.mark.parametrize("p", SIZES)
def test_steps_and_bytes_are_those_of_the_papers(p):
    """Thakur et al. 2005: (p−1)α + (p−1)/p nβ for the ring, lg p α for halving,
    doubling and Bruck, and so on.
    """
    L, down = math.ceil(math.log2(p)), math.floor(math.log2(p))
    n = 840 * p * 2**down
    part = (p - 1) / p * n
    folds = 0 if powers(p) else 2

    def volume(schedule):
        return run.seconds(schedule, cost.chunks(n, run.pieces(schedule)), Link(0, 1))

    for schedule, step, bytes_ in (
        (ring.all_reduce(p), 2 * (p - 1), 2 * part),
        (ring.reduce_scatter(p), p - 1, part),
        (ring.all_gather(p), p - 1, part),
        (tree.broadcast(p), L, L * n),
        (tree.reduce(p), L, L * n),
        (tree.all_reduce(p), 2 * L, 2 * L * n),
        (bruck.all_gather(p), L, part),
        (bruck.all_reduce(p), 2 * L, 2 * part),
        (
            halving.all_reduce(p),
            2 * down + folds,
            2 * (2**down - 1) / 2**down * n + folds * n,
        ),
        (halving.all_reduce_doubling(p), down + folds, (down + folds) * n),
    ):
        assert run.steps(schedule) == step
        assert volume(schedule) == pytest.approx(bytes_ if p > 1 else 0)
    if p > 1:
        assert run.steps(ring.broadcast(p, 12)) == p + 10
        assert volume(ring.broadcast(p, 12)) == pytest.approx((p + 10) / 12 * n)
    each = Link(0, 1)  # chunks of n/p numbers, and for an all-to-all of n/p²
    if powers(p):
        assert run.seconds(tree.scatter(p), [n / p] * p, each) == pytest.approx(part)
        assert run.seconds(
            bruck.all_to_all(p), [n / p**2] * p**2, each
        ) == pytest.approx(L * n / p / 2)
    assert run.seconds(ring.all_to_all(p), [n / p**2] * p**2, each) == pytest.approx(
        part / p
    )


@pytest.mark.parametrize("p", SIZES)
def test_the_cost_model_counts_these_messages(p):
    """`cost.sent` and `cost.steps_and_volume` against the schedules, uneven chunks
    included.
    """
    sizes = [4 * (3 + (5 * r) % 7) for r in range(p)]
    for root in range(p):
        for op, schedule in (
            ("scatter", tree.scatter(p, root)),
            ("gather", tree.gather(p, root)),
        ):
            assert run.bytes_sent(schedule, sizes, p) == [
                cost.sent(op, r, sizes, root, "tree") for r in range(p)
            ]
    for op, schedule in (
        ("all_gather", bruck.all_gather(p)),
        ("reduce_scatter", bruck.reduce_scatter(p)),
    ):
        assert run.bytes_sent(schedule, sizes, p) == [
            cost.sent(op, r, sizes, 0, "halving") for r in range(p)
        ]
    for op, schedule in (
        ("all_gather", ring.all_gather(p)),
        ("reduce_scatter", ring.reduce_scatter(p)),
    ):
        assert run.bytes_sent(schedule, sizes, p) == [
            cost.sent(op, r, sizes) for r in range(p)
        ]
    assert run.bytes_sent(ring.all_reduce(p), sizes, p) == [
        cost.sent("all_reduce", r, sizes) for r in range(p)
    ]
    q = run.pieces(halving.all_reduce(p))
    even = sizes if p == q else cost.chunks(sum(sizes), q)
    assert run.bytes_sent(halving.all_reduce(p), even, p) == [
        cost.sent("all_reduce", r, sizes, 0, "halving") for r in range(p)
    ]
    link, n = Link(0.5, 3.0), 48 * p * q
    for algorithm, schedule in (("ring", ring), ("tree", tree), ("halving", halving)):
        moves = schedule.all_reduce(p)
        assert run.seconds(
            moves, cost.chunks(n, run.pieces(moves)), link
        ) == pytest.approx(cost.seconds("all_reduce", p, n, link, algorithm))
    for op, moves in (
        ("all_gather", bruck.all_gather(p)),
        ("reduce_scatter", bruck.reduce_scatter(p)),
    ):
        assert run.seconds(moves, cost.chunks(n, p), link) == pytest.approx(
            cost.seconds(op, p, n, link, "halving")
        )


@pytest.mark.parametrize("p", [1, 2, 3, 6, 8])
def test_no_all_reduce_sends_less_than_the_ring(p):
    """Patarasuk & Yuan's bound, 2 (p−1) n over all ranks: met by four of the six,
    missed by those that send whole tensors.
    """
    n = 48 * p * 8
    total = {
        name: sum(run.bytes_sent(f(p), cost.chunks(n, run.pieces(f(p))), p))
        for name, f in ALL_REDUCES.items()
    }
    assert (
        min(total.values())
        == 2 * (p - 1) * n
        == total["ring"]
        == total["tree"]
        == total["bruck"]
    )
    most = {
        name: max(run.bytes_sent(f(p), cost.chunks(n, run.pieces(f(p))), p))
        for name, f in ALL_REDUCES.items()
    }
    assert min(most.values()) == most["ring"] == most["bruck"] == 2 * (p - 1) * n // p
    assert (most["halving"] == most["ring"]) == (powers(p))


def test_where_messages_share_a_wire():
    link, sizes = Link(0.0, 1.0), [1.0] * 8

    def ask(f, route):
        return run.seconds(f, sizes, link, route)

    cables = run.cable_ring(8)
    assert (
        cables(0, 2) == [(0, 1), (1, 1)]
        and cables(0, 6) == [(0, -1), (7, -1)]
        and len(cables(0, 4)) == 4
    )
    assert (
        ask(ring.all_reduce(8), cables) == ask(ring.all_reduce(8), run.crossbar) == 14
    )
    near, far = halving.all_reduce(8), halving.all_reduce(8, near_first=False)
    assert ask(near, run.crossbar) == ask(far, run.crossbar) == 14
    # n/2 to a neighbour; two of n/4 on a cable; four of n/8
    assert ask(near, cables) == 2 * (4 + 4 + 4)
    assert ask(far, cables) == 2 * (4 * 4 + 2 * 2 + 1)
    card = run.shared_card(4)
    assert card(0, 3) == [(0, 3)] and card(3, 4) == [("out", 0), ("in", 1)]
    assert ask(ring.all_reduce(8), card) == 14, "one message at a time crosses"
    assert ask(near, card) == 2 * (4 + 2 + 4) and ask(far, card) == 2 * (4 * 4 + 2 + 1)


# On World -----------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    p=st.sampled_from((1, 2, 3, 5, 6, 8)),
    shape=st.lists(st.integers(1, 5), max_size=3),
    seed=st.integers(0, 99),
)
def test_all_reduce_is_the_sum(p, shape, seed):
    xs = list(
        torch.randint(
            -9, 9, (p, *shape), generator=torch.Generator().manual_seed(seed)
        ).float()
    )
    stack = torch.stack(xs)
    op, right = [("sum", stack.sum(0)), ("max", stack.amax(0)), ("min", stack.amin(0))][
        seed % 3
    ]
    name = list(ALL_REDUCES)[seed % len(ALL_REDUCES)]
    schedule = ALL_REDUCES[name](p)
    world = World(p)
    for got in world.run(
        lambda comm: run.all_reduce(comm, xs[comm.rank], schedule, op)
    ):
        assert torch.equal(got, right)
    sizes = [4 * c for c in cost.chunks(stack[0].numel(), run.pieces(schedule))]
    assert world.ledger.per_rank("send") == run.bytes_sent(schedule, sizes, p)


@pytest.mark.parametrize("p", [1, 2, 3, 5, 6, 8])
def test_the_others_are_what_they_mean(p):
    xs = [torch.arange(11.0) * (r + 1) for r in range(p)]
    lengths = [(3 * r + 1) % 4 for r in range(p)]  # a 0 among them
    ys = [torch.full((n,), float(r)) for r, n in enumerate(lengths)]
    table = [[(i + 2 * j) % 4 for j in range(p)] for i in range(p)]
    root = p - 1

    def fn(comm):
        r = comm.rank
        out = {"broadcast": run.broadcast(comm, xs[r], tree.broadcast(p, root), root)}
        out["chain"] = run.broadcast(comm, xs[r], ring.broadcast(p, 4, root), root)
        out["reduce"] = run.reduce(comm, xs[r], tree.reduce(p, root), root)
        out["gather"] = run.gather(comm, ys[r], tree.gather(p, root), lengths, root)
        out["scatter"] = run.scatter(
            comm, ys if r == root else None, tree.scatter(p, root), lengths
        )
        out["reduce_scatter"] = [
            run.reduce_scatter(comm, xs[r], s) for s in reduce_scatters(p)
        ]
        out["all_gather"] = [
            run.all_gather(comm, ys[r], s, lengths) for s in all_gathers(p)
        ]
        for name, how in (("pairwise", ring), ("bruck", bruck)):
            mine = [torch.full((n,), 10.0 * r + j) for j, n in enumerate(table[r])]
            out[name] = run.all_to_all(comm, mine, how.all_to_all(p), table)
        return out

    total = torch.stack(xs).sum(0)
    for r, out in enumerate(World(p).run(fn)):
        assert torch.equal(out["broadcast"], xs[root]) and torch.equal(
            out["chain"], xs[root]
        )
        if r == root:
            assert torch.equal(out["reduce"], total) and all(
                map(torch.equal, out["gather"], ys)
            )
        else:
            assert out["reduce"] is None and out["gather"] is None
        assert torch.equal(out["scatter"], ys[r])
        assert all(
            torch.equal(got, total.split(cost.chunks(11, p))[r])
            for got in out["reduce_scatter"]
        )
        assert all(torch.equal(got, torch.cat(ys)) for got in out["all_gather"])
        for name in ("pairwise", "bruck"):
            for i, got in enumerate(out[name]):
                assert torch.equal(got, torch.full((table[i][r],), 10.0 * i + r))


@pytest.mark.parametrize("p", [1, 6])
def test_inputs_are_left_alone_and_outputs_are_ones_own(p):
    def fn(comm):
        x, held = torch.ones(6 * p), {comm.rank: torch.ones(2)}
        parts = list(x.split(6))
        out = [run.all_reduce(comm, x, f(p)) for f in ALL_REDUCES.values()]
        out += [
            run.reduce_scatter(comm, x, ring.reduce_scatter(p)),
            run.broadcast(comm, x, tree.broadcast(p)),
        ]
        out += [
            run.scatter(
                comm, parts if comm.rank == 0 else None, tree.scatter(p), [6] * p
            )
        ]
        out += run.all_to_all(comm, parts, ring.all_to_all(p), [[6] * p] * p)
        out += run.gather(comm, parts[0], tree.gather(p), [6] * p) or []
        run.perform(comm, ring.all_gather(p), held, [2] * p)
        for y in out:
            y.zero_()
        assert torch.equal(x, torch.ones(6 * p)) and list(held) == [comm.rank]

    World(p).run(fn)


@pytest.mark.parametrize("p", [3, 6, 8])
def test_the_clock_of_the_world_is_the_formula(p):
    link, x = Link(0.25, 64.0), torch.zeros(48 * p)
    for f in (ring.all_reduce, tree.all_reduce, halving.all_reduce, bruck.all_reduce):
        world = World(p, link=link)
        world.run(lambda comm, f=f: run.all_reduce(comm, x, f(p)))
        sizes = [4 * c for c in cost.chunks(len(x), run.pieces(f(p)))]
        assert world.ledger.time == pytest.approx(run.seconds(f(p), sizes, link))


def test_a_world_that_counts_halving():
    world, n = World(8, algorithm="halving", link=Link(1.0, 1e9)), 64 * 4
    world.run(lambda comm: comm.all_reduce(torch.ones(64)))
    assert world.ledger.per_rank() == [
        2 * 7 * n // 8
    ] * 8 and world.ledger.time == pytest.approx(6, abs=1e-3)


# On gloo ------------------------------------------------------------------------------


F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
I32, I64 = torch.int32, torch.int64
OPS = ("sum", "max", "min")


def against_torch(comm, dtypes):
    """Each operation through our messages and through torch.distributed, on the same
    tensors; pairs to compare.

    A schedule does not look at numbers. So each all-reduce meets each op in the first
    dtype, and in every other one an op which differs from dtype to dtype.
    """
    p, r, pairs = comm.size, comm.rank, []
    root = p - 1

    def clones(x):
        return [torch.empty_like(x) for _ in range(p)]

    for number, dtype in enumerate(dtypes):
        x = (torch.arange(23) % 7 * (r + 1) - 5).to(dtype)
        for i, op in enumerate(OPS):
            theirs = x.clone()
            dist.all_reduce(theirs, getattr(dist.ReduceOp, op.upper()))
            for k, schedule in enumerate(ALL_REDUCES.values()):
                if number == 0 or (k + number) % len(OPS) == i:
                    pairs.append((run.all_reduce(comm, x, schedule(p), op), theirs))
        theirs = x.clone()
        dist.broadcast(theirs, root)
        pairs += [
            (run.broadcast(comm, x, s, root), theirs)
            for s in (tree.broadcast(p, root), ring.broadcast(p, 4, root))
        ]
        theirs = x.clone()
        dist.reduce(theirs, root)
        ours = run.reduce(comm, x, tree.reduce(p, root), root)
        pairs += [(ours, theirs)] if r == root else []
        everybody = clones(x) if r == root else None
        dist.gather(x, everybody, root)
        ours = run.gather(comm, x, tree.gather(p, root), [23] * p, root)
        pairs += list(zip(ours, everybody, strict=True)) if r == root else []
        theirs, parts = (
            torch.empty_like(x),
            [x * i for i in range(p)] if r == root else None,
        )
        dist.scatter(theirs, parts, root)
        pairs += [(run.scatter(comm, parts, tree.scatter(p, root), [23] * p), theirs)]
        theirs, whole = x.new_empty(6), x.repeat(p)[: 6 * p].contiguous()
        dist.reduce_scatter(theirs, [c.contiguous() for c in whole.chunk(p)])
        pairs += [
            (run.reduce_scatter(comm, whole, s), theirs) for s in reduce_scatters(p)
        ]
        mine, lengths = x[: 2 * r + 1], [2 * i + 1 for i in range(p)]
        # torch's gloo wants one length: padded and cut there
        theirs = comm.all_gather(mine)
        pairs += [
            (run.all_gather(comm, mine, s, lengths), theirs) for s in all_gathers(p)
        ]
        table = [[(i + 2 * j) % 4 for j in range(p)] for i in range(p)]
        give, take = table[r], [row[r] for row in table]
        out, theirs = (
            x[: sum(give)] if sum(give) <= 23 else x.repeat(2)[: sum(give)],
            x.new_empty(sum(take)),
        )
        dist.all_to_all_single(theirs, out, take, give)
        for how in (ring, bruck):
            ours = run.all_to_all(comm, list(out.split(give)), how.all_to_all(p), table)
            pairs += [(torch.cat(ours), theirs)]
    return pairs


DTYPES = {
    2: (F32, F64, BF16, I64, I32),
    3: (F32, F64, BF16, I64, I32),
    5: (F32, I32),
    6: (F32, BF16),
    8: (F32, I64),
}


@pytest.mark.parametrize("p", DTYPES)
def test_gloo_processes_agree_with_torch_distributed(p):
    dtypes = DTYPES[p]
    for rank, pairs in enumerate(launch(against_torch, p, dtypes, timeout=120)):
        assert len(pairs) >= 12 + 15 * len(dtypes)
        for i, (ours, theirs) in enumerate(pairs):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs), f"pair {i} of rank {rank} of {p}"


# Refusals -----------------------------------------------------------------------------


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="p=6 must be a power of two"):
        halving.reduce_scatter(6)
    with pytest.raises(ValueError, match="op='mean' must be one of"):
        World(2).run(
            lambda comm: run.all_reduce(comm, torch.ones(2), ring.all_reduce(2), "mean")
        )
    with pytest.raises(KeyError):  # rank 0 sends what it does not have
        World(2).run(
            lambda comm: run.perform(
                comm, [Move(0, 0, 1, (7,))], {0: torch.ones(1)}, [1] * 8
            )
        )


def test_it_draws_itself():
    import matplotlib

    matplotlib.use("Agg")
    ax = run.draw(halving.all_reduce(4), 4)
    assert len(ax.texts) == len(halving.all_reduce(4)) == 16
