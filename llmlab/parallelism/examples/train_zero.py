"""Train a Llama with ZeRO; the losses are the same for every stage and every N.

    torchrun --nproc-per-node 4 -m llmlab.parallelism.examples.train_zero --stage 2
    torchrun --nproc-per-node 8 -m llmlab.parallelism.examples.train_zero --stage 3 \\
        --dtype bfloat16 --hidden 4096 --layers 32 --heads 32 --kv-heads 32 \\
        --intermediate 11008 --vocab 32000 --sequences 8 \\
        --seq 4096       # 7B on one node of 8 GPUs

`train` is an ordinary rank function: `World(4).run(train, settings)` and `launch(train,
4, settings)` run it unchanged.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from llmlab.models.llama import Llama, LlamaConfig
from llmlab.parallelism.runtime import Communicator, attach
from llmlab.parallelism.zero_and_fsdp import Adam, Fsdp, Host, Zero, train_step


@dataclass(frozen=True)
class Settings:
    """The model's size, the batch, the optimizer, and the stage."""

    stage: int = 2
    layout: str = "rows"  # of stage 3
    offload: bool = False
    vocab: int = 101
    hidden: int = 24
    intermediate: int = 40
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    tied: bool = False
    sequences: int = 8  # in a microbatch, over all ranks
    microbatches: int = 2
    seq: int = 16
    steps: int = 6
    lr: float = 0.01
    clip: float = 0.5
    weight_decay: float = 0.1
    dtype: str = "float32"
    seed: int = 0


def build(s: Settings, device: torch.device | str = "cpu") -> Llama:
    """The model: the same weights on every rank."""
    torch.manual_seed(s.seed)
    config = LlamaConfig(
        *(s.vocab, s.hidden, s.intermediate, s.layers, s.heads, s.kv_heads),
        max_position_embeddings=s.seq,
        tie_word_embeddings=s.tied,
        initializer_range=0.1,
    )
    return Llama(config).to(device, getattr(torch, s.dtype))


def adam(s: Settings) -> Adam:
    """AdamW's settings. ε is large enough that rounding in a gradient near 0 does not
    become a step.
    """
    return Adam(lr=s.lr, clip=s.clip, weight_decay=s.weight_decay, eps=1e-6)


def batches(
    s: Settings, step: int, rank: int, ranks: int, device: torch.device | str = "cpu"
) -> list[tuple[Tensor, Tensor]]:
    """This rank's microbatches of one step: sequences rank, rank + ranks, … of the same
    global batch, however many ranks.

    A sequence counts up from a random token by 1, 2 or 3, so there is something to
    learn. The sequences have different lengths (targets after the end are −100), so the
    ranks have different numbers of tokens.
    """
    generator = torch.Generator().manual_seed(1000 * s.seed + step)
    out = []
    for _ in range(s.microbatches):
        start = torch.randint(s.vocab, (s.sequences, 1), generator=generator)
        x = (
            start
            + torch.randint(1, 4, (s.sequences, 1), generator=generator)
            * torch.arange(s.seq + 1)
        ) % s.vocab
        lengths = torch.randint(2, s.seq + 1, (s.sequences, 1), generator=generator)
        x, y = x[:, :-1], x[:, 1:].masked_fill(torch.arange(s.seq) >= lengths, -100)
        out.append((x[rank::ranks].to(device), y[rank::ranks].to(device)))
    return out


Trained = tuple[list[tuple[float, float]], dict[str, Tensor]]


def train(comm: Communicator, s: Settings) -> Trained:
    """(loss, gradient norm) of each step, and the whole weights at the end."""
    model, host = build(s, comm.device), Host() if s.offload else None
    if s.stage == 3:
        engine = Fsdp(model, comm, adam(s), layout=s.layout, host=host)
    else:
        engine = Zero(model, comm, adam(s), stage=s.stage, host=host)
    history = [
        train_step(
            engine, model, comm, batches(s, i, comm.rank, comm.size, comm.device)
        )
        for i in range(s.steps)
    ]
    with engine.gathered():
        return history, {
            name: w.detach().cpu().clone() for name, w in model.named_parameters()
        }


def _main(comm: Communicator, s: Settings) -> None:
    history, _ = train(comm, s)
    if comm.rank == 0:
        print("losses", " ".join(f"{loss:.4f}" for loss, _ in history))
        print(
            f"rank 0 of {comm.size} sent {comm.ledger.bytes() / s.steps / 1e6:.3f} MB a"
            " step"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for f in fields(Settings):
        kind = (
            {"action": argparse.BooleanOptionalAction}
            if isinstance(f.default, bool)
            else {"type": type(f.default)}
        )
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=f.default, **kind)
    attach(_main, Settings(**vars(parser.parse_args())))
