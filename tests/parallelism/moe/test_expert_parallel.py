"""Expert parallelism, flat and in two levels, is the loop over experts on one process:
outputs, gradients, training, bytes.
"""

from __future__ import annotations

import copy

import pytest
import torch

from llmlab.parallelism import Link, World, launch
from llmlab.parallelism.moe.cost import (
    dispatch_bytes,
    distinct_nodes,
    expert_parameters,
    padded_bytes,
)
from llmlab.parallelism.moe.expert_parallel import (
    ExpertParallelMoE,
    exchange,
    gather_state,
    sum_router_gradients,
)
from llmlab.parallelism.moe.hierarchical import TwoLevelMoE, hierarchical_all_to_all
from llmlab.parallelism.moe.moe import ORDERS, MoE, MoEConfig, balance_loss, route
from tests.covering import every_pair

D, HIDDEN = 6, 10
NO_CAPACITY = [(None, "position")]  # "padded" needs one
NODES = {1: (1, 1), 2: (2, 1), 3: (3, 1), 4: (2, 2), 6: (3, 2)}


def whole(E, k=2, factor=None, order="position", **settings):
    torch.manual_seed(E)
    return MoE(MoEConfig(E, k, factor, order, **settings), D, HIDDEN)


def inputs(p):
    """Groups of different lengths, one a rank, and what their outputs are multiplied
    with.
    """
    torch.manual_seed(p)
    return [torch.randn(5 + 2 * r, D) for r in range(p)], [
        torch.randn(5 + 2 * r, D) for r in range(p)
    ]


def alone(moe, xs, ups):
    """One process: each group routed by itself, one loss. Returns outputs, gradients of
    x, and the layer with its own.
    """
    moe = copy.deepcopy(moe)
    xs = [x.clone().requires_grad_() for x in xs]
    results = [moe(x) for x in xs]
    probs = torch.cat([route(moe.gate(x), moe.config.top_k).probs for x in xs])
    balance = balance_loss(
        probs, sum(r.load for _, r in results), len(probs), moe.config.top_k
    )
    (
        sum((y * up).sum() for (y, _), up in zip(results, ups, strict=True)) + balance
    ).backward()
    return (
        [y.detach() for y, _ in results],
        [x.grad for x in xs],
        moe,
        balance.item(),
        [r.dropped for _, r in results],
    )


def split(comm, moe, kind, mesh):
    if kind == "two levels":
        return TwoLevelMoE(moe, comm.mesh(*mesh))
    return ExpertParallelMoE(moe, comm, padded=kind == "padded")


def one_step(comm, moe, kind, mesh, xs, ups):
    layer, x = split(comm, moe, kind, mesh), xs[comm.rank].clone().requires_grad_()
    y, report = layer(x)
    ((y * ups[comm.rank]).sum() + report.balance).backward()
    sum_router_gradients(layer, comm)
    return (
        y.detach(),
        x.grad,
        {n: w.grad for n, w in layer.named_parameters()},
        report.balance.item(),
        report.dropped,
    )


