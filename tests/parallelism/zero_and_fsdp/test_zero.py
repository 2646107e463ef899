"""ZeRO 0, 1, 2 and 3: each is one-process training, for uneven shards, tied weights,
accumulation and unequal token counts.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from llmlab.parallelism import World, launch
from llmlab.parallelism.zero_and_fsdp.fsdp import Fsdp
from llmlab.parallelism.zero_and_fsdp.offload import Host
from llmlab.parallelism.zero_and_fsdp.units import Adam, Unit, adamw_, held, units_of
from llmlab.parallelism.zero_and_fsdp.zero import Zero, train_step
from tests.parallelism.conftest import VARIANTS, tiny

ADAM = Adam(lr=0.02, clip=0.1, weight_decay=0.1)
KINDS = {
    "0": partial(Zero, stage=0),
    "1": partial(Zero, stage=1),
    "2": partial(Zero, stage=2),
    "3 flat": partial(Fsdp, layout="flat"),
    "3 rows": partial(Fsdp, layout="rows"),
    "3 no overlap": partial(Fsdp, overlap=False),
}
SHARDED = {kind: KINDS[kind] for kind in ("1", "2", "3 flat", "3 rows")}
STEPS, MICROBATCHES = 3, 2


def microbatches(rank: int, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Other shapes, other lengths and other numbers of counted targets on each rank."""
    generator, out = torch.Generator().manual_seed(10 * step + rank), []
    for i in range(MICROBATCHES):
        x = torch.randint(37, (1 + (rank + i) % 2, 6 + rank % 3), generator=generator)
        y = x.roll(-1, 1)
        y[:, -1 - (rank + i) % 4 :] = -100
        out.append((x, y))
    return out


