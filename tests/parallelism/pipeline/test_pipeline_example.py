"""The example script: one rank function at two distances; `test_torchrun` has the
third.
"""

from __future__ import annotations

from functools import cache

import pytest

from llmlab.parallelism import World, launch
from llmlab.parallelism.examples.train_pipeline import SCHEDULES, Settings, train


@cache
def one_process() -> list[float]:
    """The losses of two steps, once for all schedules."""
    return World(1).run(train, Settings(microbatches=4, steps=2))[0][0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_gives_the_losses_of_one_process(schedule):
    chunks = 2 if schedule == "interleaved" else 1
    settings = Settings(schedule=schedule, chunks=chunks, microbatches=4, steps=2)
    losses = [found for found, _ in World(2).run(train, settings)]
    assert losses[0] == losses[1] == pytest.approx(one_process(), abs=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_in_processes():
    settings = Settings(microbatches=4, steps=2)
    assert launch(train, 4, settings)[0][0] == pytest.approx(
        World(4).run(train, settings)[0][0], abs=1e-5
    )
