"""Megatron's sequence parallelism: the split model is the whole model, and no
activation is whole on any rank.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from llmlab.parallelism import World, launch
from llmlab.parallelism.sequence import megatron as sequence
from llmlab.parallelism.sequence.activation_memory import Saved
from llmlab.parallelism.sequence.megatron import (
    gather_sequence,
    linears_of_shard,
    scatter_sequence,
)
from llmlab.parallelism.tensor import megatron as tensor
from llmlab.parallelism.tensor import vocab_parallel_cross_entropy
from tests.parallelism.conftest import ON_RANKS, VARIANTS, tiny
from tests.parallelism.tensor.test_tensor import assert_same, train, whole_loss


@pytest.fixture
def tokens():
    """13 inputs: they divide over none of the worlds below, and are padded."""
    return torch.randint(37, (2, 14), generator=torch.Generator().manual_seed(1))


def split_loss(model, tokens, comm):
    x, y = sequence.pad_to_multiple(tokens[:, :-1], tokens[:, 1:], comm.size)
    return vocab_parallel_cross_entropy(model(x), y, comm, model.config.vocab_size)


def training(comm, model, tokens, finish=sequence.sum_replicated_gradients):
    sequence.parallelize(model, comm)

    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9), []
    for _ in range(4):
        optimizer.zero_grad()
        value = split_loss(model, tokens, comm)
        value.backward()
        finish(model, comm)
        optimizer.step()
        losses.append(value.item())
    return losses, sequence.gather_state(model, comm)


@pytest.mark.parametrize(("variant", "p"), ON_RANKS)
def test_training_is_that_of_the_whole_model(variant, p, tokens):
    model = tiny(**VARIANTS[variant])
    ours = World(p).run(training, model, tokens)
    assert_same(ours, train(model, lambda m: whole_loss(m, tokens)), model.state_dict())


@pytest.mark.parametrize("p", [3, 6])
def test_training_over_three_and_six_ranks(p, tokens):
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}
    model = tiny(**sizes)
    ours = World(p).run(training, model, tokens)
    assert_same(ours, train(model, lambda m: whole_loss(m, tokens)), model.state_dict())


def test_training_in_real_processes(tokens):
    model = tiny(num_key_value_heads=2)
    ours = launch(training, 4, model, tokens)
    assert_same(ours, train(model, lambda m: whole_loss(m, tokens)), model.state_dict())


def test_without_the_sum_of_norm_gradients_the_ranks_drift_apart(tokens):
    model = tiny()
    right = copy.deepcopy(model)
    train(right, lambda m: whole_loss(m, tokens))
    states = [
        state for _, state in World(4).run(training, model, tokens, lambda m, c: None)
    ]
    norm = "model.layers.0.input_layernorm.weight"
    assert (states[0][norm] - states[3][norm]).abs().max() > 1e-3
    assert (states[0][norm] - right.state_dict()[norm]).abs().max() > 1e-3


def test_what_is_replicated():
    def fn(comm, model):
        names = {
            id(w): n for n, w in sequence.parallelize(model, comm).named_parameters()
        }
        return sorted(
            {".".join(names[id(w)].split(".")[-2:]) for w in sequence.replicated(model)}
        )

    norms = ["input_layernorm.weight", "norm.weight", "post_attention_layernorm.weight"]
    assert World(2).run(fn, tiny())[0] == norms
    biased = World(2).run(fn, tiny(attention_bias=True, mlp_bias=True))[0]
    assert biased == sorted([*norms, "o_proj.bias", "down_proj.bias"])


def test_gradients_are_slices_of_the_whole_gradients(tokens):
    model = tiny(num_key_value_heads=2, attention_bias=True, mlp_bias=True)
    whole = copy.deepcopy(model)
    whole_loss(whole, tokens).backward()

    def fn(comm, model):
        sequence.parallelize(model, comm)
        split_loss(model, tokens, comm).backward()
        sequence.sum_replicated_gradients(model, comm)
        grads = copy.deepcopy(model)
        for into, parameter in zip(grads.parameters(), model.parameters(), strict=True):
            into.data = parameter.grad
        return sequence.gather_state(grads, comm)

    for state in World(4).run(fn, model):
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(
                state[name],
                parameter.grad,
                atol=1e-5,
                rtol=1e-5,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def test_g_and_g_bar_are_conjugate():
    """Each is the other's gradient: one numbering of the elements shows both
    directions.
    """

    def fn(comm):
        r = comm.rank
        x = torch.full((1, 2, 1), float(r), requires_grad=True)
        y = torch.full((1, 4, 1), float(r + 1), requires_grad=True)
        g, g_bar = gather_sequence(x, comm), scatter_sequence(y, comm)
        # partial gradients: (r + 1) · 0 1 2 3
        (g.flatten() * torch.arange(4.0) * (r + 1)).sum().backward()
        (g_bar.flatten() * (r + 5)).sum().backward()
        return [t.flatten().tolist() for t in (g, x.grad, g_bar, y.grad)]

    first, second = World(2).run(fn)
    assert first == [[0, 0, 1, 1], [0, 3], [3, 3], [5, 5, 6, 6]]
    assert second == [[0, 0, 1, 1], [6, 9], [3, 3], [5, 5, 6, 6]]


@pytest.mark.parametrize("p", [2, 3, 4])
def test_an_mlp_from_shards_to_shards(p):
    torch.manual_seed(0)
    x, A, B = torch.randn(2, 12, 5), torch.randn(24, 5), torch.randn(5, 24)
    whole = [t.clone().requires_grad_() for t in (x, A, B)]
    out = F.linear(F.silu(F.linear(whole[0], whole[1])), whole[2])
    out.square().sum().backward()

    def fn(comm):
        r = comm.rank
        x_r, a, b = (
            t.clone().requires_grad_()
            for t in (x.chunk(p, 1)[r], A.chunk(p)[r], B.chunk(p, 1)[r])
        )
        z = scatter_sequence(
            F.linear(F.silu(linears_of_shard(x_r, comm, a)[0]), b), comm
        )
        z.square().sum().backward()
        return z.detach(), x_r.grad, a.grad, b.grad

    for r, (z, dx, da, db) in enumerate(World(p).run(fn)):
        torch.testing.assert_close(z, out.detach().chunk(p, 1)[r])
        torch.testing.assert_close(
            dx, whole[0].grad.chunk(p, 1)[r], atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(da, whole[1].grad.chunk(p)[r], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            db, whole[2].grad.chunk(p, 1)[r], atol=1e-4, rtol=1e-4
        )


def test_what_a_rank_keeps_falls_with_the_number_of_ranks():
    """Under tensor parallelism a part of the activations stays whole; with the sequence
    cut, everything is divided.
    """
    tokens = torch.randint(37, (2, 64), generator=torch.Generator().manual_seed(1))

    def fn(comm, model, method):
        {"tensor": tensor, "sequence": sequence}[method].parallelize(model, comm)
        with Saved(model.parameters()) as saved:
            model(tokens)
        return saved.bytes

    kept = {
        (m, p): World(p).run(fn, tiny(), m)[0]
        for m in ("tensor", "sequence")
        for p in (1, 8)
    }
    assert kept["tensor", 1] / kept["tensor", 8] < 3
    # the tables of RoPE are whole
    assert 6 < kept["sequence", 1] / kept["sequence", 8] < 8.1


def test_a_block_sends_four_gathers_and_two_scatters_each_way(tokens):
    """What f and g send, and two gathers backward, for the inputs that are not saved;
    the loss and the head apart.
    """

    def fn(comm, model):
        sequence.parallelize(model, comm)
        loss = split_loss(model, tokens, comm)
        before = [
            comm.ledger.count(op, comm.rank) for op in ("all_gather", "reduce_scatter")
        ]
        loss.backward()
        return before, [
            comm.ledger.count(op, comm.rank) for op in ("all_gather", "reduce_scatter")
        ]

    forward, both = World(4).run(fn, tiny())[0]
    L = 2
    assert forward == [2 * L + 1, 2 * L + 1]  # and the head's g, the embedding's ḡ
    # ḡ's gather and a second one for each product
    assert both == [2 * L + 1 + 4 * L + 2, 2 * L + 1 + 2 * L + 1]


def test_against_dtensor_on_real_processes():
    """PyTorch's SequenceParallel, ColwiseParallel and RowwiseParallel; it leaves the
    norm's gradient a partial sum, too.
    """

    def fn(comm):
        import torch.distributed.tensor.parallel as dtensor
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard

        torch.manual_seed(0)
        p, r = comm.size, comm.rank
        net = torch.nn.Sequential(
            torch.nn.RMSNorm(6),
            torch.nn.Linear(6, 16, bias=False),
            torch.nn.SiLU(),
            torch.nn.Linear(16, 6, bias=False),
        )
        norm, up, down = (net[i].weight.detach().clone() for i in (0, 1, 3))
        norm, up, down = (
            t.clone().requires_grad_()
            for t in (norm, up.chunk(p)[r], down.chunk(p, 1)[r])
        )
        mine, theirs = (
            torch.ones(2, 8, 6).cumsum(1).sin().chunk(p, 1)[r].clone().requires_grad_()
            for _ in range(2)
        )
        (h,) = linears_of_shard(F.rms_norm(mine, (6,), norm, net[0].eps), comm, up)
        ours = scatter_sequence(F.linear(F.silu(h), down), comm)
        ours.square().sum().backward()

        plan = {
            "0": dtensor.SequenceParallel(),
            "1": dtensor.ColwiseParallel(input_layouts=Shard(1)),
        }
        plan["3"] = dtensor.RowwiseParallel(output_layouts=Shard(1))
        out = dtensor.parallelize_module(net, init_device_mesh("cpu", (p,)), plan)(
            theirs
        )
        out.square().sum().backward()
        pairs = [
            (ours, out),
            (mine.grad, theirs.grad),
            (comm.all_reduce(norm.grad), net[0].weight.grad.full_tensor()),
        ]
        pairs += [
            (a.grad, net[i].weight.grad.to_local()) for a, i in ((up, 1), (down, 3))
        ]
        return max((a - b).abs().max().item() for a, b in pairs)

    assert max(launch(fn, 2, timeout=120)) < 1e-5


def test_nonsense_is_refused(tokens):
    def run(p, **kwargs):
        World(p).run(
            lambda comm, m: (
                sequence.parallelize(m, comm)(tokens[:, :8], **kwargs) and None
            ),
            tiny(),
        )

    with pytest.raises(ValueError, match="14 tokens must be a multiple of the 4 ranks"):
        World(4).run(
            lambda comm, m: sequence.parallelize(m, comm)(tokens) and None, tiny()
        )
    with pytest.raises(ValueError, match="attention_mask is not supported"):
        run(2, attention_mask=torch.ones(2, 8))
    with pytest.raises(ValueError, match="num_attention_heads=8"):
        World(3).run(lambda comm, m: sequence.parallelize(m, comm) and None, tiny())


def test_padding_is_the_least_and_ignored():
    x, y = sequence.pad_to_multiple(
        torch.ones(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.long), 4
    )
    assert x.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]] and y.tolist() == [
        [1, 1, 1, 1, 1, -100, -100, -100]
    ]
    assert sequence.pad_to_multiple(x, y, 4)[0].shape == (1, 8)
