"""Train a Llama over pp × dp × tp ranks; go on from a checkpoint of any other split.

    torchrun --nproc-per-node 8 -m llmlab.parallelism.examples.train_hybrid --pp 2 \\
        --dp 2 --tp 2 --save run
    torchrun --nproc-per-node 4 -m llmlab.parallelism.examples.train_hybrid --tp 4 \\
        --load run --start 5

`train` is an ordinary rank function: `World(8).run(train, settings)` and `launch(train,
8, settings)` run it unchanged. Gloo only, as the pipeline's messages carry tags.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

import torch

from llmlab.models.llama import Llama, LlamaConfig
from llmlab.parallelism.hybrid import Hybrid, Placement, resharding
from llmlab.parallelism.pipeline import one_f_one_b
from llmlab.parallelism.runtime import Communicator, attach


@dataclass(frozen=True)
class Settings:
    """The mesh, the model's size, the batch, and how long to train."""

    pp: int = 1
    dp: int = 1
    tp: int = 1
    vocab: int = 256
    hidden: int = 64
    intermediate: int = 176
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    batch: int = 8
    microbatches: int = 2
    seq: int = 32
    steps: int = 5
    start: int = 0
    lr: float = 1e-3
    seed: int = 0
    save: str = ""
    load: str = ""


def train(comm: Communicator, s: Settings) -> list[float]:
    """AdamW on random tokens, step i of the same tokens whatever the split.

    Returns the losses.
    """
    torch.manual_seed(s.seed)
    config = LlamaConfig(
        s.vocab, s.hidden, s.intermediate, s.layers, s.heads, s.kv_heads
    )
    job = Hybrid(Llama(config), comm, Placement({"pp": s.pp, "dp": s.dp, "tp": s.tp}))
    optimizer = torch.optim.AdamW(job.parameters(), lr=s.lr)
    if s.load:
        job.load(s.load, optimizer)
    losses = []
    for step in range(s.start, s.start + s.steps):
        tokens = torch.randint(
            s.vocab,
            (s.batch, s.seq + 1),
            generator=torch.Generator().manual_seed(s.seed + step),
        )
        mine = tokens.chunk(s.dp)[job.dp.rank].chunk(s.microbatches)
        optimizer.zero_grad()
        losses.append(
            job.step(
                one_f_one_b(s.pp, s.microbatches), [(x[:, :-1], x[:, 1:]) for x in mine]
            )
        )
        job.clip_grad_norm(1.0)
        optimizer.step()
    if s.save:
        resharding.save(s.save, comm.rank, job.owned(optimizer))
    return losses


def _main(comm: Communicator, settings: Settings) -> None:
    losses = train(comm, settings)
    if comm.rank == 0:
        print("losses", " ".join(f"{x:.4f}" for x in losses))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for f in fields(Settings):
        parser.add_argument(
            f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default
        )
    attach(_main, Settings(**vars(parser.parse_args())))
