"""1-D tensor parallelism: the split model is the whole model, forward, gradients and
training, in threads and processes.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from llmlab.parallelism import World, launch
from llmlab.parallelism.tensor.cost import llama_sent
from llmlab.parallelism.tensor.megatron import (
    PLAN,
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_ranks,
    gather_from_ranks,
    gather_state,
    parallelize,
    region_seed,
    sum_over_ranks,
    vocab_parallel_cross_entropy,
)
from tests.parallelism.conftest import ON_RANKS, VARIANTS, tiny


def whole_loss(model, tokens):
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def split_loss(model, tokens, comm):
    return vocab_parallel_cross_entropy(
        model(tokens[:, :-1]), tokens[:, 1:], comm, model.config.vocab_size
    )


def train(model, loss, steps=4):
    """A few steps of SGD with momentum, large enough to move every weight by far more
    than the tolerance.
    """
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9), []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def split_training(comm, model, tokens):
    parallelize(model, comm)
    losses = train(model, lambda m: split_loss(m, tokens, comm))
    return losses, gather_state(model, comm)


def assert_same(ours, losses, state):
    for mine, mine_state in ours:
        assert mine == pytest.approx(losses, abs=1e-5)
        assert mine_state.keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(
                mine_state[name],
                value,
                atol=1e-5,
                rtol=0,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.mark.parametrize(("variant", "p"), ON_RANKS)
def test_training_is_that_of_the_whole_model(variant, p, tokens):
    """Four optimizer steps in World: losses and every weight, to 1e-5."""
    model = tiny(**VARIANTS[variant])
    ours = World(p).run(split_training, model, tokens)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    losses = train(model, lambda m: whole_loss(m, tokens))
    assert_same(ours, losses, model.state_dict())
    moved = max((model.state_dict()[k] - v).abs().max() for k, v in start.items())
    assert moved > 0.05, "the steps must be large against the tolerance"


@pytest.mark.parametrize("variant", ["two kv heads", "one kv head, tied"])
def test_training_in_real_processes(variant, tokens):
    model = tiny(**VARIANTS[variant])
    ours = launch(split_training, 4, model, tokens)
    assert_same(ours, train(model, lambda m: whole_loss(m, tokens)), model.state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_slices_of_the_whole_gradients(variant, tokens):
    model = tiny(**VARIANTS[variant])
    whole = copy.deepcopy(model)
    whole_loss(whole, tokens).backward()

    def fn(comm, model):
        parallelize(model, comm)
        split_loss(model, tokens, comm).backward()
        grads = copy.deepcopy(model)
        for into, parameter in zip(grads.parameters(), model.parameters(), strict=True):
            into.data = parameter.grad
        return gather_state(grads, comm)

    for state in World(4).run(fn, model):
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(
                state[name],
                parameter.grad,
                atol=1e-5,
                rtol=1e-5,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.mark.parametrize("p", [2, 4])
def test_gathered_logits_generation_and_cache(p, tokens):
    from llmlab.models.cache import KVCache

    model = tiny()
    with torch.no_grad():
        expected = model(tokens)

    def fn(comm, model):
        parallelize(model, comm, gather_output=True)
        cache = KVCache(2)
        with torch.no_grad():
            stepwise = torch.cat(
                [
                    model(tokens[:, i : i + 1], cache=cache)
                    for i in range(tokens.shape[1])
                ],
                1,
            )
        assert cache.keys[0].shape[1] == 4 // p, (
            "each rank caches its own key/value heads only"
        )
        logits = model(tokens)[..., :37]
        logits.square().mean().backward()
        return logits.detach(), stepwise[..., :37], model.model.norm.weight.grad

    model.zero_grad()
    model(tokens).square().mean().backward()
    for logits, stepwise, grad in World(p).run(fn, copy.deepcopy(model)):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(stepwise, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            grad, model.model.norm.weight.grad, atol=1e-5, rtol=1e-4
        )


def test_round_trip():
    model = tiny(num_key_value_heads=2)
    for state in World(8).run(
        lambda comm, m: gather_state(parallelize(m, comm), comm), model
    ):
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_each_rank_holds_its_share():
    def fn(comm, model):
        return {
            n: tuple(p.shape) for n, p in parallelize(model, comm).named_parameters()
        }

    shapes = World(4).run(fn, tiny(num_key_value_heads=2))[0]
    block = "model.layers.0."
    # ⌈37/4⌉
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (10, 24)
    assert shapes[block + "self_attn.q_proj.weight"] == (12, 24) and shapes[
        block + "self_attn.k_proj.weight"
    ] == (
        6,
        24,
    )
    assert shapes[block + "self_attn.o_proj.weight"] == (24, 12) and shapes[
        block + "mlp.down_proj.weight"
    ] == (24, 12)
    assert shapes[block + "input_layernorm.weight"] == (24,)
    assert {name.split(".")[-2] for name in shapes} >= {module for module, _, _ in PLAN}


def test_tied_weights_stay_one_tensor(tokens):
    def fn(comm, model):
        parallelize(model, comm)
        return model.lm_head.weight is model.model.embed_tokens.weight, len(
            list(model.parameters())
        )

    model = tiny(tie_word_embeddings=True)
    assert World(2).run(fn, model) == [(True, len(list(model.parameters())))] * 2


def test_a_block_costs_two_all_reduces_each_way(tokens):
    """Megatron's count: 2 forward and 2 backward a block; 1 for the embedding, 1 for
    the head's f, 2 for the loss.
    """

    def forward(comm, model):
        parallelize(model, comm)
        comm.ledger.clear() if comm.rank == 0 else None
        comm.barrier()
        loss = split_loss(model, tokens, comm)
        comm.barrier()
        before = comm.ledger.count("all_reduce", comm.rank)
        comm.barrier()
        loss.backward()
        return before, comm.ledger.count("all_reduce", comm.rank) - before

    world = World(4)
    assert set(world.run(forward, tiny())) == {(2 * 2 + 1 + 2, 2 * 2 + 1)}
    T, d = tokens.shape[0] * (tokens.shape[1] - 1), 24
    blocks = [
        e for e in world.ledger.events("all_reduce", rank=0) if e.shape == (2, 8, 24)
    ][1:-1]  # without embedding …
    total = sum(
        e.bytes
        for e in world.ledger.events("all_reduce", rank=0)
        if e.shape == (2, 8, 24)
    )
    assert len(blocks) == 8
    per_reduce = 2 * 3 / 4 * T * d * 4
    # … and the head's f
    assert total - 2 * per_reduce == llama_sent(4, T, d, 2, itemsize=4)


def test_logits_are_never_gathered(tokens):
    def fn(comm, model):
        parallelize(model, comm)
        split_loss(model, tokens, comm).backward()

    world = World(4)
    world.run(fn, tiny())
    assert world.ledger.count("all_gather") == 0


def test_works_on_transformers_models(tokens):
    transformers = pytest.importorskip("transformers")
    for kv in (4, 2):
        config = transformers.LlamaConfig(
            vocab_size=37,
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=kv,
            head_dim=6,
        )
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        expected = F.cross_entropy(
            model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()
        )
        expected.backward()
        norm = model.model.norm.weight.grad.clone()
        model.zero_grad()

        def fn(comm, model):
            parallelize(model, comm)
            loss = vocab_parallel_cross_entropy(
                model(tokens[:, :-1]).logits, tokens[:, 1:], comm, 37
            )
            loss.backward()
            return loss.item(), model.model.norm.weight.grad

        for loss, grad in World(4).run(fn, model):
            assert loss == pytest.approx(expected.item(), abs=1e-5)
            torch.testing.assert_close(grad, norm, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("p", [2, 3, 4])
def test_column_then_row_is_an_mlp(p):
    torch.manual_seed(0)
    A, a, B, b = torch.randn(12, 5), torch.randn(12), torch.randn(5, 12), torch.randn(5)
    x = torch.randn(3, 5)

    def fn(comm):
        r, mine = comm.rank, x.clone().requires_grad_()
        first = ColumnParallelLinear(A.chunk(p)[r], a.chunk(p)[r], comm)
        second = RowParallelLinear(B.chunk(p, 1)[r], b, comm)
        out = second(F.silu(first(mine)))
        out.sum().backward()
        return out.detach(), mine.grad, second.bias.grad, first.bias.grad

    whole = [t.clone().requires_grad_() for t in (x, a, b)]
    out = F.linear(F.silu(F.linear(whole[0], A, whole[1])), B, whole[2])
    out.sum().backward()
    results = World(p).run(fn)
    for y, dx, db, _ in results:
        torch.testing.assert_close(y, out.detach())
        torch.testing.assert_close(dx, whole[0].grad)
        torch.testing.assert_close(db, whole[2].grad)
    torch.testing.assert_close(torch.cat([r[3] for r in results]), whole[1].grad)


def test_f_and_g_are_conjugate():
    def fn(comm):
        x, y, z = (
            torch.full((2,), float(comm.rank + 1), requires_grad=True) for _ in range(3)
        )
        f, g = copy_to_ranks(x, comm), sum_over_ranks(y, comm)
        gathered = gather_from_ranks(z, comm)
        (
            f.sum() * (comm.rank + 1)
            + g.sum() * 5
            + (gathered * torch.arange(6.0)).sum()
        ).backward()
        return (
            f.tolist(),
            x.grad.tolist(),
            g.tolist(),
            y.grad.tolist(),
            gathered.tolist(),
            z.grad.tolist(),
        )

    assert World(3).run(fn)[1] == (
        [2, 2],
        [6, 6],
        [6, 6],
        [5, 5],
        [1, 1, 2, 2, 3, 3],
        [2, 3],
    )


def test_dropout_seeds_differ_inside_regions_and_agree_outside():
    def fn(comm):
        def mask(split):
            generator = torch.Generator().manual_seed(region_seed(7, comm, split=split))
            return torch.rand(64, generator=generator) > 0.5

        return mask(True), mask(False)

    masks = World(3).run(fn)
    assert all(torch.equal(masks[0][1], same) for _, same in masks)
    assert not any(
        torch.equal(masks[i][0], masks[j][0]) for i in range(3) for j in range(i)
    )


@pytest.mark.parametrize(
    ("changes", "p", "says"),
    [
        ({}, 3, "num_attention_heads=8"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 2},
            4,
            "num_key_value_heads=6",
        ),
        ({"intermediate_size": 50}, 4, "intermediate_size=50"),
    ],
)
def test_what_does_not_divide_is_named(changes, p, says):
    with pytest.raises(ValueError, match=says):
        World(p).run(lambda comm, m: parallelize(m, comm) and None, tiny(**changes))


def test_against_dtensor_on_real_processes():
    """PyTorch's own ColwiseParallel and RowwiseParallel: same output, same gradients,
    same shards.
    """

    def fn(comm):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        torch.manual_seed(0)
        mlp = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.SiLU(), torch.nn.Linear(16, 6)
        )
        x, r = torch.randn(5, 6), comm.rank
        first = ColumnParallelLinear(
            mlp[0].weight.detach().chunk(2)[r].clone(),
            mlp[0].bias.detach().chunk(2)[r].clone(),
            comm,
        )
        second = RowParallelLinear(
            mlp[2].weight.detach().chunk(2, 1)[r].clone(),
            mlp[2].bias.detach().clone(),
            comm,
        )
        ours, mine = second(F.silu(first(a := x.clone().requires_grad_()))), a
        ours.square().sum().backward()
        mesh = init_device_mesh("cpu", (comm.size,))
        theirs = parallelize_module(
            mlp, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}
        )
        out = theirs(b := x.clone().requires_grad_())
        out.square().sum().backward()
        pairs = [
            (ours, out),
            (mine.grad, b.grad),
            (second.bias.grad, mlp[2].bias.grad.to_local()),
        ]
        pairs += [
            (mine.weight.grad, mlp[i].weight.grad.to_local())
            for i, mine in ((0, first), (2, second))
        ]
        return max((p - q).abs().max().item() for p, q in pairs)

    assert max(launch(fn, 2, timeout=120)) < 1e-5
