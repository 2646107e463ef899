"""Train a Llama with data parallelism under torchrun, and say what each rank sent.

    torchrun --nproc-per-node 2 -m llmlab.parallelism.examples.train_data_parallel --cpu
    torchrun --nproc-per-node 8 -m llmlab.parallelism.examples.train_data_parallel \\
        --hidden 2048 --intermediate 8192 --layers 16 --heads 32 --kv-heads 8 \\
        --vocab 128256 --seq 4096 --batch 1 \\
        --accumulate 4    # 1B on one node of 8 GPUs

`train` is an ordinary rank function: `World(2).run(train, settings)` and `launch(train,
2, settings)` run it unchanged.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

import torch

from llmlab.models.llama import Llama, LlamaConfig
from llmlab.parallelism.data_parallel import MIB, DataParallel, DDPConfig, train_step
from llmlab.parallelism.runtime import Communicator, attach


@dataclass(frozen=True)
class Settings:
    """The model's size, the batch of one rank and microbatch, and how long to train."""

    vocab: int = 256
    hidden: int = 64
    intermediate: int = 176
    layers: int = 2
    heads: int = 8
    kv_heads: int = 4
    batch: int = 2
    seq: int = 32
    accumulate: int = 2
    bucket_mib: float = 25.0
    steps: int = 5
    lr: float = 1e-2
    max_norm: float = 1.0
    seed: int = 0


def microbatches(
    comm: Communicator, s: Settings, step: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's share of the step's random tokens: the whole batch is the same
    however many ranks there are.
    """
    rows = s.batch * s.accumulate * comm.size
    generator = torch.Generator().manual_seed(1000 * s.seed + step)
    tokens = torch.randint(s.vocab, (rows, s.seq + 1), generator=generator)
    mine = tokens.chunk(comm.size)[comm.rank].to(comm.device)
    return [(part[:, :-1], part[:, 1:]) for part in mine.split(s.batch)]


def train(comm: Communicator, s: Settings) -> list[float]:
    """AdamW on random tokens; returns the losses, the same on every rank."""
    # ranks begin differently: rank 0's weights are sent to all
    torch.manual_seed(s.seed + comm.rank)
    config = LlamaConfig(
        s.vocab, s.hidden, s.intermediate, s.layers, s.heads, s.kv_heads
    )
    limit = int(s.bucket_mib * MIB)
    model = DataParallel(
        Llama(config).to(comm.device), comm, DDPConfig(limit, min(limit, MIB))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr)
    return [
        train_step(model, optimizer, microbatches(comm, s, i), s.max_norm)
        for i in range(s.steps)
    ]


def _main(comm: Communicator, settings: Settings) -> None:
    losses = train(comm, settings)
    if comm.rank == 0:
        print("losses", " ".join(f"{x:.4f}" for x in losses))
        sent = comm.ledger.bytes("all_reduce") / settings.steps
        print(f"rank 0 of {comm.size} sent {sent / 1e6:.3f} MB per step")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--cpu", action="store_true", help="gloo on CPUs, also where there are GPUs"
    )
    for f in fields(Settings):
        parser.add_argument(
            f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default
        )
    options = vars(parser.parse_args())
    backend = "gloo" if options.pop("cpu") else None
    attach(_main, Settings(**options), backend=backend)
