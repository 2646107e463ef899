"""The formulas of what is sent, held to the ledger; ring and Ulysses are held in their
own tests.
"""

from __future__ import annotations

import pytest
import torch

from llmlab.parallelism import World, launch
from llmlab.parallelism.examples.train_sequence_parallel import Settings
from llmlab.parallelism.examples.train_sequence_parallel import train as train_example
from llmlab.parallelism.sequence import megatron as sequence
from llmlab.parallelism.sequence.cost import (
    METHODS,
    AttentionShape,
    sent,
    smallest_block,
)
from tests.parallelism.conftest import tiny


@pytest.mark.parametrize("p", [2, 4])
def test_megatron_forward_and_backward(p):
    """The model's two blocks: all gathers and scatters of (B, T, d), without those of
    the embedding and of the head.
    """
    tokens = torch.randint(37, (2, 16), generator=torch.Generator().manual_seed(0))

    def fn(comm, model):
        logits = sequence.parallelize(model, comm)(tokens)

        def count():
            return sum(
                comm.ledger.bytes(op, comm.rank)
                for op in ("all_gather", "reduce_scatter")
            )

        before = count()
        logits.sum().backward()
        return before, count() - before

    shape, part = (
        AttentionShape(B=2, T=16, H=8, K=4, D=3),
        (p - 1) / p * 2 * 16 * 24 * 4,
    )
    forward, backward = World(p).run(fn, tiny(head_dim=6))[0]
    # the embedding's ḡ, the head's g
    assert forward == 2 * sent("megatron", p, shape, itemsize=4) + 2 * part
    assert (
        backward == 2 * sent("megatron", p, shape, backward=True, itemsize=4) + 3 * part
    )  # and the head's input again


def test_who_sends_least():
    """Multi-head: Ulysses, whose bytes fall with p. Few key/value heads: the ring,
    while p is small against H/K.
    """
    many, few = (
        AttentionShape(1, 65536, 32, 32, 128),
        AttentionShape(1, 65536, 128, 8, 128),
    )

    def cheapest(p, shape):
        return min(METHODS, key=lambda m: sent(m, p, shape))

    assert (
        cheapest(16, many) == "ulysses"
        and cheapest(8, few) == "ring"
        and cheapest(64, few) == "ulysses"
    )
    assert sent("megatron", 64, many) == pytest.approx(
        4 * 65536 * 4096 * 2, rel=0.02
    ), "does not fall with p"
    assert sent("ring", 1, many, backward=True) == 0


def test_smallest_block_of_the_paper():
    """Liu et al., table 2, in thousands of tokens: A100 over NVLink and InfiniBand, TPU
    v4.
    """
    for flops, bandwidth, published in (
        (312e12, 300e9, 1.0),
        (275e12, 268e9, 1.0),
        (123e12, 112e9, 1.1),
    ):
        assert round(smallest_block(flops, bandwidth) / 1e3, 1) == published
    assert smallest_block(312e12, 12.5e9) == 24960  # the table has 24.5


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="method='star'"):
        sent("star", 2, AttentionShape(1, 8, 2, 2, 4))


# The example


def test_three_methods_train_one_model():
    """Ring, Ulysses and Megatron, in World and in processes: the losses of one rank,
    and the memory divided.
    """
    alone, whole = World(1).run(train_example, Settings())[0]
    for method in ("ring", "ulysses", "megatron"):
        for losses, kept in World(4).run(train_example, Settings(method=method)):
            assert losses == pytest.approx(alone, abs=1e-5)
            assert kept < whole / 3
    for losses, _ in launch(train_example, 2, Settings(layout="striped")):
        assert losses == pytest.approx(alone, abs=1e-5)
    with pytest.raises(ValueError, match="method='star'"):
        Settings(method="star")