def assert_equal(results, expected, p):
    ys, dxs, moe, balance, dropped = expected
    for r, (y, dx, grads, b, d) in enumerate(results):
        torch.testing.assert_close(y, ys[r], atol=1e-5, rtol=0)
        torch.testing.assert_close(dx, dxs[r], atol=1e-5, rtol=1e-5)
        assert b == pytest.approx(balance, abs=1e-5) and d == dropped[r]
        for name, w in moe.named_parameters():
            grad = w.grad.chunk(p)[r] if name.startswith("experts") else w.grad
            torch.testing.assert_close(
                grads[name],
                grad,
                atol=1e-5,
                rtol=1e-5,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.mark.parametrize(
    ("sizes", "capacity", "kind"),
    every_pair(
        [(1, 6), (2, 8), (3, 6), (4, 12), (6, 12)],
        [(f, o) for f in (1.0, 0.6) for o in ORDERS],
        ["flat", "padded", "two levels"],
    )
    + every_pair([(1, 6), (3, 6), (6, 12)], NO_CAPACITY, ["flat", "two levels"]),
)
def test_it_is_the_loop_over_experts(sizes, capacity, kind):
    """Each pair of sizes, capacity and kind, not all triples."""
    (p, E), (factor, order) = sizes, capacity
    moe, (xs, ups) = whole(E, factor=factor, order=order), inputs(p)
    assert_equal(
        World(p).run(one_step, moe, kind, NODES[p], xs, ups), alone(moe, xs, ups), p
    )


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", ["flat", "two levels"])
def test_one_and_three_experts_a_token(kind, k):
    moe, (xs, ups) = whole(8, k=k, factor=1.25, renormalise=k > 1), inputs(4)
    assert_equal(
        World(4).run(one_step, moe, kind, (2, 2), xs, ups), alone(moe, xs, ups), 4
    )


@pytest.mark.parametrize("kind", ["flat", "padded", "two levels"])
def test_in_real_processes(kind):
    moe, (xs, ups) = whole(8, factor=0.8), inputs(4)
    assert_equal(
        launch(one_step, 4, moe, kind, (2, 2), xs, ups), alone(moe, xs, ups), 4
    )


@pytest.mark.parametrize("kind", ["flat", "two levels"])
def test_an_expert_that_nobody_wants_and_a_rank_without_rows(kind):
    moe, (xs, ups) = whole(8), inputs(4)
    # experts 2 … 7 lose wherever Σx > 0
    moe.gate.weight.data[2:] = moe.gate.weight.data[:1] - 100 * torch.ones(D)
    xs = [x.abs() for x in xs]
    expected = alone(moe, xs, ups)
    assert all(
        set(route(moe.gate(x), 2).experts.flatten().tolist()) == {0, 1} for x in xs
    )
    for r, (y, dx, grads, *_) in enumerate(
        World(4).run(one_step, moe, kind, (2, 2), xs, ups)
    ):
        torch.testing.assert_close(y, expected[0][r], atol=1e-5, rtol=0)
        torch.testing.assert_close(dx, expected[1][r], atol=1e-5, rtol=1e-5)
        if r:
            assert all(
                g is None or g.count_nonzero() == 0
                for n, g in grads.items()
                if n.startswith("experts")
            )


def training(comm, moe, xs, targets, kind="flat"):
    """A few steps: a residual around the layer, the mean over all ranks' tokens, and
    the balance loss.
    """
    layer = split(comm, moe, kind, (2, 2))
    x, t = xs[comm.rank], targets[comm.rank]
    total = int(comm.all_reduce(torch.tensor(len(x))))
    optimizer, losses = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9), []
    for _ in range(4):
        optimizer.zero_grad()
        y, report = layer(x)
        loss = (x + y - t).square().sum() / total
        (loss + 0.01 * report.balance).backward()
        sum_router_gradients(layer, comm)
        optimizer.step()
        losses.append(
            comm.all_reduce(loss.detach()).item() + 0.01 * report.balance.item()
        )
    return losses, gather_state(layer, comm)


@pytest.mark.parametrize("kind", ["flat", "two levels"])
@pytest.mark.parametrize("where", ["threads", "processes"])
def test_training_is_that_of_one_process(where, kind):
    moe, (xs, targets) = whole(8, factor=1.0), inputs(4)
    results = (
        World(4).run if where == "threads" else lambda fn, *a: launch(fn, 4, *a)
    )(training, moe, xs, targets, kind)
    start = {n: w.clone() for n, w in moe.state_dict().items()}
    optimizer, losses, total = (
        torch.optim.SGD(moe.parameters(), lr=0.05, momentum=0.9),
        [],
        sum(map(len, xs)),
    )
    for _ in range(4):
        optimizer.zero_grad()
        outs = [moe(x) for x in xs]
        probs = torch.cat([route(moe.gate(x), 2).probs for x in xs])
        balance = balance_loss(probs, sum(r.load for _, r in outs), total, 2)
        loss = (
            sum(
                (x + y - t).square().sum()
                for x, (y, _), t in zip(xs, outs, targets, strict=True)
            )
            / total
        )
        (loss + 0.01 * balance).backward()
        optimizer.step()
        losses.append(loss.item() + 0.01 * balance.item())
    assert (
        max((moe.state_dict()[n] - w).abs().max() for n, w in start.items()) > 0.05
    ), "the steps must be large"
    for mine, state in results:
        assert mine == pytest.approx(losses, abs=1e-5)
        for name, w in moe.state_dict().items():
            torch.testing.assert_close(
                state[name], w, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_in_bf16_the_router_stays_in_fp32():
    moe, (xs, _) = whole(8), inputs(4)
    moe.experts.bfloat16()

    def fn(comm, kind):
        layer = split(comm, copy.deepcopy(moe), kind, (2, 2))
        y, _ = layer(xs[comm.rank].bfloat16())
        return y

    for r, x in enumerate(xs):
        expected = copy.deepcopy(moe)(x.bfloat16())[0]
        for kind in ("flat", "two levels"):
            got = World(4).run(fn, kind)[r]
            assert got.dtype == torch.bfloat16
            torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)


