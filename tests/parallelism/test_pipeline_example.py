"""The example script: one rank function at all three distances."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llmlab.parallelism import World, launch
from llmlab.parallelism.examples.train_pipeline import SCHEDULES, Settings, train


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_gives_the_losses_of_one_process(schedule):
    chunks = 2 if schedule == "interleaved" else 1
    settings = Settings(schedule=schedule, chunks=chunks, microbatches=4, steps=3)
    losses = [found for found, _ in World(2).run(train, settings)]
    assert (
        losses[0] == losses[1] == pytest.approx(World(1).run(train, Settings(microbatches=4, steps=3))[0][0], abs=1e-5)
    )
    assert losses[0][-1] < losses[0][0]


def test_in_processes():
    settings = Settings(microbatches=4, steps=2)
    assert launch(train, 4, settings)[0][0] == pytest.approx(World(4).run(train, settings)[0][0], abs=1e-5)


@pytest.mark.slow
def test_the_example_under_torchrun():
    module = "llmlab.parallelism.examples.train_pipeline"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", module, "--schedule", "zb-h1", "--steps", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    losses = World(2).run(train, Settings(schedule="zb-h1", steps=2))[0][0]
    assert "losses " + " ".join(f"{x:.4f}" for x in losses) in done.stdout
    assert "bubble of the last step:" in done.stdout
