"""The third distance: the example script under torchrun trains as World does."""

from __future__ import annotations

import os
import socket
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


ENDS = """
import os, torch
from llmlab.models.llama import Llama, LlamaConfig
from llmlab.parallelism import attach
from llmlab.parallelism.fsdp import Fsdp


def gloo():
    names = [open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")]
    return sum("gloo" in name for name in names)


def fn(comm):
    model = Llama(LlamaConfig(32, 16, 32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2))
    engine = Fsdp(model, comm)  # its hooks refer to it, and it to the communicator
    model(torch.randint(32, (2, 5))).sum().backward()
    engine.step()
    comm.split(0).all_reduce(torch.ones(3))
    return gloo()


print(attach(fn) > 0, gloo())
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads by name are Linux's")
def test_no_thread_of_gloos_is_left_to_abort_the_interpreter():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    one = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = os.environ | one | {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", ENDS], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "0"], done.stderr