def test_exchange_and_its_gradient():
    def fn(comm):
        rows = (torch.arange(3.0) + 10 * comm.rank)[
            :, None
        ].requires_grad_()  # rank 0 sends 1 and 2 rows, rank 1: 3 and 0
        send, receive = ([1, 2], [1, 3]) if comm.rank == 0 else ([3, 0], [2, 0])
        got = exchange(rows, comm, send, receive)
        (
            got.flatten() * (torch.arange(float(len(got))) + 100 * (comm.rank + 1))
        ).sum().backward()
        return got.flatten().tolist(), rows.grad.flatten().tolist()

    first, second = World(2).run(fn)
    assert first == ([0, 10, 11, 12], [100, 200, 201])
    assert second == ([1, 2], [101, 102, 103])


@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (2, 3), (1, 4), (4, 1)])
def test_two_levels_exchange_what_one_does(shape):
    """Uneven, with empty messages, in order of rank."""
    p = shape[0] * shape[1]

    def fn(comm):
        xs = [
            torch.full(((comm.rank + r) % 3, 2), float(100 * comm.rank + r))
            for r in range(p)
        ]
        return hierarchical_all_to_all(xs, comm.mesh(*shape)), comm.all_to_all(xs)

    for two, one in World(p).run(fn):
        assert len(two) == p and all(
            torch.equal(a, b) for a, b in zip(two, one, strict=True)
        )
    for two, one in launch(fn, p) if p == 4 else []:
        assert all(torch.equal(a, b) for a, b in zip(two, one, strict=True))


def test_two_levels_send_fewer_messages():
    """8 ranks on 2 nodes: with latency alone, 7 steps against 1 + 3 (and the sizes,
    sent twice).
    """

    def fn(comm, two):
        mesh = comm.mesh(2, 4)
        xs = [torch.zeros(4, 2) for _ in range(8)]
        hierarchical_all_to_all(xs, mesh) if two else comm.all_to_all(xs)

    flat, two = World(8, link=Link(1.0, 1e30)), World(8, link=Link(1.0, 1e30))
    flat.run(fn, False), two.run(fn, True)

    def payload(w):
        return [e for e in w.ledger.events("all_to_all", rank=0) if e.payload > 64]

    assert (
        sum(e.end - e.start for e in payload(flat)) == 7
        and sum(e.end - e.start for e in payload(two)) == 1 + 3
    )


# What it costs


def one_pass(comm, moe, x, kind, mesh):
    layer = split(comm, moe, kind, mesh)
    layer(x[comm.rank])
    return layer


def sent(world, width, rank=0):
    """Bytes of the rows, without counts and weights, of one rank."""
    return sum(
        e.bytes
        for e in world.ledger.events("all_to_all", rank=rank)
        if e.shape[-1:] == (width,)
    )


def even(T, E, p):
    """Inputs and a router that send every rank's tokens evenly: token t to experts t
    and t + 1 mod E.
    """
    moe = MoE(MoEConfig(E, 2, 1.0), D, HIDDEN)
    moe.gate.weight.data = torch.randn(E, D, generator=torch.Generator().manual_seed(0))
    logits = torch.zeros(T, E)
    logits[torch.arange(T), torch.arange(T) % E] = 9.0
    logits[torch.arange(T), (torch.arange(T) + 1) % E] = 8.0
    moe.gate.forward = lambda x: logits
    return moe, [torch.randn(T, D) for _ in range(p)]


