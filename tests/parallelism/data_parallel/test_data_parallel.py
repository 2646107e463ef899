"""DDP: equal to one process and to torch's DDP; buckets, overlap, accumulation, unused
and tied weights; what travels, and when.
"""

from __future__ import annotations

import glob
import os
import tempfile
import threading
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llmlab.parallelism import DeadlockError, Link, RankFailed, World, launch
from llmlab.parallelism.data_parallel.data_parallel import (
    MIB,
    DataParallel,
    DDPConfig,
    broadcast_state,
    plan_buckets,
    token_share,
    train_step,
)
from llmlab.parallelism.data_parallel.replicate import replicate_step
from llmlab.parallelism.data_parallel.timeline import (
    exposed,
    from_ledger,
    keep_time,
    timeline,
)
from llmlab.parallelism.examples.train_data_parallel import Settings, train
from tests.covering import each_value
from tests.parallelism.conftest import VARIANTS, tiny

SMALL = DDPConfig(bucket_bytes=4000, first_bucket_bytes=500)
MAX_NORM = 0.01  # far below the norms here


def batches(
    p: int, microbatches: int = 2, seed: int = 0
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Microbatches of every rank, all of different lengths, some targets not counted;
    the last rank has one fewer.
    """
    generator = torch.Generator().manual_seed(seed)
    out = []
    for r in range(p):
        mine = []
        for k in range(microbatches - (r == p - 1 and microbatches > 1)):
            tokens = torch.randint(
                37, (1 + (r + k) % 2, 5 + r + 3 * k), generator=generator
            )
            targets = tokens[:, 1:].clone()
            targets[:, : r % 3] = -100
            mine.append((tokens[:, :-1], targets))
        out.append(mine)
    return out


def alone(model: nn.Module, steps: list, lr: float = 0.01, max_norm: float = MAX_NORM):
    """What one process with all the data does: losses, the last gradients, the
    weights.
    """
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=lr), []
    for ranks in steps:
        flat = [mb for mine in ranks for mb in mine]
        N = sum(int((y != -100).sum()) for _, y in flat)
        loss = (
            sum(
                F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
                for x, y in flat
            )
            / N
        )
        optimizer.zero_grad()
        loss.backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), max_norm) > 2 * max_norm, (
            "the clipping must be felt"
        )
        optimizer.step()
        losses.append(loss.item())
    return losses, flat_grads(model), flat_weights(model)


def flat_grads(model):
    return torch.cat([w.grad.flatten() for w in model.parameters()])


def flat_weights(model):
    return torch.cat([w.detach().flatten() for w in model.parameters()])


class Kept(torch.optim.AdamW):
    """AdamW that remembers the gradients of its last step."""

    def step(self):
        self.kept = torch.cat(
            [w.grad.flatten() for g in self.param_groups for w in g["params"]]
        )
        return super().step()


def together(comm, model, steps, config=SMALL, lr=0.01, max_norm=MAX_NORM):
    if comm.rank:  # ranks begin with weights of their own
        with torch.no_grad():
            for w in model.parameters():
                w.normal_()
    ddp = DataParallel(model, comm, config)
    optimizer = Kept(ddp.parameters(), lr=lr)
    losses = [train_step(ddp, optimizer, ranks[comm.rank], max_norm) for ranks in steps]
    return losses, optimizer.kept, flat_weights(model)


# The same as one process --------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "variant"), [*each_value([3, 2], list(VARIANTS)), (1, "gqa"), (6, "gqa")]
)
def test_training_is_that_of_one_process(p, variant):
    """Uneven tokens, uneven numbers of microbatches, clipping, tied weights. In
    float64, but for the norms, which stay in float32.

    Each number of ranks and each kind of model, not all pairs. The second step shows
    the optimizer's state.
    """
    model, steps = (
        tiny(**VARIANTS[variant]).double(),
        [batches(p, seed=s) for s in range(2)],
    )
    right = alone(tiny(**VARIANTS[variant]).double(), steps)
    for got in World(p).run(together, model, steps):
        assert got[0] == pytest.approx(right[0], abs=5e-8)
        torch.testing.assert_close(got[1], right[1], atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(got[2], right[2], atol=1e-5, rtol=1e-5)


@settings(max_examples=12, deadline=None)
@given(
    limit=st.integers(1, 60_000),
    first=st.integers(1, 60_000),
    overlap=st.booleans(),
    p=st.sampled_from((2, 3)),
)
def test_no_bucket_size_changes_the_gradients(limit, first, overlap, p):
    steps = [batches(p)]
    right = alone(tiny().double(), steps)
    config = DDPConfig(limit, first, overlap=overlap)
    for got in World(p).run(together, tiny().double(), steps, config):
        torch.testing.assert_close(got[1], right[1], atol=1e-7, rtol=1e-5)


def against_torch(comm, model, theirs, steps):
    """Ours and torch's DDP on the same uneven data: losses, gradients, weights of both;
    and both lists of buckets.
    """
    ours = together(comm, model, steps, DDPConfig(), lr=1e-3)
    ddp = DistributedDataParallel(theirs)
    optimizer, losses = Kept(ddp.parameters(), lr=1e-3), []
    for ranks in steps:
        mine, total = ranks[comm.rank], torch.zeros(())
        share = token_share(sum(int((y != -100).sum()) for _, y in mine), comm)
        for k, (x, y) in enumerate(mine):
            with nullcontext() if k == len(mine) - 1 else ddp.no_sync():
                loss = F.cross_entropy(
                    ddp(x).flatten(0, 1), y.flatten(), reduction="sum"
                )
                (loss * share).backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(ddp.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((comm.all_reduce(total) * share / comm.size).item())
    return ours, (losses, optimizer.kept, flat_weights(theirs))


@pytest.mark.parametrize("p", [2, 3])
def test_processes_train_as_torchs_ddp_and_as_one_process(p):
    steps = [batches(p, 3, seed=s) for s in range(5)]
    right = alone(tiny(), steps, lr=1e-3)
    for ours, theirs in launch(against_torch, p, tiny(), tiny(), steps, timeout=120):
        for other in (theirs, right):
            assert ours[0] == pytest.approx(other[0], abs=1e-5)
            torch.testing.assert_close(ours[1], other[1], atol=1e-5, rtol=0)
            assert (ours[1] - other[1]).norm() < 1e-4 * other[1].norm(), "and in all"
            # Adam divides by gradients near zero
            torch.testing.assert_close(ours[2], other[2], atol=2e-4, rtol=0)


# Buckets ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    limit=st.integers(1, 400),
    first=st.integers(1, 400),
    halves=st.lists(st.booleans(), min_size=20, max_size=20),
)
def test_buckets_are_torchs(numbers, limit, first, halves):
    dtypes = [
        torch.bfloat16 if half else torch.float32 for half in halves[: len(numbers)]
    ]
    weights = [torch.empty(n, dtype=t) for n, t in zip(numbers, dtypes, strict=True)]
    theirs, _ = dist._compute_bucket_assignment_by_size(weights[::-1], [first, limit])
    ours = plan_buckets([w.nbytes for w in weights], limit, first, dtypes)
    turned = [[len(numbers) - 1 - i for i in bucket] for bucket in theirs]
    assert sorted(ours) == sorted(turned), (
        "the same buckets (torch lists those of several dtypes by their first member)"
    )
    if len(set(dtypes)) == 1:
        assert ours == turned


def rebuilt(comm, model, theirs, limit):
    """After its first steps torch's DDP rebuilds its buckets in the order in which
    gradients came.
    """
    x, y = batches(comm.size, 1)[comm.rank][0]
    ddp = DistributedDataParallel(
        theirs, bucket_cap_mb=None if limit is None else limit / MIB
    )
    ours = DataParallel(model, comm)
    for _ in range(3):
        F.cross_entropy(ddp(x).flatten(0, 1), y.flatten()).backward()
        F.cross_entropy(ours(x).flatten(0, 1), y.flatten()).backward()
        ours.finish()
    plan = plan_buckets(
        [w.nbytes for w in ours.weights],
        limit or 25 * MIB,
        limit or MIB,
        order=ours.arrived,
    )
    said = ddp._get_ddp_logging_data()["rebuilt_per_bucket_param_indices"]
    return plan, [[int(i) for i in bucket.split()] for bucket in said.split(", ")]


@pytest.mark.parametrize("limit", [8192, 40_000, None])
def test_in_the_order_of_arrival_the_buckets_are_those_that_torch_rebuilds(limit):
    big = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "vocab_size": 37,
    }
    if limit is None:
        big |= {"hidden_size": 192, "intermediate_size": 768}
    for ours, theirs in launch(
        rebuilt, 2, tiny(**big), tiny(**big), limit, timeout=120
    ):
        assert ours == theirs and len(ours) > 1


def test_plan_by_hand():
    assert plan_buckets([10, 10, 30, 5, 5], 15) == [[4, 3, 2], [1, 0]]
    assert plan_buckets([10, 10, 30, 5, 5], 15, first=1) == [[4], [3, 2], [1, 0]]
    assert plan_buckets([4, 4, 4], 100) == [[2, 1, 0]] and plan_buckets([], 5) == []
    assert plan_buckets([1, 1, 1, 1], 2, order=[1, 3, 0, 2]) == [[1, 3], [0, 2]]
    assert plan_buckets([1, 1, 1, 1], 2, kinds="abab") == [[3, 1], [2, 0]]


def test_an_order_from_an_earlier_run():
    """With `order=arrived` the buckets fill up one after another, whatever the order of
    the parameters is.
    """
    model = tiny()

    def fn(comm, model):
        x, y = batches(comm.size, 1)[comm.rank][0]
        first = DataParallel(model, comm, SMALL)
        F.cross_entropy(first(x).flatten(0, 1), y.flatten()).backward()
        first.finish()
        first.remove()
        grads, order = flat_grads(model), first.arrived
        model.zero_grad()
        second = DataParallel(model, comm, SMALL, order=order)
        F.cross_entropy(second(x).flatten(0, 1), y.flatten()).backward()
        second.finish()
        assert [i for bucket in second.plan for i in bucket] == second.arrived == order
        torch.testing.assert_close(flat_grads(model), grads)
        return order

    orders = World(2).run(fn, model)
    assert orders[0] == orders[1] and sorted(orders[0]) == list(
        range(len(list(model.parameters())))
    )
    assert orders[0] != sorted(orders[0], reverse=True), (
        "norms come after the matrices that follow them in the list"
    )


# What travels -------------------------------------------------------------------------


def test_accumulation_sends_once():
    def fn(comm, model, k):
        ddp = DataParallel(model, comm, SMALL)
        comm.barrier()
        before = (
            comm.ledger.count("all_reduce", comm.rank),
            comm.ledger.bytes("all_reduce", comm.rank),
        )
        for j, (x, y) in enumerate(batches(2, 5)[0][:k]):
            with nullcontext() if j == k - 1 else ddp.no_sync():
                F.cross_entropy(ddp(x).flatten(0, 1), y.flatten()).backward()
            if j < k - 1:
                assert comm.ledger.count("all_reduce", comm.rank) == before[0]
        ddp.finish()
        return comm.ledger.bytes("all_reduce", comm.rank) - before[
            1
        ], comm.ledger.count("all_reduce", comm.rank)

    model = tiny()
    one, four = World(2).run(fn, model, 1), World(2).run(fn, model, 4)
    # 2 (p−1)/p · n with p = 2
    assert one == four and one[0][0] == sum(w.nbytes for w in model.parameters())
    assert one[0][1] == len(
        DataParallel(model, World(1).run(lambda c: c)[0], SMALL).plan
    )


def test_weights_and_buffers_are_those_of_rank_0():
    def fn(comm):
        torch.manual_seed(comm.rank)
        model = nn.Sequential(
            nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2).to(torch.bfloat16)
        )
        model[1].running_mean.normal_()
        model[1].num_batches_tracked.fill_(7 + comm.rank)
        broadcast_state(model, comm, limit=40)
        return {n: t.clone() for n, t in model.state_dict().items()}

    states = World(3).run(fn)
    assert all(
        torch.equal(states[0][n], other[n]) for other in states for n in states[0]
    )
    torch.manual_seed(0)
    assert torch.equal(states[0]["0.weight"], nn.Linear(3, 5).weight)
    assert states[2]["1.num_batches_tracked"] == 7


def test_mixed_dtypes_travel_in_buckets_of_their_own():
    def fn(comm):
        torch.manual_seed(0)
        model = nn.ModuleList(
            [nn.Linear(4, 4), nn.Linear(4, 4).to(torch.bfloat16), nn.Linear(4, 4)]
        )
        ddp = DataParallel(model, comm)
        x = torch.ones(2, 4) * (comm.rank + 1)
        (
            model[0](x).sum() + model[1](x.bfloat16()).sum().float() + model[2](x).sum()
        ).backward()
        ddp.finish()
        return [len(ddp.plan), *(m.weight.grad for m in model)]

    for count, a, b, c in World(3).run(fn):
        assert count == 2 and b.dtype == torch.bfloat16
        assert (
            torch.equal(a, torch.full((4, 4), 4.0))
            and torch.equal(b.float(), a)
            and torch.equal(c, a)
        )


# Without a gradient -------------------------------------------------------------------


class Branches(nn.Module):
    """Three linears; which of them is used is said at each call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.branch = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x, use):
        return sum(self.branch[i](x) for i in use)


