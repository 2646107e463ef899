"""Train a Llama whose sequences are cut over all the processes of a torchrun job, and
say what each rank kept and sent.

    torchrun --nproc-per-node 4 -m llmlab.parallelism.examples.train_sequence_parallel
    torchrun \\
        --nproc-per-node 4 -m llmlab.parallelism.examples.train_sequence_parallel \\
        --method ulysses
    torchrun \\
        --nproc-per-node 8 -m llmlab.parallelism.examples.train_sequence_parallel \\
        --hidden 2048 --layers 16 --heads 32 --kv-heads 8 --intermediate 8192 \\
        --vocab 128256 --batch 1 --seq 131072 --tile 1024      # one node of 8 GPUs

Methods: ring (K and V travel), ulysses (tokens for heads and back), megatron (tensor
parallelism, and the rest cut along the sequence). `train` is an ordinary rank function:
`World(4).run(train, settings)` and `launch(train, 4, settings)` run it unchanged.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

import torch

from llmlab.models.llama import Llama, LlamaConfig
from llmlab.parallelism import sequence
from llmlab.parallelism.runtime import Communicator, attach
from llmlab.parallelism.sequence import (
    RingAttention,
    Saved,
    UlyssesAttention,
    shards,
    split_loss,
    sum_gradients,
    take,
)
from llmlab.parallelism.tensor import vocab_parallel_cross_entropy

METHODS = ("ring", "ulysses", "megatron")


@dataclass(frozen=True)
class Settings:
    """The method, the model's size, the batch, and how long to train."""

    method: str = "ring"
    layout: str = "zigzag"  # of the ring: contiguous, zigzag or striped
    tile: int = 128
    vocab: int = 256
    hidden: int = 64
    intermediate: int = 176
    layers: int = 2
    heads: int = 8
    kv_heads: int = 4
    batch: int = 2
    seq: int = 62
    steps: int = 5
    lr: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"method={self.method!r} must be one of {', '.join(METHODS)}"
            )


def _megatron(comm: Communicator, s: Settings, model: Llama, tokens):
    """The loss of a step and what finishes its gradients: weights are cut, so only the
    norms' are summed.
    """
    sequence.parallelize(model, comm).to(comm.device)
    x, y = sequence.pad_to_multiple(tokens[:, :-1], tokens[:, 1:], comm.size)
    loss = lambda: vocab_parallel_cross_entropy(model(x), y, comm, s.vocab)  # noqa: E731
    return loss, lambda: sequence.sum_replicated_gradients(model, comm)


def _context(comm: Communicator, s: Settings, model: Llama, tokens):
    """The same where every rank has the whole model and some of the tokens: all
    gradients are summed.
    """
    model.to(comm.device)
    cut = shards(s.seq, comm.size, s.layout if s.method == "ring" else "contiguous")
    ring = RingAttention(comm, cut, tile=s.tile)
    attention = (
        ring if s.method == "ring" else UlyssesAttention(comm, [len(c) for c in cut])
    )
    x, y = take(tokens[:, :-1], cut, comm.rank), take(tokens[:, 1:], cut, comm.rank)
    positions = cut[comm.rank][None].to(comm.device)

    def loss():
        return split_loss(
            model(x, position_ids=positions, attention=attention), y, comm
        )

    return loss, lambda: sum_gradients(model, comm)


def train(comm: Communicator, s: Settings) -> tuple[list[float], int]:
    """SGD on random tokens, the same on every rank; returns the losses and the bytes
    kept for the backward pass.
    """
    torch.manual_seed(s.seed)  # one master weight: every rank makes it
    model = Llama(
        LlamaConfig(s.vocab, s.hidden, s.intermediate, s.layers, s.heads, s.kv_heads)
    )
    tokens = torch.randint(
        s.vocab, (s.batch, s.seq + 1), generator=torch.Generator().manual_seed(s.seed)
    )
    loss_of, finish = (_megatron if s.method == "megatron" else _context)(
        comm, s, model, tokens.to(comm.device)
    )
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=s.lr), []
    for _ in range(s.steps):
        with Saved(model.parameters()) as saved:
            loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        finish()
        optimizer.step()
        losses.append(loss.item())
    return losses, saved.bytes


def _main(comm: Communicator, settings: Settings) -> None:
    losses, kept = train(comm, settings)
    if comm.rank == 0:
        print("losses", " ".join(f"{x:.4f}" for x in losses))
        sent = comm.ledger.bytes() / settings.steps
        print(
            f"rank 0 of {comm.size} kept {kept / 1e6:.3f} MB for the backward pass and"
            f" sent {sent / 1e6:.3f} MB per step"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for f in fields(Settings):
        parser.add_argument(
            f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default
        )
    attach(_main, Settings(**vars(parser.parse_args())))
