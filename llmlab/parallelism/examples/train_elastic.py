"""Data-parallel training that survives a killed rank, and ends at the same loss.

    torchrun --nproc-per-node 2 \\
        --max-restarts 3 -m llmlab.parallelism.examples.train_elastic --folder run
    torchrun --nproc-per-node 2 \\
        --max-restarts 3 -m llmlab.parallelism.examples.train_elastic --folder run2 \\
        --kill-rank 1 --kill-at 3

On several machines, the same command on each, with --nnodes and --rdzv-endpoint (see
`cluster/`). `--kill-rank` makes that rank kill itself once, to see what happens.
"""

from __future__ import annotations

import argparse
import os
import signal
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from llmlab.parallelism.frameworks import elastic, engines
from llmlab.parallelism.runtime import Communicator, attach


@dataclass(frozen=True)
class Settings:
    """Where checkpoints go, how often, and which rank dies before which step (once)."""

    folder: str = "run"
    steps: int = 6
    every: int = 2
    kill_rank: int = -1
    kill_at: int = -1


def train(comm: Communicator, s: Settings) -> list[float]:
    """The losses of the steps that this attempt did.

    The last one is that of an uninterrupted run.
    """
    model, losses = engines.build(), []
    optimizer = torch.optim.AdamW(model.parameters(), **engines.ADAM)
    done = elastic.load(s.folder, model, optimizer)
    for step in range(done, s.steps):
        _die_once(comm, s, step)
        x, y = engines.shard(step, comm)
        loss = engines.loss_of(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        for w in model.parameters():
            w.grad = comm.all_reduce(w.grad, op="mean")
        optimizer.step()
        losses.append(comm.all_reduce(loss.detach(), op="mean").item())
        if (step + 1) % s.every == 0:
            if comm.rank == 0:
                elastic.save(s.folder, step + 1, model, optimizer)
            comm.barrier()  # nobody is ahead of a checkpoint that is not there yet
    return losses


def _die_once(comm: Communicator, s: Settings, step: int) -> None:
    marker = Path(s.folder) / "killed"
    if comm.rank == s.kill_rank and step == s.kill_at and not marker.exists():
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def _main(comm: Communicator, settings: Settings) -> None:
    losses = train(comm, settings)
    if comm.rank == 0:
        print(
            f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}:"
            f" {len(losses)} steps"
        )
        print("losses", " ".join(f"{x:.4f}" for x in losses))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for f in fields(Settings):
        parser.add_argument(
            f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default
        )
    patience = "seconds that a collective waits for a rank that hangs"
    parser.add_argument("--timeout", type=float, help=patience)
    options = vars(parser.parse_args())
    timeout = options.pop("timeout")
    attach(_main, Settings(**options), timeout=timeout)
