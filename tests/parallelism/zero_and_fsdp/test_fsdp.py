"""Stage 3: when weights are gathered and freed, what that holds and sends, and what
else can be done with such a model.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from llmlab.parallelism import Link, World
from llmlab.parallelism.zero_and_fsdp.cost import sent_bytes, state_bytes
from llmlab.parallelism.zero_and_fsdp.fsdp import Fsdp
from llmlab.parallelism.zero_and_fsdp.units import Adam, held
from llmlab.parallelism.zero_and_fsdp.zero import Zero, summed_loss, train_step
from tests.parallelism.conftest import tiny
from tests.parallelism.zero_and_fsdp.test_zero import (
    assert_same,
    microbatches,
    one_process,
)


def even(**changes):
    """A model of which every parameter has rows that divide by 4."""
    return tiny(vocab_size=40, num_hidden_layers=3, **changes)


def batch(comm):
    return torch.randint(37, (2, 6), generator=torch.Generator().manual_seed(comm.rank))


def test_gathered_before_forward_and_backward_and_freed_after_each():
    """The order of events for three blocks, without overlap; the root stays from first
    to last.
    """

    def fn(comm, model):
        events = []
        engine = Fsdp(
            model,
            comm,
            overlap=False,
            watch=lambda event, unit: events.append(f"{event} {unit}"),
        )
        model(batch(comm)).square().mean().backward()
        engine.step()
        return events

    forward = [
        f"{event} block {i}"
        for i in range(3)
        for event in ("gather", "forward", "free")
    ]
    backward = [
        f"{event} block {i}"
        for i in (2, 1, 0)
        for event in ("gather", "backward", "free", "reduce")
    ]
    root = ["backward root", "free root", "reduce root"]
    for events in World(2).run(fn, even()):
        assert events == ["gather root", *forward, "forward root", *backward, *root]


@pytest.mark.parametrize("overlap", [False, True])
def test_one_block_is_whole_at_a_time(overlap):
    """Seen from outside: how many blocks have weights while a block computes, forward
    and in the middle of backward.
    """

    def fn(comm, model):
        Fsdp(model, comm, overlap=overlap)
        seen, blocks = [], model.model.layers

        def look(*_):
            return seen.append([b.mlp.up_proj.weight.numel() > 0 for b in blocks])

        for block in blocks:
            block.mlp.down_proj.register_forward_hook(look)
            block.self_attn.o_proj.register_full_backward_hook(look)
        model(batch(comm)).square().mean().backward()
        look()
        return seen

    for seen in World(2).run(fn, even()):
        assert [sum(row) for row in seen] == [1] * 6 + [0]
        assert [row.index(True) for row in seen[:-1]] == [0, 1, 2, 2, 1, 0]


def test_a_freed_parameter_is_empty_and_safe_to_touch():
    def fn(comm, model):
        engine = Fsdp(model, comm)
        empty = [w.numel() for w in model.parameters()]
        total = sum(w.sum() for w in model.parameters())
        with engine.gathered():
            whole = {n: w.detach().clone() for n, w in model.named_parameters()}
        return sum(empty), total.item(), whole

    model = even()
    for empty, total, whole in World(3).run(fn, model):
        assert empty == 0 and total == 0
        assert all(torch.equal(whole[n], w) for n, w in model.named_parameters())


@pytest.mark.parametrize("layout", ["flat", "rows"])
def test_what_a_rank_holds(layout):
    """16Ψ/N between steps (gradients counted when they are there), and never more than
    the root and two blocks besides.
    """

    def fn(comm, model):
        total = sum(w.numel() for w in model.parameters())
        block = sum(w.numel() for w in model.model.layers[0].parameters())
        most = []
        engine = Fsdp(
            model,
            comm,
            layout=layout,
            watch=lambda event, _: most.append(held(engine)["weights"]),
        )
        loss = summed_loss(model, batch(comm), batch(comm))
        rest_between = held(engine)
        loss.backward()
        at_step = held(engine)
        engine.step()
        return total, block, max(most), rest_between, at_step, held(engine)

    for total, block, most, between, at_step, after in World(4).run(
        fn, even().bfloat16()
    ):
        formula = state_bytes(3, total, 4)
        assert {k: at_step[k] for k in formula} == formula and at_step["host"] == 0
        assert after == at_step | {"gradients": 0}
        root = total - 3 * block
        assert between["weights"] == 2 * total / 4 + 2 * root
        assert most == 2 * total / 4 + 2 * root + 2 * 2 * block


def test_stages_0_to_2_hold_what_the_formula_says():
    def fn(comm, model, stage):
        total = sum(w.numel() for w in model.parameters())
        engine = Zero(model, comm, stage=stage)
        summed_loss(model, batch(comm), batch(comm)).backward()
        now = held(engine)
        engine.step()
        return total, now

    for stage in (0, 1, 2):
        for total, now in World(4).run(fn, even().bfloat16(), stage):
            assert now == state_bytes(stage, total, 4) | {"host": 0}


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_a_step_sends_is_the_formula(stage, m):
    def fn(comm, model):
        total = sum(w.numel() for w in model.parameters())
        root = total - sum(w.numel() for w in model.model.layers.parameters())
        engine = Fsdp(model, comm) if stage == 3 else Zero(model, comm, stage=stage)
        for _ in range(m):
            summed_loss(model, batch(comm), batch(comm)).backward()
        engine.step()
        return total, root

    world = World(4)
    total, root = world.run(fn, even().bfloat16())[0]
    # one number: the gradient's norm
    norm = world.ledger.bytes("all_reduce", 0) if stage else 0
    assert norm <= 8
    assert world.ledger.bytes(rank=0) - norm == sent_bytes(
        stage, total, 4, microbatches=m, kept=root
    )


def test_overlap_hides_the_wire():
    """The same bytes, the same losses, less time on the ledger's clock: gathers and
    reductions run while a block computes.
    """

    def fn(comm, model, overlap):
        work = {"forward": 1.0, "backward": 2.0}

        def watch(event, unit):
            return (
                comm.work(work[event], unit)
                if event in work and unit != "root"
                else None
            )

        engine = Fsdp(model, comm, Adam(), overlap=overlap, watch=watch)
        return [
            train_step(engine, model, comm, microbatches(comm.rank, i))
            for i in range(2)
        ]

    model = even()
    block = sum(w.numel() for w in model.model.layers[0].parameters()) * 4
    # a block's gather: one second
    world = World(2, link=Link(latency=0.0, bandwidth=block / 2))
    results, seconds, sent = {}, {}, {}
    for overlap in (False, True):
        results[overlap] = world.run(fn, model, overlap)
        seconds[overlap], sent[overlap] = world.ledger.time, world.ledger.bytes()
    assert results[False] == results[True] and sent[False] == sent[True]
    hidden = (
        2 * 2 * (2 + 2 + 2)
        # in each microbatch all but the first of three gathers, each way, and the last
        # reduction
    )
    assert seconds[False] - seconds[True] == pytest.approx(hidden, abs=0.5)


def test_evaluation_leaves_nothing_behind():
    def fn(comm, model):
        engine = Fsdp(model, comm)
        with torch.no_grad():
            logits = model(batch(comm))
        return (
            logits,
            sum(w.numel() for w in model.parameters()),
            [shard.whole for shard in engine.shards],
        )

    model = even()
    for rank, (logits, left, whole) in enumerate(World(2).run(fn, model)):
        x = torch.randint(37, (2, 6), generator=torch.Generator().manual_seed(rank))
        torch.testing.assert_close(logits, model(x).detach())
        assert left == 0 and not any(whole)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_forward_without_a_backward_leaves_no_old_weights(overlap):
    def fn(comm, model):
        engine = Fsdp(model, comm, Adam(lr=0.1), overlap=overlap)
        train_step(engine, model, comm, microbatches(comm.rank, 0))
        summed_loss(model, batch(comm), batch(comm)).backward()
        model(batch(comm))  # looked at, never differentiated: the root is whole now
        engine.step()
        with torch.no_grad():
            after = model(batch(comm))
        with engine.gathered():
            return after, copy.deepcopy(model.state_dict())

    for rank, (after, state) in enumerate(World(2).run(fn, even())):
        fresh = even()
        fresh.load_state_dict(state)
        x = torch.randint(37, (2, 6), generator=torch.Generator().manual_seed(rank))
        torch.testing.assert_close(after, fresh(x).detach())


def test_two_forwards_before_one_backward():
    def fn(comm, model):
        engine = Fsdp(model, comm, Adam(lr=0.1, eps=1e-4))
        x = batch(comm)
        (model(x).square().mean() + model(x.flip(1)).sin().mean()).div(
            comm.size
        ).backward()
        norm = engine.step()
        with engine.gathered():
            return norm, copy.deepcopy(model.state_dict())

    model = even(tie_word_embeddings=True)
    results = World(2).run(fn, model)
    for r in range(2):
        x = torch.randint(37, (2, 6), generator=torch.Generator().manual_seed(r))
        (model(x).square().mean() + model(x.flip(1)).sin().mean()).div(2).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters(), 0.1, eps=1e-4, weight_decay=0.01).step()
    for mine, state in results:
        assert mine == pytest.approx(norm.item(), abs=1e-5)
        for name, w in model.state_dict().items():
            torch.testing.assert_close(state[name], w, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", ["reentrant", "stops early", "to the end"])
def test_with_recomputed_activations(how):
    """Recomputation runs a block's forward a second time in the middle of backward: its
    weights must stay for what follows.
    """
    from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

    def recompute(model):
        layers = list(model.model.layers)

        class Again(torch.nn.Module):
            def __init__(self, block):
                super().__init__()
                self.block = block

            def forward(self, *args):
                with set_checkpoint_early_stop(how == "stops early"):
                    return checkpoint(
                        self.block, *args, use_reentrant=how == "reentrant"
                    )

        model.model.layers = torch.nn.ModuleList(Again(block) for block in layers)
        return layers

    def fn(comm, model):
        engine = Fsdp(
            model,
            comm,
            Adam(lr=0.02, clip=0.1, weight_decay=0.1),
            blocks=recompute(model),
        )
        history = [
            train_step(engine, model, comm, microbatches(comm.rank, i))
            for i in range(3)
        ]
        with engine.gathered():
            return history, {
                n.replace(".block.", "."): w.detach().clone()
                for n, w in model.named_parameters()
            }

    adam = Adam(lr=0.02, clip=0.1, weight_decay=0.1)
    reference = one_process(even().double(), 2, adam, 3)
    assert_same(World(2).run(fn, even().double()), reference, 1e-9)


def test_rows_keep_whole_rows():
    """Rank r of N holds rows r·⌈n/N⌉ … of every parameter: what a checkpoint of FSDP2
    has under the parameter's own name.
    """

    def fn(comm, model):
        engine = Fsdp(model, comm, layout="rows")
        return engine.units[0].new_piece()[0], engine.units[0].shapes

    model = even()
    weights = [w.detach() for w in model.model.layers[0].parameters()]
    for rank, (piece, shapes) in enumerate(World(4).run(fn, model)):
        assert torch.equal(
            piece, torch.cat([w.chunk(4)[rank].flatten() for w in weights])
        )
        assert shapes == [tuple(w.shape) for w in weights]


@pytest.mark.parametrize("kind", [2, 3])
def test_on_a_transformers_model(kind):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=37,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double()
    adam = Adam(lr=0.02, clip=0.1)

    def fn(comm, model):
        engine = (
            Fsdp(model, comm, adam)
            if kind == 3
            else Zero(model, comm, adam, stage=kind)
        )
        history = [
            train_step(engine, model, comm, microbatches(comm.rank, i))
            for i in range(3)
        ]
        with engine.gathered():
            return history, {n: w.detach().clone() for n, w in model.named_parameters()}

    results = World(3).run(fn, model)
    optimizer = torch.optim.AdamW(
        model.parameters(), adam.lr, eps=adam.eps, weight_decay=adam.weight_decay
    )
    history = []
    for step in range(3):
        data = [b for rank in range(3) for b in microbatches(rank, step)]
        logits = torch.cat([model(x).logits.flatten(0, 1) for x, _ in data])
        loss = F.cross_entropy(
            logits, torch.cat([y.flatten() for _, y in data]), ignore_index=-100
        )
        optimizer.zero_grad()
        loss.backward()
        history.append(
            (
                loss.item(),
                torch.nn.utils.clip_grad_norm_(model.parameters(), adam.clip).item(),
            )
        )
        optimizer.step()
    # transformers multiplies RMSNorm and RoPE in fp32 whatever the model's dtype
    assert_same(
        results, (history, {n: w.detach() for n, w in model.named_parameters()}), 1e-5
    )
