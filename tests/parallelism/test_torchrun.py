"""The third distance: the example script under torchrun trains as World does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llmlab.parallelism import World, attach, launch
from llmlab.parallelism.examples.train_tensor_parallel import Settings, train


def test_one_rank_function_at_two_distances():
    losses = World(4).run(train, Settings())
    assert losses[0] == pytest.approx(World(1).run(train, Settings())[0], abs=1e-5)
    for mine in launch(train, 2, Settings()):
        assert mine == pytest.approx(losses[0], abs=1e-5)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.slow
def test_the_example_under_torchrun():
    module = "llmlab.parallelism.examples.train_tensor_parallel"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        module,
        "--steps",
        "2",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    world = World(2)
    losses = world.run(train, Settings(steps=2))[0]
    assert "losses " + " ".join(f"{x:.4f}" for x in losses) in done.stdout
    assert f"rank 0 of 2 sent {world.ledger.bytes(rank=0) / 2 / 1e6:.3f} MB a step" in done.stdout


def test_attach_without_a_launcher_says_what_to_do(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match="torchrun --nproc-per-node"):
        attach(print)
