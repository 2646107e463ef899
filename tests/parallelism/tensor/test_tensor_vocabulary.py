"""The vocabulary split over ranks: equal to the whole, never gathering logits, stable
for large ones.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.parallelism import World
from llmlab.parallelism.tensor.megatron import (
    VocabParallelEmbedding,
    rows_per_rank,
    vocab_parallel_cross_entropy,
)


def pieces(whole: torch.Tensor, p: int, dim: int) -> list[torch.Tensor]:
    """Padded with garbage, so that a mask that is missing is seen."""
    rows = rows_per_rank(whole.shape[dim], p)
    padding = list(whole.shape)
    padding[dim] = rows * p - whole.shape[dim]
    return list(torch.cat([whole, torch.full(padding, 50.0)], dim).split(rows, dim))


@settings(max_examples=25, deadline=None)
@given(
    p=st.sampled_from([1, 2, 3, 4, 5, 8]),
    V=st.integers(2, 40),
    N=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_cross_entropy_is_that_of_the_whole(p, V, N, seed):
    g = torch.Generator().manual_seed(seed)
    logits, targets = (
        5 * torch.randn(2, N, V, generator=g),
        torch.randint(V, (2, N), generator=g),
    )
    if N > 1:
        targets[0, 0] = -100
    whole = logits.clone().requires_grad_()
    expected = F.cross_entropy(whole.flatten(0, 1), targets.flatten())
    (3 * expected).backward()

    def fn(comm):
        mine = pieces(logits, p, -1)[comm.rank].clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(mine, targets, comm, V)
        (3 * loss).backward()
        return loss.item(), mine.grad

    results = World(p).run(fn)
    assert all(loss == pytest.approx(expected.item(), abs=1e-5) for loss, _ in results)
    joined = torch.cat([grad for _, grad in results], -1)
    torch.testing.assert_close(joined[..., :V], whole.grad, atol=1e-6, rtol=1e-4)
    assert not joined[..., V:].any(), "padding gets no gradient"


def test_it_sends_three_numbers_a_token():
    N, V, p = 16, 64, 4

    def fn(comm):
        z = torch.randn(N, V // p, requires_grad=True)
        vocab_parallel_cross_entropy(
            z, torch.zeros(N, dtype=torch.int64), comm, V
        ).backward()

    world = World(p)
    world.run(fn)
    assert (
        world.ledger.count(rank=0) == 2
        and world.ledger.bytes(rank=0) == 2 * (p - 1) / p * 3 * N * 4
    )


def test_logits_of_hundreds_do_not_overflow_and_half_precision_sums_in_fp32():
    logits = torch.tensor([[300.0, 299.0, -300.0, 298.0]])

    def fn(comm, dtype):
        return vocab_parallel_cross_entropy(
            logits.chunk(2, 1)[comm.rank].to(dtype), torch.tensor([1]), comm, 4
        )

    for loss in World(2).run(fn, torch.float32):
        assert loss.item() == pytest.approx(
            F.cross_entropy(logits, torch.tensor([1])).item(), abs=1e-6
        )
    assert World(2).run(fn, torch.bfloat16)[0].dtype == torch.float32
    assert World(2).run(fn, torch.float64)[0].dtype == torch.float64


@pytest.mark.parametrize("p", [1, 2, 3, 5])
def test_embedding_is_that_of_the_whole(p):
    torch.manual_seed(0)
    weight, tokens = torch.randn(11, 3), torch.tensor([[0, 10, 5], [3, 3, 7]])
    table = weight.clone().requires_grad_()
    (F.embedding(tokens, table) ** 2).sum().backward()

    def fn(comm):
        embed = VocabParallelEmbedding(pieces(weight, p, 0)[comm.rank].clone(), comm)
        out = embed(tokens)
        (out**2).sum().backward()
        return out.detach(), embed.weight.grad

    results = World(p).run(fn)
    for out, _ in results:
        torch.testing.assert_close(out, F.embedding(tokens, weight))
    torch.testing.assert_close(torch.cat([g for _, g in results])[:11], table.grad)


def test_nonsense_is_refused():
    z, t = torch.zeros(2, 5), torch.tensor([0, 9])
    with pytest.raises(ValueError, match="5 columns"):
        World(2).run(lambda comm: vocab_parallel_cross_entropy(z, t, comm, 12))
    with pytest.raises(ValueError, match="targets must lie in 0 … 8"):
        World(2).run(lambda comm: vocab_parallel_cross_entropy(z, t, comm, 9))
