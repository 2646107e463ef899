"""Pretraining: next-token prediction on a stream of text.

This is the course model's own training loop.

    loss = −(1/BT) Σ log p(x_{t+1} | x_{≤t})
    lr(s): linear warm-up to the peak, then half a cosine down to a fraction of it
    (Radford et al. 2018; Hoffmann et al. 2022)

The optimizer is AdamW (Loshchilov & Hutter 2019), https://arxiv.org/abs/1711.05101

The tokens of step s depend on (seed, s) alone, so a run that stops and resumes sees
what an unbroken run sees. Simplified: windows start anywhere, so one may run over the
end of a document and attention crosses that end.

    B  batch            T  context, the tokens a window predicts
    N  tokens in the stream
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from jaxtyping import Int
from torch import Tensor, nn

from llmlab.models.language_model import next_token_loss


@dataclass(frozen=True)
class Recipe:
    """The settings of a run. A batch is `batch` windows of `context` tokens."""

    steps: int
    batch: int = 16
    context: int = 256
    peak_lr: float = 3e-3
    warmup: int = 100
    final_lr: float = 0.05  # as a fraction of the peak
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0  # the largest norm of all gradients together
    evaluate_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "context", "evaluate_every"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(
                f"warmup={self.warmup} must lie between 0 and steps={self.steps}"
            )


@dataclass(frozen=True)
class Record:
    """One line of the log. Losses are in nats per token.

    `train_loss` is the mean since the record before.
    """

    step: int
    tokens: int
    train_loss: float
    valid_loss: float
    lr: float
    seconds: float


def learning_rate(step: int, recipe: Recipe) -> float:
    """The learning rate of step 0, 1, …: a linear warm-up, then half a cosine.

    It rises linearly over `warmup` steps, then falls to `final_lr` · peak.
    """
    if step < recipe.warmup:
        return recipe.peak_lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - 1 - recipe.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return recipe.peak_lr * (recipe.final_lr + (1 - recipe.final_lr) * cosine)


def sample_batch(
    stream: Int[Tensor, "N"], recipe: Recipe, step: int
) -> Int[Tensor, "B T+1"]:
    """B windows of T + 1 tokens at random places.

    They depend on (seed, step) and on nothing else.
    """
    if len(stream) <= recipe.context:
        raise ValueError(
            f"stream has {len(stream)} tokens;"
            f" it must have more than context={recipe.context}"
        )
    dice = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    last_start = len(stream) - recipe.context
    starts = torch.randint(last_start, (recipe.batch,), generator=dice)
    places = starts[:, None] + torch.arange(recipe.context + 1)  # [B, T+1]
    return stream[places]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices; the norms' vectors are left alone."""
    # parameters() names a tied matrix once
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=recipe.betas)


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Int[Tensor, "B T+1"],
    clip: float,
) -> float:
    """Forward, backward, clip, update. Returns the loss before the update."""
    # The batch is input and target: the last token's logits predict nothing.
    loss = next_token_loss(model(batch), batch)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.item()


def evaluation_windows(
    stream: Int[Tensor, "N"], context: int, windows: int = 64
) -> Int[Tensor, "windows T+1"]:
    """Windows of T + 1 tokens spread evenly over the stream.

    They are the same each time.
    """
    if len(stream) <= context:
        raise ValueError(
            f"stream has {len(stream)} tokens; it must have more than context={context}"
        )
    starts = torch.linspace(0, len(stream) - context - 1, windows).long()
    return stream[starts[:, None] + torch.arange(context + 1)]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    stream: Int[Tensor, "N"],
    context: int,
    windows: int = 64,
    batch: int = 16,
) -> float:
    """Mean loss over the `evaluation_windows`, in nats."""
    total = 0.0
    for chunk in evaluation_windows(stream, context, windows).split(batch):
        mean_of_chunk = next_token_loss(model(chunk), chunk).item()
        total += mean_of_chunk * len(chunk)
    return total / windows


def train(
    model: nn.Module,
    stream: Int[Tensor, "N"],
    valid: Int[Tensor, "M"],
    recipe: Recipe,
    checkpoint: Path | None = None,
) -> Iterator[Record]:
    """Train `model` in place; yields a record every `evaluate_every` steps.

    The last step has a record, too.

    Args:
        checkpoint: a file to resume from when it exists, and to write at each record.
    """
    optimizer = make_optimizer(model, recipe)
    first = 0
    spent = 0.0  # seconds of the runs before this one
    if checkpoint and checkpoint.exists():
        first, spent = resume(checkpoint, model, optimizer)
    started = perf_counter() - spent
    losses = []  # since the last record
    for step in range(first, recipe.steps):
        lr = learning_rate(step, recipe)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = sample_batch(stream, recipe, step)
        losses.append(training_step(model, optimizer, batch, recipe.clip))
        done = step + 1
        if done % recipe.evaluate_every == 0 or done == recipe.steps:
            seconds = perf_counter() - started
            record = Record(
                step=done,
                tokens=done * recipe.batch * recipe.context,
                train_loss=sum(losses) / len(losses),
                valid_loss=evaluate(model, valid, recipe.context),
                lr=lr,
                seconds=seconds,
            )
            if checkpoint:
                save(checkpoint, model, optimizer, record)
            losses = []
            yield record


def save(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, record: Record
) -> None:
    """Write all that a run needs to go on.

    A crash while writing leaves the older file whole.
    """
    part = path.with_suffix(".part")
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": record.step,
        "seconds": record.seconds,
    }
    torch.save(state, part)
    part.replace(path)


def resume(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Load what `save` wrote. Returns the next step and the seconds spent so far."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]
