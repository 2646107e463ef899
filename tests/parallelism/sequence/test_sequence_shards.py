"""Who has which tokens, and a loss that does not depend on it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmlab.parallelism import World
from llmlab.parallelism.sequence.shards import (
    LAYOUTS,
    join,
    schedule,
    shards,
    split_loss,
    take,
)


def test_layouts():
    named = {kind: [s.tolist() for s in shards(8, 2, kind)] for kind in LAYOUTS}
    assert named["contiguous"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert named["zigzag"] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert named["striped"] == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("T", "p"), [(12, 3), (13, 3), (29, 4), (17, 6), (5, 1)])
def test_every_token_once_and_nearly_even(T, p, kind):
    cut = shards(T, p, kind)
    assert torch.cat(cut).sort().values.tolist() == list(range(T)) and len(cut) == p
    sizes = [len(c) for c in cut]
    assert max(sizes) - min(sizes) <= (2 if kind == "zigzag" else 1)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("T", "p"), [(24, 4), (29, 3), (25, 6)])
def test_schedule_counts_the_pairs_of_the_mask(T, p, kind):
    cut, mask = shards(T, p, kind), torch.ones(T, T).tril()
    for rank, step, source, pairs in schedule(cut):
        assert source == (rank - step) % p
        assert pairs == mask[cut[rank]][:, cut[source]].sum()
    assert sum(pairs for *_, pairs in schedule(cut)) == T * (T + 1) // 2
    assert sum(pairs for *_, pairs in schedule(cut, causal=False)) == T * T


def test_zigzag_gives_every_rank_the_same_work_in_every_step():
    def work(kind):
        return {(r, s): pairs for r, s, _, pairs in schedule(shards(64, 4, kind))}

    zigzag, contiguous = work("zigzag"), work("contiguous")
    for step in range(4):
        assert len({zigzag[r, step] for r in range(4)}) == 1

    def per_rank(w):
        return [sum(w[r, s] for s in range(4)) for r in range(4)]

    assert len(set(per_rank(zigzag))) == 1
    # (2p − 1)/p
    assert max(per_rank(contiguous)) / max(per_rank(zigzag)) == pytest.approx(
        1.75, abs=0.03
    )
    assert contiguous[0, 1] == 0, "the first rank waits"


@pytest.mark.parametrize("kind", LAYOUTS)
def test_join_undoes_take(kind):
    x, cut = torch.randn(2, 29, 3), shards(29, 4, kind)
    for back in World(4).run(lambda comm: join(take(x, cut, comm.rank), cut, comm)):
        assert torch.equal(back, x)


def test_the_loss_is_a_mean_over_tokens_not_over_ranks():
    """Uneven shards, and targets that are ignored on one rank only."""
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 11, 7), torch.randint(7, (2, 11))
    targets[:, :4] = -100
    whole = logits.clone().requires_grad_()
    expected = F.cross_entropy(whole.flatten(0, 1), targets.flatten())
    expected.backward()
    cut = shards(11, 3, "contiguous")

    def fn(comm):
        mine = take(logits, cut, comm.rank).requires_grad_()
        loss = split_loss(mine, take(targets, cut, comm.rank), comm)
        loss.backward()
        return loss.item(), join(mine.grad, cut, comm)

    for loss, grad in World(3).run(fn):
        assert loss == pytest.approx(expected.item(), abs=1e-6)
        torch.testing.assert_close(grad, whole.grad)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="layout='spiral'"):
        shards(8, 2, "spiral")
    with pytest.raises(ValueError, match="T=5 tokens do not make 6 pieces"):
        shards(5, 3, "zigzag")


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("ring", "contiguous"), ("ring", "zigzag"), ("ulysses", "contiguous")],
)
def test_forgotten_positions_are_named(kind, layout):
    """The model would turn queries and keys by 0, 1, 2 …: off by whole logits."""
    from llmlab.models.llama import Llama, LlamaConfig
    from llmlab.parallelism.sequence import RingAttention, UlyssesAttention

    cut = shards(8, 2, layout)
    model = Llama(LlamaConfig(37, 16, 24, 1, 4, 2)).eval()
    tokens = torch.arange(8)[None]

    def fn(comm):
        attention = (
            RingAttention(comm, cut)
            if kind == "ring"
            else UlyssesAttention(comm, [len(c) for c in cut])
        )
        own = cut[comm.rank]
        forgets = comm.rank == (0 if layout == "zigzag" else 1)
        given = {} if forgets else {"position_ids": own[None]}
        return model(tokens[:, own], attention=attention, **given)

    token, stands = (2, 6) if layout == "zigzag" else (0, 4)
    message = f"position_ids put token {token} at {token}, but it stands at {stands}"
    with pytest.raises(ValueError, match=message):
        World(2).run(fn)
