"""DeepSpeed's PipelineModule on two CPU processes: same losses; its schedule: the same
order.

Without clipping: in fp32 and without an mpu object, DeepSpeed 0.19 does not clip by the
norm over all stages.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmlab.models.attention import sdpa
from llmlab.models.llama import rope_tables
from llmlab.parallelism import launch
from llmlab.parallelism.pipeline.pipeline import Pipeline
from llmlab.parallelism.pipeline.schedules import one_f_one_b
from llmlab.parallelism.pipeline.stages import split
from tests.parallelism.conftest import tiny
from tests.parallelism.pipeline.test_pipeline import ADAM, microbatches

STEPS = 3


class OneBlock(nn.Module):
    """A block as DeepSpeed wants a layer: one tensor in, one out."""

    def __init__(self, block, theta):
        super().__init__()
        self.block = block
        self.register_buffer("theta", theta.clone(), persistent=False)

    def forward(self, h):
        rope = rope_tables(torch.arange(h.shape[1])[None], self.theta)
        return self.block(h, rope, None, None, sdpa)


def theirs(comm, model, batch, deepspeed):
    from deepspeed.pipe import PipelineModule

    where = {"RANK": comm.rank, "LOCAL_RANK": comm.rank, "WORLD_SIZE": comm.size}
    os.environ.update({name: str(value) for name, value in where.items()})
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    inner = model.model
    net = PipelineModule(
        layers=[
            inner.embed_tokens,
            *[OneBlock(b, inner.theta) for b in inner.layers],
            inner.norm,
            model.lm_head,
        ],
        num_stages=comm.size,
        loss_fn=lambda y, target: F.cross_entropy(y.flatten(0, 1), target.flatten()),
        partition_method="uniform",
    )
    m, b = len(batch), batch[0][0].shape[0]
    config = {
        "train_micro_batch_size_per_gpu": b,
        "gradient_accumulation_steps": m,
        "train_batch_size": b * m,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(net.parameters(), **ADAM)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    data = (pair for _ in range(STEPS) for pair in batch)
    return [engine.train_batch(data).item() for _ in range(STEPS)]


def ours(comm, model, batch):
    pipe = Pipeline(split(model, comm.rank, comm.size, layers=[3, 1]), comm)
    optimizer, losses = torch.optim.AdamW(pipe.parameters(), **ADAM), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses.append(pipe.step(one_f_one_b(comm.size, len(batch)), batch))
        optimizer.step()
    return losses


def test_losses_are_those_of_deepspeed(deepspeed):
    model, batch = tiny(num_hidden_layers=4), microbatches(4, (8,))
    results = launch(theirs, 2, model, batch, deepspeed, timeout=200)
    losses = launch(ours, 2, model, batch)[0]
    assert results == [pytest.approx(losses, abs=1e-5)] * 2
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 7), (4, 2), (4, 4), (4, 9)])
def test_the_order_of_kinds_is_deepspeeds(deepspeed, p, m):
    """TrainSchedule is 1F1B, too; it names buffers, not microbatches."""
    from deepspeed.runtime.pipe.schedule import TrainSchedule

    letters = {"ForwardPass": "F", "BackwardPass": "B"}
    for r, ops in enumerate(one_f_one_b(p, m)):
        steps = TrainSchedule(micro_batches=m, stages=p, stage_id=r).steps()
        kinds = [
            letters[c.name] for commands in steps for c in commands if c.name in letters
        ]
        assert "".join(kinds) == "".join(kind for kind, _, _ in ops)