@pytest.mark.parametrize("p", [2, 4])
def test_bytes_of_an_even_router(p):
    T, E = 16, 8
    moe, xs = even(T, E, p)
    world = World(p)
    world.run(lambda comm: one_pass(comm, copy.copy(moe), xs, "flat", None) and None)
    assert [sent(world, D, r) for r in range(p)] == [
        2 * dispatch_bytes(T, 2, D, p, itemsize=4)
    ] * p


def test_padded_bytes_do_not_depend_on_the_router():
    T, E, p, C = 16, 8, 4, 4
    for skew in (0.0, 50.0):
        moe = whole(E, factor=1.0)
        moe.gate.weight.data[0] += skew
        xs = [torch.randn(T, D).abs() for _ in range(p)]
        world = World(p)
        reports = world.run(
            lambda comm, moe=moe, xs=xs: ExpertParallelMoE(moe, comm, padded=True)(
                xs[comm.rank]
            )[1]
        )
        assert [sent(world, D, r) for r in range(p)] == [
            2 * padded_bytes(E, C, D, p, itemsize=4)
        ] * p
        assert [r.rows for r in reports] == [E // p * C * p] * p


def test_a_token_crosses_once_a_node():
    """All experts of a token on one other node: flat sends it k times over the slow
    wire, two levels once.
    """
    E, k, T = 8, 4, 6
    moe = MoE(MoEConfig(E, k), D, HIDDEN)
    logits = torch.zeros(T, E)
    logits[:, 4:] = 5.0  # experts 4 … 7 are those of node 1
    moe.gate.forward = lambda x: logits
    x = [torch.randn(T, D) for _ in range(4)]
    flat, two = World(4), World(4)
    flat.run(lambda comm: one_pass(comm, copy.copy(moe), x, "flat", None) and None)
    two.run(
        lambda comm: one_pass(comm, copy.copy(moe), x, "two levels", (2, 2)) and None
    )

    def crossing(r):
        return [
            e.bytes
            for e in two.ledger.events("all_to_all", rank=r)
            if e.group == (r % 2, r % 2 + 2) and e.shape[-1] == D
        ]

    # out: each token once, not k times; home: what came for others, nothing
    assert crossing(0) == [T * D * 4, 0]
    assert crossing(2) == [0, T * D * 4]  # node 1's own tokens stay
    # node 0 sends them all, and gets no row to send back
    assert sent(flat, D) == k * T * D * 4


def test_nodes_of_a_token():
    """Against enumeration by sampling, and DeepSeek-V3's numbers: 256 experts, 8 a
    token, 8 nodes.
    """
    generator = torch.Generator().manual_seed(0)
    picks = torch.rand(20000, 256, generator=generator).topk(8).indices // 32
    seen = torch.zeros(20000, 8).scatter(1, picks, 1.0).sum(1).mean().item()
    assert distinct_nodes(256, 8, 8) == pytest.approx(seen, rel=0.01)
    assert distinct_nodes(8, 8, 4) == 4 and distinct_nodes(8, 1, 4) == 1
    with pytest.raises(ValueError, match="E=9"):
        distinct_nodes(9, 2, 2)


def test_published_sizes():
    """Switch-C (table 9): 15 encoder and 15 decoder layers of 2048 experts of 2 · 2080
    · 6144 make up its 1571 B.
    """
    assert expert_parameters(30, 2048, 2080, 6144, matrices=2) / 1e9 == pytest.approx(
        1571, rel=0.002
    )
    deepseek = expert_parameters(58, 257, 7168, 2048)
    assert 0.97 < deepseek / 671e9 < 0.99


@pytest.mark.parametrize("kind", ["flat", "two levels"])
def test_experts_must_divide(kind):
    with pytest.raises(ValueError, match="experts=6 must be a multiple of the 4 ranks"):
        World(4).run(lambda comm: split(comm, whole(6), kind, (2, 2)) and None)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="padded=True needs a capacity_factor"):
        World(2).run(
            lambda comm: ExpertParallelMoE(whole(4), comm, padded=True) and None
        )
    with pytest.raises(ValueError, match="xs must hold 4 tensors"):
        World(4).run(
            lambda comm: hierarchical_all_to_all([torch.ones(1)], comm.mesh(2, 2))
        )