def one_process(model, ranks: int, adam: Adam = ADAM, steps: int = STEPS):
    """The same training with torch's own AdamW and clipping, all ranks' data in one
    process.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), adam.lr, adam.betas, adam.eps, adam.weight_decay
    )
    history = []
    for step in range(steps):
        data = [batch for rank in range(ranks) for batch in microbatches(rank, step)]
        x = [model(x).flatten(0, 1) for x, _ in data]
        loss = F.cross_entropy(
            torch.cat(x), torch.cat([y.flatten() for _, y in data]), ignore_index=-100
        )
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            model.parameters(), adam.clip or float("inf")
        )
        optimizer.step()
        history.append((loss.item(), norm.item()))
    return history, {name: w.detach() for name, w in model.named_parameters()}


def many(comm, model, kind, adam: Adam = ADAM, steps: int = STEPS, **more):
    engine = KINDS[kind](model, comm, adam, **more)
    history = [
        train_step(engine, model, comm, microbatches(comm.rank, step))
        for step in range(steps)
    ]
    with engine.gathered():
        return history, {
            name: w.detach().clone() for name, w in model.named_parameters()
        }


def assert_same(results, reference, tol: float) -> None:
    history, weights = reference
    for mine, mine_weights in results:
        torch.testing.assert_close(
            torch.tensor(mine), torch.tensor(history), atol=tol, rtol=0
        )
        assert mine_weights.keys() == weights.keys()
        for name, w in weights.items():
            torch.testing.assert_close(
                mine_weights[name],
                w,
                atol=tol,
                rtol=0,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.mark.parametrize(
    ("variant", "p"),
    [
        *[("gqa", 1), ("gqa", 6)],
        # eight ranks: the one kv head has six rows
        *[("one kv head, tied", 2), ("one kv head, tied", 8)],
        ("biases", 3),
    ],
)
def test_every_stage_is_one_process(variant, p):
    """In fp64, so that what is left is rounding: losses, norms and every weight after
    three clipped steps, to 1e-9.
    """
    model = tiny(**VARIANTS[variant]).double()
    if (
        variant == "biases"
        # a key's bias has gradient zero: what Adam makes of the rounding error is no
        # difference of ours
    ):
        for block in model.model.layers:
            block.self_attn.k_proj.bias = None
    start = copy.deepcopy(model)
    reference = one_process(copy.deepcopy(model), p)
    assert all(norm > ADAM.clip for _, norm in reference[0]), "clipping must be at work"
    assert (
        max((reference[1][n] - w).abs().max() for n, w in start.named_parameters())
        > 0.05
    )
    for kind in KINDS:
        assert_same(World(p).run(many, model, kind), reference, 1e-9)


def test_in_single_precision():
    """ε is raised so that rounding in a gradient near 0 does not become a whole step of
    Adam.
    """
    adam = Adam(lr=0.02, clip=0.1, weight_decay=0.1, eps=1e-5)
    reference = one_process(tiny(num_key_value_heads=2), 3, adam)
    for kind in KINDS:
        assert_same(
            World(3).run(many, tiny(num_key_value_heads=2), kind, adam), reference, 1e-5
        )


@pytest.mark.parametrize("p", [2, 3])
def test_in_real_processes(p):
    """Two steps: what differs from threads is how messages travel."""
    adam = Adam(lr=0.02, clip=0.1, weight_decay=0.1, eps=1e-5)
    model = tiny(tie_word_embeddings=True)
    reference = one_process(copy.deepcopy(model), p, adam, 2)

    def all_kinds(comm):
        return {kind: many(comm, copy.deepcopy(model), kind, adam, 2) for kind in KINDS}

    results = launch(all_kinds, p, timeout=120)
    for kind in KINDS:
        assert_same([r[kind] for r in results], reference, 1e-5)


def test_without_clipping_and_with_room():
    for clip in (None, 1e6):
        adam = Adam(lr=0.02, clip=clip, weight_decay=0.1)
        model = tiny().double()
        reference = one_process(copy.deepcopy(model), 3, adam, 2)
        for kind in KINDS:
            assert_same(World(3).run(many, model, kind, adam, 2), reference, 1e-9)


def test_adamw_is_torchs():
    torch.manual_seed(0)
    adam = Adam(lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3)
    weight = torch.nn.Parameter(torch.randn(11, dtype=torch.float64))
    w, m, v = (
        weight.detach().clone(),
        torch.zeros(11).double(),
        torch.zeros(11).double(),
    )
    optimizer = torch.optim.AdamW(
        [weight], adam.lr, adam.betas, adam.eps, adam.weight_decay
    )
    for t in range(1, 6):
        weight.grad = torch.randn(11, dtype=torch.float64)
        adamw_(w, m, v, weight.grad, t, adam)
        optimizer.step()
    torch.testing.assert_close(w, weight.detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_one_unit_once(tied):
    model = tiny(tie_word_embeddings=tied)
    units = units_of(model)
    ids = [id(w) for _, _, ws in units for w in ws]
    assert len(ids) == len(set(ids)) and set(ids) == {id(w) for w in model.parameters()}
    assert [name for name, _, _ in units] == ["block 0", "block 1", "root"]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_share_a_weight(kind):
    """Shared by two blocks, it belongs to the root, which is whole while both run; its
    gradient counts once.
    """
    model = tiny().double()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    assert any(
        w is model.model.layers[0].mlp.up_proj.weight for w in units_of(model)[-1][2]
    )
    assert_same(
        World(3).run(many, model, kind), one_process(copy.deepcopy(model), 3), 1e-9
    )


def test_norm_is_that_of_the_whole_gradient():
    """Not a rank's, and not the norms' mean: shards differ in size and in what they
    hold.
    """

    def norms(comm, model, kind):
        engine = KINDS[kind](model, comm, Adam(clip=1e-3))
        _, norm = train_step(engine, model, comm, microbatches(comm.rank, 0))
        return norm

    model = tiny(tie_word_embeddings=True).double()
    ((_, expected),) = one_process(copy.deepcopy(model), 3, Adam(clip=1e-3), 1)[0]
    for kind in KINDS:
        assert World(3).run(norms, model, kind) == pytest.approx(
            [expected] * 3, abs=1e-9
        )


def test_when_gradients_travel():
    """Stages 0 and 1: once per step. Stage 2: with every microbatch. Stage 3: too, and
    two gathers for a block, one for the root.
    """

    def counts(comm, model, kind):
        engine = KINDS[kind](model, comm)
        comm.barrier()
        if comm.rank == 0:
            comm.ledger.clear()
        comm.barrier()
        train_step(engine, model, comm, microbatches(comm.rank, 0))
        comm.barrier()
        ops = ("reduce_scatter", "all_gather", "all_reduce")
        return tuple(
            sum(
                e.op == op and e.payload > 8 for e in comm.ledger.events(rank=comm.rank)
            )
            for op in ops
        )

    units, m = 3, MICROBATCHES
    expected = {"0": (0, 0, units), "1": (units, units, 0), "2": (m * units, units, 0)}
    expected |= dict.fromkeys(
        ("3 flat", "3 rows", "3 no overlap"), (m * units, m * (2 * 2 + 1), 0)
    )
    for kind in KINDS:
        assert set(World(4).run(counts, tiny(), kind)) == {expected[kind]}, kind


@pytest.mark.parametrize("kind", KINDS)
def test_more_ranks_than_elements_of_a_unit(kind):
    """The last ranks hold nothing of a small unit but padding, and must still take
    part.
    """
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(1, 3)
    )
    x, y = torch.randn(8, 2), torch.randn(8, 3)
    adam = Adam(lr=0.1, eps=1e-4)

    def fn(comm, model):
        engine = KINDS[kind](model, comm, adam, blocks=list(model))
        for _ in range(3):
            F.mse_loss(model(x), y).div(comm.size).backward()
            engine.step()
        with engine.gathered():
            return torch.cat([w.detach().flatten() for w in model.parameters()])

    results = World(8).run(fn, model)
    optimizer = torch.optim.AdamW(
        model.parameters(), adam.lr, adam.betas, adam.eps, adam.weight_decay
    )
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), adam.clip)
        optimizer.step()
    expected = torch.cat([w.detach().flatten() for w in model.parameters()])
    for got in results:
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_keeps_fp32_masters(kind):
    """bf16 has 8 bits: a step of 1e-4 on a weight near 1 is lost in it, and must not be
    lost in w.
    """

    def fn(comm, model):
        model.model.norm.weight.data.fill_(1.0)
        engine = KINDS[kind](model, comm, Adam(lr=1e-4, weight_decay=0.0))
        root = engine.units[-1]
        before = root.w.clone()
        for step in range(3):
            train_step(engine, model, comm, microbatches(comm.rank, step))
        with engine.gathered():
            norm = model.model.norm.weight.detach().clone()
        return (
            (root.w - before).abs().max().item(),
            norm,
            {t.dtype for t in (root.w, root.m, root.v)},
            root.new_piece(),
        )

    for moved, norm, state, piece in World(2).run(fn, tiny().bfloat16()):
        assert moved > 2e-4 and torch.equal(norm, torch.ones_like(norm))
        assert state == {torch.float32} and norm.dtype == piece.dtype == torch.bfloat16


def test_mixed_precision_losses_agree():
    """All stages see the same bf16 weights; only the order of sums in bf16 differs."""
    adam = Adam(lr=0.02, clip=0.1, eps=1e-5)
    reference = World(3).run(many, tiny().bfloat16(), "0", adam)[0][0]
    plain = World(3).run(many, tiny(), "0", adam)[0][0]
    for kind in SHARDED:
        for history, _ in World(3).run(many, tiny().bfloat16(), kind, adam):
            for (loss, _), (same, _), (near, _) in zip(
                history, reference, plain, strict=True
            ):
                assert loss == pytest.approx(same, abs=0.02) and loss == pytest.approx(
                    near, abs=0.1
                )


@pytest.mark.parametrize("kind", KINDS)
def test_offload_trains_the_same_and_counts(kind):
    model = tiny().double()
    reference = one_process(copy.deepcopy(model), 2)
    assert_same(
        World(2).run(lambda comm, m: many(comm, m, kind, host=Host()), model),
        reference,
        1e-9,
    )

    def crossed(comm, model):
        host = Host()
        engine = KINDS[kind](model, comm, host=host)
        s = sum(unit.w.numel() for unit in engine.units)
        assert host.bytes_down == 4 * s, "the master weights go down once, at the start"
        host.clear()
        before = held(engine)
        train_step(engine, model, comm, microbatches(comm.rank, 0))
        return host.bytes_down, host.bytes_up, s, before

    for down, up, s, before in World(2).run(crossed, tiny().bfloat16()):
        assert (down, up) == (2 * s * (1 if kind in "01" else MICROBATCHES), 2 * s)
        assert before["optimizer"] == 0 and before["host"] == 12 * s


def test_wrong_use_is_named():
    def unused(comm, model, kind):
        engine = KINDS[kind](model, comm)
        model.model.norm(torch.ones(1, 24)).sum().backward() if kind in "012" else None
        engine.step()

    for kind in KINDS:
        with pytest.raises(RuntimeError, match=r"gradient|not reduced"):
            World(2).run(unused, tiny(), kind)
    with pytest.raises(ValueError, match="stage=4"):
        World(1).run(lambda comm, m: Zero(m, comm, stage=4) and None, tiny())
    with pytest.raises(ValueError, match="layout='columns'"):
        World(1).run(lambda comm, m: Fsdp(m, comm, layout="columns") and None, tiny())
    with pytest.raises(ValueError, match="clip=0"):
        Adam(clip=0)
    nothing = [(torch.tensor([[1, 2]]), torch.full((1, 2), -100))]
    for kind in KINDS:
        with pytest.raises(ValueError, match="no target but −100"):
            World(2).run(
                lambda comm, m, kind=kind: train_step(
                    KINDS[kind](m, comm), m, comm, nothing
                ),
                tiny(),
            )
    pair = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))]
    pair[1].requires_grad_(False)
    with pytest.raises(ValueError, match="u has 1 parameters with requires_grad=False"):
        Unit("u", pair, 2, 0, "flat", None)


def test_a_gradient_that_comes_to_half_a_unit_is_an_error():
    def fn(comm, model):
        engine = Zero(model, comm, stage=2)
        model(torch.tensor([[1, 2]])).sum().backward()  # every unit is reduced …
        # … then comes half of the root's next gradient
        F.linear(torch.ones(24), model.lm_head.weight).sum().backward()
        engine.step()

    with pytest.raises(RuntimeError, match="root is not reduced"):
        World(2).run(fn, tiny())


def test_a_unit_without_a_gradient_says_how_many():
    unit = Unit("u", [torch.nn.Parameter(torch.ones(3))], 2, 0, "flat", None)
    with pytest.raises(RuntimeError, match="1 parameters of u have no gradient"):
        unit.take_gradients()