def some_unused(comm, make, finish):
    """Rank 0 uses branch 0 and 1, the others branch 0 only; nobody uses branch 2."""
    model = Branches()
    ddp = make(model)
    x = torch.ones(2, 3) * (comm.rank + 1)
    ddp(x, (0, 1) if comm.rank == 0 else (0,)).square().sum().backward()
    finish(ddp)
    return [w.grad for w in model.parameters()]


def both_unused(comm):
    config = DDPConfig(bucket_bytes=1, first_bucket_bytes=1, find_unused=True)
    ours = some_unused(
        comm, lambda m: DataParallel(m, comm, config), lambda d: d.finish()
    )
    theirs = some_unused(
        comm,
        lambda m: DistributedDataParallel(m, find_unused_parameters=True),
        lambda d: None,
    )
    return ours, theirs


@pytest.mark.parametrize("p", [2, 3])
def test_unused_parameters_as_in_torchs_ddp(p):
    for ours, theirs in launch(both_unused, p, timeout=60):
        assert (
            [g is None for g in ours]
            == [g is None for g in theirs]
            == [False] * 4 + [True] * 2
        )
        for a, b in zip(ours[:4], theirs[:4], strict=True):
            torch.testing.assert_close(a, b)
        assert ours[2].abs().sum() > 0, "only rank 0 had one: its share of the mean"


