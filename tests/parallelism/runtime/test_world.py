"""World: collectives against mathematics, determinism, and what is said when ranks do
not fit together.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.parallelism import CollectiveMismatch, DeadlockError, Link, World

SIZES = (1, 2, 3, 4, 5, 8)


def inputs(p: int, shape: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    return list(
        torch.randint(
            -9, 9, (p, *shape), generator=torch.Generator().manual_seed(seed)
        ).float()
    )


@settings(max_examples=25, deadline=None)
@given(
    p=st.sampled_from(SIZES),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_collectives_are_what_mathematics_says(p, shape, seed):
    xs = inputs(p, (p * shape[0], *shape[1:]), seed)
    root, stack = seed % p, torch.stack(xs)

    def fn(comm):
        x = xs[comm.rank]
        assert torch.equal(comm.all_reduce(x), stack.sum(0))
        assert torch.equal(comm.all_reduce(x, "max"), stack.amax(0))
        assert torch.equal(comm.all_reduce(x, "min"), stack.amin(0))
        assert torch.allclose(comm.all_reduce(x, "mean"), stack.mean(0))
        assert torch.equal(comm.broadcast(x, root), xs[root])
        assert torch.equal(comm.all_gather(x, dim=-1), torch.cat(xs, -1))
        assert torch.equal(comm.reduce_scatter(x), stack.sum(0).chunk(p)[comm.rank])
        reduced, gathered = comm.reduce(x, root), comm.gather(x, root)
        if comm.rank == root:
            assert torch.equal(reduced, stack.sum(0)) and all(
                map(torch.equal, gathered, xs)
            )
        else:
            assert reduced is None and gathered is None
        assert torch.equal(comm.scatter(xs if comm.rank == root else None, root), x)
        got = comm.all_to_all(list(x.chunk(p)))
        assert all(
            torch.equal(part, xs[r].chunk(p)[comm.rank]) for r, part in enumerate(got)
        )

    World(p).run(fn)


@pytest.mark.parametrize("p", SIZES)
def test_uneven_lengths(p):
    def fn(comm):
        r = comm.rank
        gathered = comm.all_gather(torch.full((2, r), float(r)), dim=1)
        assert torch.equal(
            gathered, torch.cat([torch.full((2, i), float(i)) for i in range(p)], 1)
        )
        got = comm.all_to_all(
            [torch.full((r + j,), float(10 * r + j)) for j in range(p)]
        )
        assert all(
            torch.equal(g, torch.full((i + r,), float(10 * i + r)))
            for i, g in enumerate(got)
        )

    World(p).run(fn)


def test_reductions_go_in_rank_order():
    """1e8 + 1 − 1e8 in fp32 depends on the order: rank 0 first, always."""
    values = [1e8, 1.0, -1e8, 1.0]
    expected = ((torch.tensor(1e8) + 1.0) - 1e8) + 1.0
    for _ in range(3):
        got = World(4).run(
            lambda comm: comm.all_reduce(torch.tensor(values[comm.rank])).item()
        )
        assert got == [expected.item()] * 4


def test_inputs_are_untouched_and_outputs_are_ones_own():
    def fn(comm):
        x = torch.ones(3)
        y = comm.all_reduce(x)
        y += comm.rank  # must not be seen by the others
        comm.barrier()
        assert torch.equal(x, torch.ones(3))
        return y

    assert [y[0].item() for y in World(3).run(fn)] == [3.0, 4.0, 5.0]


def test_messages_match_by_peer_and_tag_in_order():
    def fn(comm):
        if comm.rank == 0:
            handles = [
                comm.isend(torch.tensor(float(v)), 1, tag=t)
                for v, t in ((1, 7), (2, 5), (3, 7))
            ]
            return [h.wait() for h in handles]
        first, second = comm.irecv(0, tag=7), comm.irecv(0, tag=7)
        return [comm.recv(0, tag=5).item(), second.wait().item(), first.wait().item()]

    assert World(2).run(fn)[1] == [2.0, 3.0, 1.0]


def test_sendrecv_shifts_a_ring():
    def shift(comm):
        return comm.sendrecv(
            torch.tensor(comm.rank), (comm.rank + 1) % 5, (comm.rank - 1) % 5
        ).item()

    assert World(5).run(shift) == [4, 0, 1, 2, 3]


def test_groups_and_meshes():
    def fn(comm):
        mesh = comm.mesh(2, 3)
        down, along = mesh.axes
        backwards = comm.group([4, 1])
        order = (
            None
            if backwards is None
            else backwards.all_gather(torch.tensor([comm.rank])).tolist()
        )
        return (
            mesh.coords,
            down.ranks,
            along.ranks,
            along.all_reduce(torch.tensor(comm.rank)).item(),
            order,
        )

    out = World(6).run(fn)
    assert out[4] == ((1, 1), (1, 4), (3, 4, 5), 12, [4, 1])
    assert out[1][4] == [4, 1] and out[0][4] is None


def test_async_collectives_overlap_with_work():
    link = Link(latency=0.0, bandwidth=1.0)

    def overlapped(comm):
        # 2 ranks: 2 · 1/2 · 8 bytes = 8 s
        handle = comm.all_reduce(torch.ones(2), async_op=True)
        comm.work(5.0)
        handle.wait()

    def in_turn(comm):
        comm.all_reduce(torch.ones(2))
        comm.work(5.0)

    def time_of(fn):
        world = World(2, link=link)
        world.run(fn)
        return world.ledger.time

    assert time_of(overlapped) == 8.0 and time_of(in_turn) == 13.0


def test_the_clock_of_a_message():
    def fn(comm):
        if comm.rank == 0:
            comm.work(3.0)
            comm.send(torch.ones(25), 1)  # 100 bytes at 50 B/s, and 0.5 s of latency
        else:
            comm.recv(0)
            comm.work(1.0, "after")

    world = World(2, link=Link(0.5, 50.0))
    world.run(fn)
    assert [e.start for e in world.ledger.events("work", rank=1)] == [5.5]


def test_a_run_is_the_same_every_time_random_numbers_included():
    def fn(comm):
        x = torch.randn(3) + comm.rank
        comm.barrier()
        return comm.all_reduce(x), torch.rand(2)

    def once():
        torch.manual_seed(3)
        world = World(4)
        return world.run(fn), list(world.ledger)

    (a, events), (b, again) = once(), once()
    assert (
        all(
            torch.equal(x, y)
            for i, j in zip(a, b, strict=True)
            for x, y in zip(i, j, strict=True)
        )
        and events == again
    )


def test_each_rank_has_its_own_random_stream_and_the_callers_is_left_alone():
    torch.manual_seed(1)
    expected = torch.randn(2)
    torch.manual_seed(1)

    def fn(comm):
        comm.barrier()
        torch.manual_seed(10 + comm.rank)
        comm.barrier()
        return torch.rand(1).item()

    streams = World(3).run(fn)
    assert torch.equal(torch.randn(2), expected)
    assert streams == [
        torch.rand(1, generator=torch.Generator().manual_seed(10 + r)).item()
        for r in range(3)
    ]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no list of threads")
def test_no_thread_is_left_behind():
    """One that still gives back its buffers holds a lock, which a fork would copy."""
    w = torch.randn(300, 176)

    def product(comm):
        torch.nn.functional.linear(torch.randn(64, 176), w)
        return threading.get_native_id()

    for _ in range(200):
        tasks = World(8).run(product)
        assert not any(os.path.exists(f"/proc/self/task/{task}") for task in tasks)


def test_arguments_are_private():
    shared = torch.zeros(2)

    def fn(comm, x):
        x += comm.rank
        return x[0].item()

    assert World(3).run(fn, shared) == [0.0, 1.0, 2.0] and shared[0] == 0
    with pytest.raises(ValueError, match="cannot be copied"):
        World(2).run(fn, torch.ones(2, requires_grad=True) * 2)


def test_gradients_are_recorded_as_in_the_caller():
    def track(comm):
        return (torch.ones(1, requires_grad=True) * 2).requires_grad

    assert World(2).run(track) == [True, True]
    with torch.no_grad():
        assert World(2).run(track) == [False, False]


def test_collectives_do_not_record_gradients():
    def fn(comm):
        return comm.all_reduce(torch.ones(2, requires_grad=True)).requires_grad

    assert World(2).run(fn) == [False, False]


# What is said when ranks do not fit together ------------------------------------------


def failing(p, fn, kind):
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        World(p).run(fn)
    assert time.monotonic() - started < 1.0, "a deadlock must be found at once"
    assert not [t for t in threading.enumerate() if t.name.startswith("rank ")]
    return str(caught.value)


def test_a_rank_that_returns_early():
    def fn(comm):
        if comm.rank != 2:
            comm.all_reduce(torch.ones(3))

    said = failing(3, fn, DeadlockError)
    assert (
        "rank 0 waits in all_reduce(float32[3], op='sum') of group (0, 1, 2) for rank 2"
        in said
    )
    assert (
        "rank 2 has returned" in said and "test_world.py:" in said and "in fn" in said
    )


def test_a_receive_without_a_send():
    said = failing(2, lambda comm: comm.recv(1 - comm.rank, tag=4), DeadlockError)
    assert (
        "rank 0 waits in recv from rank 1 (tag 4)" in said
        and "rank 1 waits in recv from rank 0" in said
    )


def test_blocking_sends_around_a_ring():
    def fn(comm):
        comm.send(torch.ones(1), (comm.rank + 1) % 3)
        comm.recv((comm.rank - 1) % 3)

    assert "rank 2 waits in send to rank 0" in failing(3, fn, DeadlockError)


def test_groups_that_wait_for_each_other():
    def fn(comm):
        a, b = comm.group([0, 1]), comm.group([1, 2])
        for g in (a, b) if comm.rank != 1 else (b, a):
            if g is not None:
                g.barrier()
        if comm.rank == 2:
            b.barrier()

    assert "rank 2 waits in barrier() of group (1, 2) for rank 1" in failing(
        3, fn, DeadlockError
    )


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (lambda c: c.all_reduce(torch.ones(3 + c.rank // 2)), "different shapes"),
        (
            lambda c: c.all_reduce(
                torch.ones(3, dtype=[torch.float32, torch.float64][c.rank // 2])
            ),
            "different dtypes",
        ),
        (
            lambda c: c.all_reduce(torch.ones(3), ["sum", "max"][c.rank // 2]),
            "different reductions",
        ),
        (lambda c: c.broadcast(torch.ones(3), c.rank // 2), "different root"),
        (lambda c: c.all_gather(torch.ones(2, 2), c.rank // 2), "different dim"),
        (lambda c: c.all_gather(torch.ones(2, 2 + c.rank // 2)), "different shapes"),
        (
            lambda c: c.barrier() if c.rank == 2 else c.all_reduce(torch.ones(3)),
            "different operations",
        ),
    ],
)
def test_calls_that_disagree(fn, says):
    said = failing(3, fn, CollectiveMismatch)
    assert said.startswith(says) and "rank 2 calls" in said and "rank 0 is in" in said


def test_a_message_that_nobody_takes():
    said = failing(
        2,
        lambda c: c.isend(torch.ones(1), 1) if c.rank == 0 else None,
        CollectiveMismatch,
    )
    assert "send to rank 1" in said


def test_an_exception_keeps_its_type_and_traceback_and_names_the_rank():
    def culprit(comm):
        if comm.rank == 1:
            raise KeyError("here")
        comm.barrier()

    with pytest.raises(KeyError) as caught:
        World(3).run(culprit)
    assert caught.value.__notes__ == ["(raised by rank 1 of 3)"]
    assert caught.traceback[-1].name == "culprit"


def test_learners_except_clause_does_not_swallow_the_end():
    def fn(comm):
        if comm.rank == 0:
            raise ZeroDivisionError
        while True:
            with contextlib.suppress(Exception):
                comm.barrier()

    failing(2, fn, ZeroDivisionError)


def test_interrupting_stops_the_ranks(interruptible):
    def fn(comm):
        while True:
            if comm.rank == 1:
                time.sleep(0.01)
            comm.barrier()

    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        World(2).run(fn)
    for _ in range(100):
        left = [t for t in threading.enumerate() if t.name.startswith("rank ")]
        if not left:
            break
        time.sleep(0.02)
    assert not left


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda c: c.all_reduce([1.0]), "x must be a tensor"),
        (
            lambda c: c.all_reduce(torch.ones(1), "product"),
            "op='product' must be one of",
        ),
        (
            lambda c: c.all_reduce(torch.ones(1, dtype=torch.int64), "mean"),
            "op='mean' needs floating-point",
        ),
        (
            lambda c: c.reduce_scatter(torch.ones(3)),
            "must be a multiple of the 2 ranks",
        ),
        (
            lambda c: c.broadcast(torch.ones(1), 2),
            "src=2 must be one of the group's 2 ranks",
        ),
        (lambda c: c.send(torch.ones(1), c.rank), "is this rank itself"),
        (lambda c: c.all_to_all([torch.ones(1)]), "must be a list of 2 tensors"),
        (lambda c: c.scatter(None), "must be a list of 2 tensors"),
        (lambda c: c.all_gather(torch.ones(1), 1), "dim=1 must be a dimension"),
        (lambda c: c.mesh(3, 2), "has 6 places"),
    ],
)
def test_wrong_arguments_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        World(2).run(call)


def test_world_rejects_nonsense():
    for arguments in ({"n": 0}, {"n": 1.5}, {"n": 2, "algorithm": "magic"}):
        with pytest.raises(ValueError):
            World(**arguments)
    with pytest.raises(ValueError):
        Link(bandwidth=0)
