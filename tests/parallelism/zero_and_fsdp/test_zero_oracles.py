"""ZeRO and FSDP against PyTorch's FSDP2 and DeepSpeed: the same small Llama, data and
optimizer, on gloo.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmlab.parallelism import World, launch
from llmlab.parallelism.examples.train_zero import Settings, build, train
from llmlab.parallelism.examples.zero_libraries import (
    recorded,
    train_deepspeed,
    train_fsdp2,
)

TOL = 1e-5


def assert_same(mine, theirs) -> None:
    """Histories and weights of one rank."""
    torch.testing.assert_close(
        torch.tensor(mine[0]), torch.tensor(theirs[0]), atol=TOL, rtol=0
    )
    assert mine[1].keys() == theirs[1].keys()
    for name, w in theirs[1].items():
        torch.testing.assert_close(
            mine[1][name], w, atol=TOL, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("p", "tied"), [(2, False), (4, True)])
def test_stage_3_is_fsdp2(p, tied):
    """Six clipped AdamW steps of two microbatches, unequal tokens: losses, norms and
    weights.
    """
    settings = Settings(stage=3, tied=tied)
    theirs = launch(train_fsdp2, p, settings, timeout=120)
    start, moved = dict(build(settings).named_parameters()), theirs[0][1]
    assert max((moved[n] - w).abs().max() for n, w in start.items()) > 0.03
    ours = launch(train, p, settings, timeout=120)
    for rank in range(p):
        assert_same(ours[rank], theirs[rank])
    for mine in World(p).run(train, settings):
        assert_same(mine, theirs[0])


class Collectives(TorchDispatchMode):
    """Counts the collectives that torch.distributed starts in its `with` block, by
    name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def test_fsdp2_gathers_and_reduces_as_often():
    """A block is gathered twice and the root once, and each is reduced once, in every
    microbatch.
    """

    def fn(comm, settings):
        theirs, ours = [], []
        # the difference is two steps: what comes once, at the end, falls out
        for steps in (1, 3):
            with Collectives() as counter:
                train_fsdp2(comm, replace(settings, steps=steps))
            comm.ledger.clear()
            train(comm, replace(settings, steps=steps))
            theirs.append(
                [
                    counter.counts[op]
                    for op in ("_allgather_base_", "_reduce_scatter_base_")
                ]
            )
            large = [e.op for e in comm.ledger if e.payload > 64]
            ours.append([large.count(op) for op in ("all_gather", "reduce_scatter")])
        return [
            [b - a for a, b in zip(*counts, strict=True)] for counts in (theirs, ours)
        ]

    settings = Settings(stage=3, layers=3)
    passes = 2 * settings.microbatches
    for theirs, ours in launch(fn, 2, settings, timeout=120):
        assert ours == [
            passes * (2 * settings.layers + 1),
            passes * (settings.layers + 1),
        ]
        assert theirs == ours


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_recorded_deepspeed(stage):
    """Against the losses and norms that scripts/golden/zero_goldens.py has written, on
    threads.
    """
    golden = recorded()
    for history, _ in World(golden["ranks"]).run(train, Settings(stage=stage)):
        expected = golden["history"][str(max(stage, 1))]
        torch.testing.assert_close(
            torch.tensor(history), torch.tensor(expected), atol=TOL, rtol=0
        )


@pytest.mark.slow
def test_live_deepspeed(deepspeed):
    """All three stages in one pair of processes: losses, norms and weights, and the
    recording is what it says.
    """

    def fn(comm):
        return {
            stage: train_deepspeed(comm, Settings(stage=stage)) for stage in (1, 2, 3)
        }

    theirs = launch(fn, 2, timeout=240)
    golden = recorded()["history"]
    for stage in (1, 2, 3):
        for mine, their in zip(
            launch(train, 2, Settings(stage=stage)),
            (r[stage] for r in theirs),
            strict=True,
        ):
            assert_same(mine, their)
            torch.testing.assert_close(
                torch.tensor(their[0]),
                torch.tensor(golden[str(stage)]),
                atol=TOL,
                rtol=0,
            )


def test_the_example_at_two_distances():
    """Any number of ranks, any stage, offloaded or not: one history. Eight sequences
    over three ranks: 3, 3 and 2.
    """
    reference = World(1).run(train, Settings(stage=0))[0]
    assert reference[0][-1][0] < reference[0][0][0] - 0.5
    for stage in (0, 1, 2, 3):
        settings = Settings(stage=stage, offload=stage == 2, layout="flat")
        for mine in World(3).run(train, settings):
            assert_same(mine, reference)
    for mine in launch(train, 2, Settings(stage=3, offload=True)):
        assert_same(mine, reference)