def test_an_unused_parameter_is_named():
    def fn(comm):
        some_unused(
            comm,
            lambda m: DataParallel(m, comm),
            lambda d: d.finish() if comm.rank else comm.barrier(),
        )

    with pytest.raises(
        RuntimeError,
        match=(
            r"no gradient came for branch\.1\.weight, branch\.1\.bias,"
            r" branch\.2\.weight …"
        ),
    ):
        World(3).run(fn)


def test_a_rank_without_data_takes_part():
    """Ten rows do not fill twelve ranks: those without any send zeros, and the mean
    over tokens is still right.
    """
    steps = [[*batches(3), [], []] for _ in range(2)]
    right = alone(tiny().double(), steps)
    config = DDPConfig(4000, 500, find_unused=True)
    for got in World(5).run(together, tiny().double(), steps, config):
        assert got[0] == pytest.approx(right[0], abs=1e-6)
        torch.testing.assert_close(got[2], right[2], atol=1e-5, rtol=1e-5)


def test_frozen_weights_stay_at_home():
    def fn(comm):
        model = Branches()
        model.branch[1].requires_grad_(False)
        ddp = DataParallel(model, comm)
        ddp(torch.ones(1, 3) * comm.rank, (0, 1, 2)).sum().backward()
        ddp.finish()
        return (
            len(ddp.weights),
            model.branch[1].weight.grad,
            model.branch[0].weight.grad,
        )

    for count, none, mean in World(3).run(fn):
        assert count == 4 and none is None and torch.equal(mean, torch.ones(3, 3))


