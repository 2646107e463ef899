"""Train a Llama with tensor parallelism; say what each rank held and sent.

    torchrun --nproc-per-node 4 -m llmlab.parallelism.examples.train_tensor_parallel
    torchrun --nproc-per-node 8 -m llmlab.parallelism.examples.train_tensor_parallel \\
        --hidden 4096 --layers 32 --heads 32 --intermediate 11008 --vocab 32000 \\
        --batch 1 --seq 4096                           # 7B on one node of 8 GPUs

`train` is an ordinary rank function: `World(4).run(train, settings)` and `launch(train,
4, settings)` run it unchanged.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

import torch

from llmlab.models.llama import Llama, LlamaConfig
from llmlab.parallelism.runtime import Communicator, attach
from llmlab.parallelism.tensor import parallelize, vocab_parallel_cross_entropy


@dataclass(frozen=True)
class Settings:
    """The model's size, the batch, and how long to train."""

    vocab: int = 256
    hidden: int = 64
    intermediate: int = 176
    layers: int = 2
    heads: int = 8
    kv_heads: int = 4
    batch: int = 4
    seq: int = 32
    steps: int = 5
    lr: float = 0.1
    seed: int = 0


def train(comm: Communicator, s: Settings) -> list[float]:
    """SGD on random tokens, the same on every rank; returns the losses."""
    # one master weight: every rank makes it, and keeps its shard
    torch.manual_seed(s.seed)
    config = LlamaConfig(
        s.vocab, s.hidden, s.intermediate, s.layers, s.heads, s.kv_heads
    )
    model = parallelize(Llama(config), comm).to(comm.device)
    tokens = torch.randint(
        s.vocab, (s.batch, s.seq + 1), generator=torch.Generator().manual_seed(s.seed)
    ).to(comm.device)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=s.lr), []
    for _ in range(s.steps):
        loss = vocab_parallel_cross_entropy(
            model(tokens[:, :-1]), tokens[:, 1:], comm, s.vocab
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _main(comm: Communicator, settings: Settings) -> None:
    losses = train(comm, settings)
    if comm.rank == 0:
        print("losses", " ".join(f"{x:.4f}" for x in losses))
        print(
            f"rank 0 of {comm.size} sent"
            f" {comm.ledger.bytes() / settings.steps / 1e6:.3f} MB per step"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for f in fields(Settings):
        parser.add_argument(
            f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default
        )
    attach(_main, Settings(**vars(parser.parse_args())))
