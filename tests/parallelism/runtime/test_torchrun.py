"""The third distance: the example scripts under torchrun train as World does."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from llmlab.models.llama import Llama, LlamaConfig
from llmlab.parallelism import World, attach, launch
from llmlab.parallelism.examples import (
    train_data_parallel,
    train_pipeline,
    train_sequence_parallel,
    train_zero,
)
from llmlab.parallelism.examples.train_tensor_parallel import Settings, train
from llmlab.parallelism.zero_and_fsdp.fsdp import Fsdp
from tests import processes


def test_one_rank_function_at_two_distances():
    losses = World(4).run(train, Settings())
    assert losses[0] == pytest.approx(World(1).run(train, Settings())[0], abs=1e-5)
    for mine in launch(train, 2, Settings()):
        assert mine == pytest.approx(losses[0], abs=1e-5)
    assert losses[0][-1] < losses[0][0]


# One torchrun runs all example scripts -----------------------------------------------

EXAMPLES = "llmlab.parallelism.examples"
COMMANDS = {
    "tensor": f"{EXAMPLES}.train_tensor_parallel --steps 2",
    "data": f"{EXAMPLES}.train_data_parallel --cpu --steps 2 --bucket-mib 0.05",
    "pipeline": f"{EXAMPLES}.train_pipeline --schedule zb-h1 --steps 2",
    "sequence": f"{EXAMPLES}.train_sequence_parallel --steps 2",
    "zero": f"{EXAMPLES}.train_zero --stage 3 --steps 2 --offload",
    "fsdp2": f"{EXAMPLES}.zero_libraries --library fsdp2",
}


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """printed("tensor"): what that script's two ranks printed under torchrun."""
    folder = tmp_path_factory.mktemp("torchrun")
    names = ["-m", "tests.parallelism.examples_in_turn", str(folder)]
    done = processes.run(
        [sys.executable, *names, *COMMANDS.values()],
        cwd=processes.ROOT,
        env=processes.on_cpu(),
    )

    def read(name: str) -> str:
        number = list(COMMANDS).index(name)
        texts = [folder / f"{number}-{rank}.txt" for rank in range(2)]
        return "".join(path.read_text() for path in texts if path.exists())

    said = "\n".join(f"{name}:\n{read(name)}" for name in COMMANDS)
    assert done.returncode == 0, done.stderr + said
    return read


def as_printed(losses: list[float]) -> str:
    return "losses " + " ".join(f"{x:.4f}" for x in losses)


@pytest.mark.slow
def test_tensor_parallelism_under_torchrun(printed):
    world = World(2)
    losses = world.run(train, Settings(steps=2))[0]
    assert as_printed(losses) in printed("tensor")
    sent = world.ledger.bytes(rank=0) / 2 / 1e6
    assert f"rank 0 of 2 sent {sent:.3f} MB per step" in printed("tensor")


@pytest.mark.slow
def test_data_parallelism_under_torchrun(printed):
    settings = train_data_parallel.Settings(steps=2, bucket_mib=0.05)
    world = World(2)
    losses = world.run(train_data_parallel.train, settings)[0]
    assert as_printed(losses) in printed("data")
    sent = world.ledger.bytes("all_reduce", rank=0) / 2 / 1e6
    assert f"rank 0 of 2 sent {sent:.3f} MB per step" in printed("data")


@pytest.mark.slow
def test_a_pipeline_under_torchrun(printed):
    settings = train_pipeline.Settings(schedule="zb-h1", steps=2)
    losses = World(2).run(train_pipeline.train, settings)[0][0]
    assert as_printed(losses) in printed("pipeline")
    assert "bubble of the last step:" in printed("pipeline")


@pytest.mark.slow
def test_sequence_parallelism_under_torchrun(printed):
    world = World(2)
    settings = train_sequence_parallel.Settings(steps=2)
    losses, kept = world.run(train_sequence_parallel.train, settings)[0]
    assert as_printed(losses) in printed("sequence")
    sent = world.ledger.bytes(rank=0) / 2 / 1e6
    costs = f"kept {kept / 1e6:.3f} MB for the backward pass and sent {sent:.3f} MB"
    assert f"{costs} per step" in printed("sequence")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero", "fsdp2"])
def test_zero_and_fsdp_under_torchrun(name, printed):
    line = printed(name).split("losses")[1].split("\n")[0]
    losses = [float(x) for x in line.split()]
    settings = train_zero.Settings(stage=0, steps=len(losses))
    expected = [loss for loss, _ in World(1).run(train_zero.train, settings)[0][0]]
    assert losses == pytest.approx(expected, abs=1e-4)


def test_attach_without_a_launcher_says_what_to_do(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match="torchrun --nproc-per-node"):
        attach(print)


def launcher(there: str) -> None:
    """Starts a rank in a session of its own, as torchrun does, and waits."""
    if os.fork() == 0:
        os.setsid()
        attach(stay, there, backend="gloo")
    os.wait()


def stay(comm, there: str) -> None:
    Path(there).touch()
    time.sleep(600)


def test_a_rank_ends_with_its_torchrun(tmp_path, alone):
    """torchrun is killed, and has started its rank in a session of its own."""
    there = tmp_path / "there"
    env = alone | {"TORCHELASTIC_RUN_ID": "a run"}
    with processes.forked(launcher, str(there), env=env) as torchrun:
        wait_until(there.exists, seconds=100)
        (rank,) = psutil.Process(torchrun.pid).children()
        try:
            assert os.getsid(rank.pid) == rank.pid
            psutil.Process(torchrun.pid).kill()
            wait_until(lambda: not runs(rank), seconds=20)
        finally:
            with suppress(psutil.NoSuchProcess):
                rank.kill()


def runs(process: psutil.Process) -> bool:
    """A zombie has ended, though nobody has asked how."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(look, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def test_a_timeout_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="timeout=0 must be above 0 seconds"):
        attach(print, timeout=0)


@pytest.fixture
def alone():
    """The environment of a job's only rank."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any free one
    return {"RANK": "0", "WORLD_SIZE": "1"} | where | processes.on_cpu()


def gloo() -> int:
    """How many of this process's threads are gloo's."""
    threads = Path("/proc/self/task")
    names = [(thread / "comm").read_text() for thread in threads.iterdir()]
    return sum("gloo" in name for name in names)


def use_a_communicator(comm) -> int:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = Llama(LlamaConfig(32, 16, 32, num_hidden_layers=2, **heads))
    engine = Fsdp(model, comm)  # its hooks refer to it, and it to the communicator
    model(torch.randint(32, (2, 5))).sum().backward()
    engine.step()
    comm.split(0).all_reduce(torch.ones(3))
    return gloo()


def attach_and_count() -> None:
    print(attach(use_a_communicator) > 0, gloo())


@pytest.mark.skipif(
    not os.path.isdir("/proc/self/task"), reason="threads by name are Linux's"
)
def test_no_thread_of_gloos_is_left_to_abort_the_interpreter(alone):
    done = processes.run_fork(attach_and_count, env=alone, timeout=120)
    assert done.stdout.split() == ["True", "0"]
