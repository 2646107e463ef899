"""The same small Llama under torch.distributed.pipelining: same losses, same weights
after two AdamW steps.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from llmlab.parallelism import launch
from llmlab.parallelism.pipeline.pipeline import Pipeline
from llmlab.parallelism.pipeline.schedules import (
    gpipe,
    interleaved,
    one_f_one_b,
    stage_of,
    zb_h1,
    zb_v,
)
from llmlab.parallelism.pipeline.stages import split
from tests.covering import each_value
from tests.parallelism.conftest import tiny
from tests.parallelism.pipeline.test_pipeline import ADAM, microbatches

STEPS = 2
OFFICIAL = {  # torch's schedule: (ours, chunks, layout)
    "ScheduleGPipe": (gpipe, 1, "loop"),
    "Schedule1F1B": (one_f_one_b, 1, "loop"),
    "ScheduleInterleaved1F1B": (interleaved, 2, "loop"),
    "ScheduleInterleavedZeroBubble": (zb_h1, 1, "loop"),
    "ScheduleZBVZeroBubble": (zb_v, 2, "v"),
}


def ours(comm, model, batch, name):
    make, v, layout = OFFICIAL[name]
    pipe = Pipeline(
        split(model, comm.rank, comm.size, v, layout=layout), comm, layout=layout
    )
    optimizer, losses = torch.optim.AdamW(pipe.parameters(), **ADAM), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses.append(pipe.step(make(comm.size, len(batch)), batch))
        optimizer.step()
    return losses, pipe.state_dict()


def theirs(comm, model, batch, name):
    from torch.distributed import pipelining

    _, v, layout = OFFICIAL[name]
    chunks = torch.nn.ModuleList(split(model, comm.rank, comm.size, v, layout=layout))
    numbers = [stage_of(comm.rank, c, comm.size, layout) for c in range(v)]
    stages = [
        pipelining.PipelineStage(chunk, n, comm.size * v, comm.device)
        for chunk, n in zip(chunks, numbers, strict=True)
    ]
    schedule = getattr(pipelining.schedules, name)(
        stages[0] if name in ("ScheduleGPipe", "Schedule1F1B") else stages,
        n_microbatches=len(batch),
        loss_fn=lambda y, target: F.cross_entropy(y.flatten(0, 1), target.flatten()),
    )
    optimizer, losses = torch.optim.AdamW(chunks.parameters(), **ADAM), []
    x, y = (torch.cat([pair[k] for pair in batch]) for k in (0, 1))
    for _ in range(STEPS):
        optimizer.zero_grad()
        found = []
        last = (
            {"target": y, "losses": found}
            if chunks[0].is_last or chunks[-1].is_last
            else {}
        )
        schedule.step(
            *([x] if chunks[0].is_first else []), **last, return_outputs=False
        )
        optimizer.step()
        losses += [torch.stack(found).mean().item()] if found else []
    return losses, {
        n: value for chunk in chunks for n, value in chunk.state_dict().items()
    }


@pytest.mark.parametrize(("name", "p"), each_value(list(OFFICIAL), [2, 4]))
def test_training_is_that_of_torch(name, p):
    batch = microbatches(2 * p, (8,))

    def fn(comm, model):
        return ours(comm, copy.deepcopy(model), batch, name), theirs(
            comm, model, batch, name
        )

    _, v, _ = OFFICIAL[name]
    model = tiny(num_hidden_layers=p * v + 1)  # stages are uneven
    start = {n: value.clone() for n, value in model.state_dict().items()}
    results = launch(fn, p, model, timeout=200)
    # torch's losses are on the last stage's rank
    losses = next(found for _, (found, _) in results if found)
    for (mine, my_state), (_, their_state) in results:
        assert mine == pytest.approx(losses, abs=1e-5) and len(losses) == STEPS
        assert my_state.keys() == their_state.keys()
        for n, value in their_state.items():
            torch.testing.assert_close(
                my_state[n], value, atol=1e-5, rtol=0, msg=lambda m, n=n: f"{n}: {m}"
            )
            assert (value - start[n]).abs().max() > 0.01
