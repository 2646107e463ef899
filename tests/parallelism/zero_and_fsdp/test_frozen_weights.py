"""ZeRO and FSDP where a part of the model is frozen: they train the rest as one process
does, and as `fully_shard`; a frozen weight has no state and sends no gradient.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from llmlab.parallelism import World, launch
from llmlab.parallelism.zero_and_fsdp.fsdp import Fsdp
from llmlab.parallelism.zero_and_fsdp.offload import Host
from llmlab.parallelism.zero_and_fsdp.units import Adam, held
from llmlab.parallelism.zero_and_fsdp.zero import Zero, summed_loss, train_step
from llmlab.peft import qlora
from llmlab.peft.lora import lora
from tests.parallelism.conftest import tiny
from tests.parallelism.zero_and_fsdp.test_zero import (
    ADAM,
    KINDS,
    assert_same,
    many,
    microbatches,
    one_process,
)


def frozen(*parts, tied=False, layers=3):
    """A model in which the parameters with one of these in their names are frozen."""
    model = tiny(
        num_hidden_layers=layers, num_key_value_heads=2, tie_word_embeddings=tied
    )
    for name, w in model.named_parameters():
        w.requires_grad_(not any(part in name for part in parts))
    return model


def with_lora(targets, layers=3, dtype=torch.float32, blocks=None):
    """A frozen base under LoRA whose B is not 0, so that A learns at once."""
    model = tiny(num_hidden_layers=layers, num_key_value_heads=2).to(dtype)
    config = lora.LoRAConfig(r=3, target_modules=targets, layers_to_transform=blocks)
    torch.manual_seed(5)
    lora.apply(model, config)
    for name, w in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(w, std=0.2)
    return model


MODELS = {
    "embedding and MLPs": lambda: frozen("embed_tokens", "mlp"),
    "the embedding": lambda: frozen("embed_tokens"),
    "the head, tied": lambda: frozen("embed_tokens", "lm_head", tied=True),
    "norms": lambda: frozen("norm"),
    "all but the first block": lambda: frozen(
        "embed", "layers.1", "layers.2", "lm_head"
    ),
    "all but the last block": lambda: frozen("embed", "layers.0", "layers.1", "l.norm"),
    "all but a norm": lambda: frozen(
        "embed", "proj", "lm_head", "attention_layer", "l.norm"
    ),
    "all but the head": lambda: frozen("embed", "layers", "l.norm"),
    "LoRA on q and v": lambda: with_lora(("q_proj", "v_proj")),
    # the last linear of a block: its gradients come first
    "LoRA on down": lambda: with_lora(("down_proj",)),
    "LoRA on one block": lambda: with_lora(("k_proj", "up_proj"), blocks=(1,)),
    "LoRA on all, head too": lambda: with_lora("all-linear"),
}


@pytest.mark.parametrize(
    ("make", "p"),
    [*((make, 3) for make in MODELS.values()), (MODELS["LoRA on down"], 1)],
    ids=[*MODELS, "one rank"],
)
def test_every_stage_is_one_process(make, p):
    model = make().double()
    start = {n: w.detach().clone() for n, w in model.named_parameters()}
    reference = one_process(copy.deepcopy(model), p)
    moved = {n for n, w in reference[1].items() if not torch.equal(w, start[n])}
    assert moved == {n for n, w in model.named_parameters() if w.requires_grad}
    for kind in KINDS:
        results = World(p).run(many, model, kind)
        assert_same(results, reference, 1e-9)
        for _, weights in results:
            for name, w in weights.items():
                assert name in moved or torch.equal(w, start[name]), name


def fully_sharded(comm, model, steps=3):
    """The same training by torch's FSDP2, with the same frozen parameters."""
    from torch.distributed.fsdp import fully_shard

    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    a = ADAM
    trained = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(trained, a.lr, a.betas, a.eps, a.weight_decay)
    history = []
    for step in range(steps):
        batches = microbatches(comm.rank, step)
        counted = sum(int((y != -100).sum()) for _, y in batches)
        total = comm.all_reduce(torch.tensor(counted)).item()
        loss = torch.zeros(())
        for x, y in batches:
            part = summed_loss(model, x, y) / total
            (part * comm.size).backward()  # it takes means over ranks
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(trained, a.clip).full_tensor().item()
        optimizer.step()
        optimizer.zero_grad()
        history.append((comm.all_reduce(loss).item(), norm))
    return history, {n: w.full_tensor().detach() for n, w in model.named_parameters()}