# When ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "overlap", "p"),
    [*each_value([1, 5_000, 10**9], [True], [2, 8, 3]), (5_000, False, 3)],
)
def test_the_timeline_is_what_the_hooks_do(p, overlap, limit):
    """The formula against the virtual clock of ranks that run a real backward with the
    real hooks. Each value, not all products of them.
    """
    link, model = Link(1e-3, 1e6), tiny()
    seconds = {n: 1e-6 * (w.numel() + 50) for n, w in model.named_parameters()}

    def fn(comm, model):
        keep_time(model, comm, seconds)
        ddp = DataParallel(model, comm, DDPConfig(limit, limit, overlap=overlap))
        x, y = batches(1, 1)[0][0]
        loss = F.cross_entropy(ddp(x).flatten(0, 1), y.flatten())
        comm.work(0.002, "head")
        loss.backward()
        ddp.finish()
        return ddp.plan, ddp.arrived

    world = World(p, link=link)
    plan, order = world.run(fn, model)[0]
    nbytes = [w.nbytes for w in model.parameters()]
    spans = timeline(
        list(seconds.values()),
        nbytes,
        plan,
        p,
        link,
        overlap=overlap,
        before=0.002,
        order=order,
    )
    real = from_ledger(world.ledger)
    assert [s.lane for s in sorted(real, key=lambda s: s.lane != "backward")] == [
        s.lane for s in spans
    ]
    for lane in ("backward", "all-reduce"):
        a, b = (
            [(s.start, s.end) for s in found if s.lane == lane]
            for found in (real, spans)
        )
        assert [t for s in a for t in s] == pytest.approx([t for s in b for t in s])
    assert exposed(real) == pytest.approx(exposed(spans)) and exposed(real) > 0


