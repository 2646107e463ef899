"""Train a Llama whose layers lie on the processes of a torchrun job, under the schedule
of your choice.

    torchrun --nproc-per-node 4 -m llmlab.parallelism.examples.train_pipeline \\
        --schedule 1f1b
    torchrun --nproc-per-node 4 -m llmlab.parallelism.examples.train_pipeline \\
        --schedule interleaved --chunks 2
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-endpoint HOST:29500 \\
        --rdzv-backend c10d -m llmlab.parallelism.examples.train_pipeline \\
        --schedule zb-h1 --layers 16      # on two hosts, started on both

Runs on CPUs, over gloo. `train` is an ordinary rank function: `World(4).run(train,
settings)` and `launch(train, 4, settings)` run it unchanged.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

import torch

from llmlab.models.llama import Llama, LlamaConfig
from llmlab.parallelism.pipeline import (
    Pipeline,
    Timeline,
    clip_grad_norm,
    schedules,
    split,
)
from llmlab.parallelism.runtime import Communicator, attach

SCHEDULES = {
    "naive": schedules.naive,
    "gpipe": schedules.gpipe,
    "1f1b": schedules.one_f_one_b,
    "interleaved": schedules.interleaved,
    "zb-h1": schedules.zb_h1,
    "zb-h2": schedules.zb_h2,
    "zb-v": schedules.zb_v,
}


@dataclass(frozen=True)
class Settings:
    """The model's size, the batch, the schedule, and how long to train."""

    schedule: str = "1f1b"
    microbatches: int = 8
    chunks: int = 1  # a rank: 2 for zb-v, 2 or more for interleaved
    vocab: int = 256
    hidden: int = 64
    intermediate: int = 176
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    batch: int = 2  # sequences per microbatch
    seq: int = 32
    steps: int = 5
    lr: float = 0.01
    clip: float = 1.0
    seed: int = 0


def train(comm: Communicator, s: Settings) -> tuple[list[float], list]:
    """AdamW on random tokens, the same on every rank; returns the losses, and the bars
    of the last step.
    """
    # one master model: every rank makes it, and keeps its stages
    torch.manual_seed(s.seed)
    config = LlamaConfig(
        s.vocab, s.hidden, s.intermediate, s.layers, s.heads, s.kv_heads
    )
    p, v = comm.size, 2 if s.schedule == "zb-v" else s.chunks
    layout = "v" if s.schedule == "zb-v" else "loop"
    make = SCHEDULES[s.schedule]
    plan = (
        make(p, s.microbatches, v)
        if s.schedule == "interleaved"
        else make(p, s.microbatches)
    )
    pipe = Pipeline(
        split(Llama(config), comm.rank, p, v, layout=layout), comm, layout=layout
    )
    generator = torch.Generator().manual_seed(s.seed)
    tokens = torch.randint(
        s.vocab, (s.microbatches, s.batch, s.seq + 1), generator=generator
    )
    optimizer, losses = torch.optim.AdamW(pipe.parameters(), lr=s.lr), []
    for _ in range(s.steps):
        optimizer.zero_grad()
        losses.append(pipe.step(plan, [(t[:, :-1], t[:, 1:]) for t in tokens]))
        clip_grad_norm(pipe, s.clip)
        optimizer.step()
    return losses, pipe.bars


def _main(comm: Communicator, settings: Settings) -> None:
    losses, bars = train(comm, settings)
    # each rank by its own clock: hosts do not share one
    own = Timeline([bar._replace(rank=0) for bar in bars], 1)
    times = comm.all_gather(
        torch.tensor([[own.busy(0), own.span]], dtype=torch.float64)
    )
    if comm.rank == 0:
        print("losses", " ".join(f"{x:.4f}" for x in losses))
        print(
            f"bubble of the last step: {1 - times[:, 0].mean() / times[:, 1].max():.0%}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for f in fields(Settings):
        options = {"choices": SCHEDULES} if f.name == "schedule" else {}
        parser.add_argument(
            f"--{f.name}".replace("_", "-"),
            type=type(f.default),
            default=f.default,
            **options,
        )
    attach(_main, Settings(**vars(parser.parse_args())), backend="gloo")