@pytest.mark.parametrize(
    "name", ["embedding and MLPs", "all but the last block", "LoRA on down"]
)
def test_stage_3_is_fsdp2(name):
    def fn(comm):
        make = MODELS[name]
        return many(comm, make(), "3 rows"), fully_sharded(comm, make())

    for ours, theirs in launch(fn, 2, timeout=120):
        assert_same([ours], theirs, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_half_precision_base_under_lora_in_single(dtype):
    """Frozen weights are gathered in their own dtype, bit for bit."""
    model = with_lora(("q_proj", "down_proj"), dtype=dtype)
    start = {n: w.detach().clone() for n, w in model.named_parameters()}
    adam = Adam(lr=0.02, clip=0.1, weight_decay=0.1, eps=1e-4)
    reference = one_process(copy.deepcopy(model), 2, adam)
    tol = 1e-5 if dtype is torch.float32 else 2e-2
    for kind in KINDS:
        results = World(2).run(many, model, kind, adam)
        assert_same(results, reference, tol)
        for name, w in results[0][1].items():
            assert w.dtype == start[name].dtype
            assert "lora" in name or torch.equal(w, start[name])


def test_a_base_of_4_bits():
    def make():
        model = tiny(num_hidden_layers=2, hidden_size=64, intermediate_size=64)
        qlora.quantize(model, qlora.QLoRAConfig(block=32))
        torch.manual_seed(5)
        lora.apply(model, lora.LoRAConfig(r=3, target_modules=("q_proj", "down_proj")))
        for w in model.parameters():
            if not w.is_floating_point():
                assert not w.requires_grad
        return model

    adam = Adam(lr=0.02, clip=0.1, weight_decay=0.1, eps=1e-4)
    reference = one_process(make(), 2, adam)
    for kind in KINDS:
        assert_same(
            World(2).run(lambda c, k=kind: many(c, make(), k, adam)), reference, 1e-4
        )


@pytest.mark.parametrize("p", [1, 4])
def test_state_and_traffic_are_those_of_what_trains(p):
    """Gradients and w, m, v of the trained weights; whole blocks are gathered twice."""

    def fn(comm, stage):
        model = frozen("embed", "mlp", "lm_head")
        trained = sum(w.numel() for w in model.parameters() if w.requires_grad)
        whole = sum(w.numel() for w in model.parameters())
        root = whole - sum(w.numel() for w in model.model.layers.parameters())
        engine = (
            Fsdp(model, comm, layout="flat")
            if stage == 3
            else Zero(model, comm, stage=stage)
        )
        x = microbatches(comm.rank, 0)[0][0]
        comm.barrier()
        comm.ledger.clear() if comm.rank == 0 else None
        comm.barrier()
        summed_loss(model, x, x).backward()
        now = held(engine)
        engine.step()
        return trained, whole, root, now

    for stage in range(4):
        world = World(p)
        trained, whole, root, now = world.run(fn, stage)[0]
        share = 1 if stage == 0 else p
        slack = 4 * 4 * 3  # padding: less than p numbers for each of 4 units, w, m, v
        assert now["optimizer"] == pytest.approx(3 * 4 * trained / share, abs=slack)
        reduced = 4 * trained / (p if stage >= 2 else 1)
        assert now["gradients"] == pytest.approx(reduced, abs=slack)
        weights = 4 * whole / (p if stage == 3 else 1)
        assert now["weights"] == pytest.approx(weights, abs=4 * slack)
        ring = 4 * (p - 1) / p
        sent = {
            0: 2 * trained,
            1: 2 * trained,
            2: 2 * trained,
            3: trained + 2 * whole - root,
        }[stage]
        assert world.ledger.bytes(rank=0) == pytest.approx(ring * sent, abs=8 * slack)


def test_offloaded_state_is_that_of_what_trains():
    def fn(comm, kind):
        model = MODELS["LoRA on down"]()
        host = Host()
        engine = (
            Fsdp(model, comm, host=host) if kind == 3 else Zero(model, comm, host=host)
        )
        train_step(engine, model, comm, microbatches(comm.rank, 0))
        return held(engine)["host"], sum(
            w.numel() for unit in engine.units for w in [unit.w]
        )

    for kind in (2, 3):
        for host, numbers in World(2).run(fn, kind):
            assert host == 12 * numbers


@pytest.mark.parametrize("name", ["LoRA on down", "LoRA on q and v", "norms"])
@pytest.mark.parametrize("overlap", [False, True])
def test_one_block_is_whole_at_a_time(name, overlap):
    def fn(comm):
        model = MODELS[name]()
        Fsdp(model, comm, overlap=overlap)
        seen, blocks = [], model.model.layers

        def look(*_):
            seen.append([b.mlp.up_proj.weight.numel() > 0 for b in blocks])

        for block in blocks:
            block.mlp.down_proj.register_forward_hook(look)
            block.input_layernorm.register_full_backward_hook(look)
        model(microbatches(comm.rank, 0)[0][0]).square().mean().backward()
        return seen, [w.numel() for w in model.parameters() if w.numel()]

    for seen, left in World(2).run(fn):
        assert [sum(row) for row in seen] == [1] * len(seen)
        assert len(seen) >= 5 and left == []


def test_what_lies_below_all_that_trains_is_gathered_once():
    """Backward never gets there, so nothing is asked for ahead of it."""

    def fn(comm):
        model = MODELS["all but the last block"]()
        events = []
        engine = Fsdp(
            model,
            comm,
            watch=lambda event, unit: events.append(f"{event} {unit}"),
        )
        model(microbatches(comm.rank, 0)[0][0]).square().mean().backward()
        on_their_way = [shard.name for shard in engine.shards if shard.handles]
        return [e for e in events if "gather" in e], on_their_way

    forward = ["gather root", *(f"gather block {i}" for i in range(3))]
    for events, on_their_way in World(2).run(fn):
        assert events == [*forward, "gather block 2"] and on_their_way == []


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["LoRA on down", "embedding and MLPs"])
def test_with_recomputed_activations(name, reentrant):
    class Again(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, h, *rest):
            if reentrant and not h.requires_grad:
                h = h.detach().requires_grad_()  # as that kind wants
            return checkpoint(self.block, h, *rest, use_reentrant=reentrant)

    def fn(comm):
        model = MODELS[name]().double()
        layers = list(model.model.layers)
        model.model.layers = torch.nn.ModuleList(Again(block) for block in layers)
        engine = Fsdp(model, comm, ADAM, blocks=layers)
        history = []
        for step in range(3):
            history.append(
                train_step(engine, model, comm, microbatches(comm.rank, step))
            )
        with engine.gathered():
            return history, {
                n.replace(".block.", "."): w.detach().clone()
                for n, w in model.named_parameters()
            }

    reference = one_process(MODELS[name]().double(), 2)
    assert_same(World(2).run(fn), reference, 1e-9)