def test_overlap_hides_all_but_the_last_bucket():
    """Ten equal parameters whose all-reduce is as long as their backward: 1 of 10 stays
    visible; one bucket shows all.
    """
    link, n = Link(0.0, 1.0), [1] * 10
    seconds = [1.0] * 10
    p = 2  # 2 (p−1)/p = 1: a byte per second
    each = [[i] for i in range(9, -1, -1)]
    assert exposed(timeline(seconds, n, each, p, link)) == 1.0
    assert exposed(timeline(seconds, n, each, p, link, overlap=False)) == 10.0
    assert exposed(timeline(seconds, n, [list(range(10))], p, link)) == 10.0
    slow = Link(1.0, 1.0)  # now each message costs 2 s more
    assert exposed(timeline(seconds, n, each, p, slow)) == 21.0
    assert exposed(timeline(seconds, n, plan_buckets(n, 5), p, slow)) == 9.0, (
        "2 messages: 5 + 7 + 7 − 10"
    )


# The older way ------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, 3])
def test_replicate_and_gather(p):
    """Seven rows on p ranks: gradients of the whole batch, on the owner; every byte of
    weights and outputs is counted.
    """
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
        torch.randn(7, 4),
        torch.arange(7) % 3,
    )

    def fn(comm, model):
        owner = comm.rank == 0
        if not owner:
            nn.init.zeros_(model[0].weight)
        loss = replicate_step(
            comm, model, x if owner else None, y if owner else None, F.cross_entropy
        )
        return loss, [w.grad for w in model.parameters()]

    world = World(p, algorithm="naive")
    results = world.run(fn, model)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    assert results[0][0] == pytest.approx(loss.item())
    for got, w in zip(results[0][1], model.parameters(), strict=True):
        torch.testing.assert_close(got, w.grad)
    assert all(r[0] is None and r[1] == [None] * 4 for r in results[1:])
    weights, rows = (
        sum(w.nbytes for w in model.parameters()),
        [len(t) for t in x.tensor_split(p)],
    )
    away = sum(rows[1:])
    assert world.ledger.bytes(rank=0) == (p - 1) * weights + away * (4 + 3) * 4
    assert [world.ledger.bytes(rank=r) for r in range(1, p)] == [
        weights + n * 3 * 4 for n in rows[1:]
    ]


