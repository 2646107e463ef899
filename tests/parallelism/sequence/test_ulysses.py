"""Ulysses is full attention: forward and gradients, uneven shards, fewer key/value
heads than ranks.
"""

from __future__ import annotations

import pytest
import torch

from llmlab.parallelism import World, launch
from llmlab.parallelism.sequence.cost import AttentionShape, sent
from llmlab.parallelism.sequence.shards import (
    join,
    shards,
    split_loss,
    sum_gradients,
    take,
)
from llmlab.parallelism.sequence.ulysses import (
    UlyssesAttention,
    heads_to_tokens,
    tokens_to_heads,
)
from tests.covering import each_value
from tests.parallelism.conftest import VARIANTS, tiny
from tests.parallelism.sequence.test_ring_attention import full
from tests.parallelism.tensor.test_tensor import assert_same, train, whole_loss


def inputs(T, H, K, D=8, B=2):
    torch.manual_seed(T)
    return [torch.randn(B, n, T, D) for n in (H, K, K, H)]


def ulysses(comm, tensors, cut):
    q, k, v, do = (take(t, cut, comm.rank, 2) for t in tensors)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out = UlyssesAttention(comm, [len(c) for c in cut])(q, k, v)
    out.backward(do)
    return [join(t, cut, comm, 2) for t in (out.detach(), q.grad, k.grad, v.grad)]


@pytest.mark.parametrize("T", [24, 29])
@pytest.mark.parametrize("K", [1, 2, 3, 12])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 6])
def test_forward_and_gradients_are_those_of_full_attention(p, K, T):
    tensors, cut = inputs(T, 12, K), shards(T, p, "contiguous")
    expected = full(*tensors)
    for result in World(p).run(ulysses, tensors, cut):
        for ours, theirs in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_in_real_processes():
    tensors, cut = inputs(29, 8, 2), shards(29, 4, "contiguous")
    for result in launch(ulysses, 4, tensors, cut):
        for ours, theirs in zip(result, full(*tensors), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_exchange_and_back():
    x, cut = torch.arange(2 * 6 * 7 * 3.0).view(2, 6, 7, 3), shards(7, 3, "contiguous")

    def fn(comm):
        mine = take(x, cut, comm.rank, 2)
        heads = tokens_to_heads(mine, comm)
        assert torch.equal(heads, x.chunk(3, 1)[comm.rank])
        return torch.equal(heads_to_tokens(heads, comm, [len(c) for c in cut]), mine)

    assert all(World(3).run(fn))


def training(comm, model, tokens):
    cut = shards(tokens.shape[1] - 1, comm.size, "contiguous")
    x, y = take(tokens[:, :-1], cut, comm.rank), take(tokens[:, 1:], cut, comm.rank)
    attention = UlyssesAttention(comm, [len(c) for c in cut])
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.3, 0.9), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = split_loss(
            model(x, position_ids=cut[comm.rank][None], attention=attention), y, comm
        )
        loss.backward()
        sum_gradients(model, comm)
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.parametrize(
    ("p", "variant"), [*each_value([2, 4, 8, 4], list(VARIANTS)), (8, "two kv heads")]
)
def test_training_is_that_of_the_whole_model(p, variant):
    tokens = torch.randint(37, (2, 14), generator=torch.Generator().manual_seed(1))
    model = tiny(**VARIANTS[variant])
    ours = World(p).run(training, model, tokens)
    assert_same(ours, train(model, lambda m: whole_loss(m, tokens)), model.state_dict())


@pytest.mark.parametrize("p", [3, 6])
def test_training_over_three_and_six_ranks(p):
    tokens = torch.randint(37, (2, 14), generator=torch.Generator().manual_seed(1))
    model = tiny(num_attention_heads=6, num_key_value_heads=3, head_dim=4)
    ours = World(p).run(training, model, tokens)
    assert_same(ours, train(model, lambda m: whole_loss(m, tokens)), model.state_dict())


def test_training_in_real_processes():
    tokens = torch.randint(37, (2, 14), generator=torch.Generator().manual_seed(1))
    model = tiny(num_key_value_heads=2)
    ours = launch(training, 4, model, tokens)
    assert_same(ours, train(model, lambda m: whole_loss(m, tokens)), model.state_dict())


@pytest.mark.parametrize(("p", "H", "K"), [(2, 8, 8), (4, 8, 4), (4, 8, 2), (3, 6, 2)])
def test_bytes_are_those_of_the_formula(p, H, K):
    """4 T d / p · (p − 1)/p numbers with K = H; K < p costs copies, as many as make the
    heads divide.
    """
    T, D, B = 12, 8, 2
    tensors, cut = inputs(T, H, K), shards(T, p, "contiguous")
    world, shape = World(p), AttentionShape(B, T, H, K, D)
    world.run(
        lambda comm: UlyssesAttention(comm, [len(c) for c in cut])(
            *(take(t, cut, comm.rank, 2) for t in tensors[:3])
        )
    )
    assert world.ledger.per_rank() == [sent("ulysses", p, shape, itemsize=4)] * p
    if H == K:
        assert world.ledger.bytes(rank=0) == 4 * B * T * H * D / p * (p - 1) / p * 4
    both = World(p)
    both.run(lambda comm: ulysses(comm, tensors, cut) and None)
    exchanged = sum(e.bytes for e in both.ledger.events("all_to_all", rank=0))
    assert (
        exchanged
        == 2 * sent("ulysses", p, shape, itemsize=4)
        == 2 * sent("ulysses", p, shape, backward=True, itemsize=4)
    )


def test_against_deepspeed_on_real_processes(deepspeed):
    """deepspeed.sequence.layer.DistributedAttention: the same output and gradients, to
    the bit.
    """
    from deepspeed.sequence.layer import DistributedAttention

    from llmlab.models.attention import sdpa

    def fn(comm):
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        torch.manual_seed(0)

        def swap(t):
            return t.transpose(1, 2)  #  theirs has (B, T, H, D)

        mine = [
            torch.randn(2, 4, 16, 6)
            .chunk(comm.size, 2)[comm.rank]
            .clone()
            .requires_grad_()
            for _ in range(3)
        ]
        theirs = [swap(t.detach()).contiguous().requires_grad_() for t in mine]
        ours = UlyssesAttention(comm, [16 // comm.size] * comm.size)(*mine)
        ours.square().sum().backward()

        def local(q, k, v):
            return swap(sdpa(swap(q), swap(k), swap(v), None))

        out = DistributedAttention(local, torch.distributed.group.WORLD)(*theirs, 0)
        out.square().sum().backward()
        pairs = [
            (ours, swap(out)),
            *((a.grad, swap(b.grad)) for a, b in zip(mine, theirs, strict=True)),
        ]
        return max((a - b).abs().max().item() for a, b in pairs)

    assert max(launch(fn, 2, timeout=180)) < 1e-6


def test_nonsense_is_refused():
    def run(H, K, lengths, mask=None):
        q, k = torch.zeros(1, H, 4, 2), torch.zeros(1, K, 4, 2)
        World(4).run(lambda comm: UlyssesAttention(comm, lengths)(q, k, k, mask))

    with pytest.raises(
        ValueError, match="6 query heads must be a multiple of the 4 ranks"
    ):
        run(6, 6, [4] * 4)
    with pytest.raises(ValueError, match="lengths=\\[4, 4\\] must name"):
        run(8, 8, [4, 4])
    with pytest.raises(ValueError, match="mask must be None"):
        run(8, 8, [4] * 4, torch.ones(1))
