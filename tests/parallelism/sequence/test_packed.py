"""Packed documents over a cut sequence: kept apart where attention sees all tokens,
refused by name where it does not.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmlab.parallelism import World, sequence, tensor
from llmlab.parallelism.sequence.megatron import sum_replicated_gradients
from llmlab.parallelism.sequence.ring import RingAttention
from llmlab.parallelism.sequence.shards import shards
from llmlab.parallelism.sequence.ulysses import UlyssesAttention
from tests.parallelism.conftest import tiny

LENGTHS = [[5, 7], [4, 8]]
IDS = torch.randint(37, (2, 12), generator=torch.Generator().manual_seed(2))
TARGETS = IDS.roll(-1, 1)
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])


def make():
    return tiny(num_key_value_heads=2).double()


def one_process():
    """Loss and gradients of the documents one at a time."""
    model = make()
    losses = []
    for ids, targets, row in zip(IDS, TARGETS, LENGTHS, strict=True):
        for x, y in zip(ids.split(row), targets.split(row), strict=True):
            losses.append(F.cross_entropy(model(x[None])[0], y, reduction="sum"))
    loss = sum(losses) / IDS.numel()
    loss.backward()
    return loss.item(), {n: w.grad for n, w in model.named_parameters()}


@pytest.mark.parametrize("room", [tensor, sequence], ids=["tensor", "sequence"])
@pytest.mark.parametrize("p", [2, 4])
def test_documents_stay_apart(room, p):
    def fn(comm):
        model = room.parallelize(make(), comm)
        logits = model(IDS, position_ids=POSITIONS)
        loss = tensor.vocab_parallel_cross_entropy(
            logits, TARGETS, comm, vocab_size=model.config.vocab_size
        )
        loss.backward()
        if room is sequence:
            sum_replicated_gradients(model, comm)
        return loss.item(), {n: w.grad for n, w in model.named_parameters()}

    loss, gradients = one_process()
    for mine, got in World(p).run(fn):
        assert mine == pytest.approx(loss, abs=1e-9)
        same = [n for n, g in got.items() if g.shape == gradients[n].shape]
        assert any("norm" in n for n in same)
        for name in same:
            torch.testing.assert_close(got[name], gradients[name])


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_a_ring_and_ulysses_refuse_them(layout):
    def fn(comm, kind):
        cut = shards(12, comm.size, layout)
        attention = RingAttention(comm, cut)
        if kind == "ulysses":
            attention = UlyssesAttention(comm, [len(c) for c in cut])
        own = cut[comm.rank]
        with pytest.raises(ValueError, match="packed documents"):
            make()(IDS[:, own], position_ids=POSITIONS[:, own], attention=attention)
        return True

    kinds = ["ring"] if layout == "zigzag" else ["ring", "ulysses"]
    for kind in kinds:
        assert World(2).run(fn, kind) == [True, True]


def test_positions_of_too_few_tokens_are_named():
    def fn(comm):
        model = sequence.parallelize(make(), comm)
        with pytest.raises(ValueError, match="position_ids are 6 numbers for 12"):
            model(IDS, position_ids=POSITIONS[:, :6])
        return model(IDS, position_ids=None).shape[1]

    assert World(2).run(fn) == [12, 12]