# Refusals, and what is left behind ----------------------------------------------------


def test_a_second_backward_is_refused():
    def fn(comm):
        ddp = DataParallel(nn.Linear(2, 2), comm)
        for _ in range(2):
            ddp(torch.ones(1, 2)).sum().backward()

    with pytest.raises(
        RuntimeError, match=r"bias got a second gradient|weight got a second gradient"
    ):
        World(1).run(fn)


def test_ranks_that_differ_are_a_deadlock_not_a_silence():
    def fn(comm):
        ddp = DataParallel(nn.Linear(2, 2), comm)
        ddp(torch.ones(1, 2)).sum().backward()
        if comm.rank:
            ddp.finish()
            comm.barrier()

    with pytest.raises(DeadlockError):
        World(2).run(fn)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="bucket_bytes=0 must be at least 1"):
        DDPConfig(bucket_bytes=0)
    with pytest.raises(
        ValueError, match=r"order=\[0, 0\] must name each of the 2 parameters once"
    ):
        plan_buckets([1, 2], 3, order=[0, 0])
    with pytest.raises(ValueError, match="tokens=0 on every rank"):
        World(2).run(lambda comm: token_share(0, comm))


def test_hooks_come_off():
    def fn(comm):
        model = nn.Linear(2, 2)
        ddp = DataParallel(model, comm)
        ddp.remove()
        model(torch.ones(1, 2)).sum().backward()
        return comm.ledger.count("all_reduce")

    assert World(2).run(fn) == [0, 0]


def test_nothing_is_left_behind():
    before = (
        set(glob.glob(os.path.join(tempfile.gettempdir(), "llmlab-launch-*"))),
        threading.active_count(),
    )
    sockets = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    launch(train, 2, Settings(steps=1), timeout=60)
    World(3).run(train, Settings(steps=1))
    with pytest.raises(RankFailed):
        launch(
            lambda comm: DataParallel(nn.Linear(2, 2 + comm.rank), comm), 2, timeout=20
        )
    after = set(glob.glob(os.path.join(tempfile.gettempdir(), "llmlab-launch-*")))
    assert after <= before[0] and threading.active_count() == before[1]
    if sockets:
        assert len(os.listdir("/proc/self/fd")) <= sockets
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


# The example --------------------------------------------------------------------------


def test_the_example_learns_the_same_however_many_ranks_share_the_batch():
    right = World(1).run(train, Settings(accumulate=6))[0]
    for p, batch, accumulate, bucket in (
        (2, 2, 3, 25.0),
        (3, 4, 1, 0.01),
        (6, 2, 1, 0.1),
    ):
        settings = Settings(batch=batch, accumulate=accumulate, bucket_mib=bucket)
        for losses in World(p).run(train, settings):
            assert losses == pytest.approx(right, abs=1e-4)
    for losses in launch(train, 2, Settings(accumulate=3), timeout=60):
        assert losses == pytest.approx(right, abs=1e-4)