def test_two_forwards_and_one_that_is_only_looked_at():
    make = MODELS["LoRA on q and v"]

    def loss(model, rank):
        x = microbatches(rank, 0)[0][0]
        return model(x).square().mean() + model(x.flip(1)).sin().mean()

    def fn(comm):
        model = make().double()
        engine = Fsdp(model, comm, ADAM)
        for _ in range(2):
            (loss(model, comm.rank) / comm.size).backward()
            with torch.no_grad():
                model(microbatches(comm.rank, 1)[0][0])
            model(microbatches(comm.rank, 1)[0][0])
            norm = engine.step()
        with engine.gathered():
            return norm, {n: w.detach().clone() for n, w in model.named_parameters()}

    model = make().double()
    trained = [w for w in model.parameters() if w.requires_grad]
    a = ADAM
    optimizer = torch.optim.AdamW(trained, a.lr, a.betas, a.eps, a.weight_decay)
    for _ in range(2):
        optimizer.zero_grad()
        (sum(loss(model, rank) for rank in range(2)) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, a.clip)
        optimizer.step()
    for mine, weights in World(2).run(fn):
        assert mine == pytest.approx(norm.item(), abs=1e-9)
        for name, w in model.named_parameters():
            torch.testing.assert_close(weights[name], w.detach(), atol=1e-9, rtol=0)


CHANGES = {
    "an adapter": lambda m: lora.apply(m, lora.LoRAConfig(r=2)),
    "frozen": lambda m: m.model.norm.weight.requires_grad_(False),
    "set free": lambda m: m.model.embed_tokens.weight.requires_grad_(True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_after_the_split_is_named(change):
    def fn(comm, kind):
        model = frozen("embed")
        engine = KINDS[kind](model, comm)
        with pytest.raises(ValueError, match=r"changed after it was split: .*adapters"):
            change(model)
            train_step(engine, model, comm, microbatches(comm.rank, 0))
        return True

    for kind in KINDS:
        assert World(2).run(fn, kind) == [True, True]


def test_a_model_that_does_not_train_is_named_and_can_be_looked_at():
    def fn(comm, kind):
        model = frozen("")
        expected = copy.deepcopy(model)(torch.tensor([[1, 2, 3]]))
        if kind in "012":
            with pytest.raises(ValueError, match="no parameter that trains"):
                KINDS[kind](model, comm)
            return True
        engine = KINDS[kind](model, comm)
        logits = model(torch.tensor([[1, 2, 3]]))
        with pytest.raises(ValueError, match="no parameter that trains"):
            engine.step()
        return torch.equal(logits, expected)

    for kind in KINDS:
        assert World(2).run(fn, kind) == [True, True]


def test_two_dtypes_that_train_are_named():
    """As in FSDP2: "expects uniform original parameter dtype"."""

    def fn(comm, kind):
        model = tiny().bfloat16()
        model.model.norm.float()
        with pytest.raises(ValueError, match=r"root .*bfloat16 and torch.float32"):
            KINDS[kind](model, comm)
        return True

    for kind in KINDS:
        assert World(1).run(fn, kind) == [True]
