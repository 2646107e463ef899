"""The loop: read or write replies, let both models say what they would write, learn.

    for each batch
        with probability λ    the replies are written anew, from α p + (1−α) q
        z, v  ←  student, teacher on prompt and reply
        L     ←  a method's loss on logits that predict a token of a reply
        a step of AdamW on the student; the teacher never changes

A model is anything that maps ids (B, T) to logits (B, T, V), or to an object with
`.logits`: ours, or one of `transformers`. The logits at t predict the token at t + 1,
so `aligned` drops the last logits and the first token.

Simplified: prompts of a batch have one length, so that replies start together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llmlab.compression.distillation.divergences import log_probs, mixture
from llmlab.models.cache import KVCache
from llmlab.models.llama import Llama

# What scripts/distillation_sweep.py measured, a run a line.
FILE = Path(__file__).parents[1] / "data" / "distillation.csv"


class Batch(NamedTuple):
    """Prompts of one length, each with a reply."""

    ids: Int[Tensor, "B T"]
    reply: Bool[Tensor, "B T"]  # 1 for a token of the reply, its end token included
    prompt: int  # tokens of each prompt


class Aligned(NamedTuple):
    """Logits, and the tokens that they predict: what a loss is made of."""

    teacher_logits: Float[Tensor, "B T-1 V"]
    student_logits: Float[Tensor, "B T-1 V"]
    tokens: Int[Tensor, "B T-1"]
    mask: Bool[Tensor, "B T-1"]


Loss = Callable[[Aligned], Tensor]


@dataclass(frozen=True)
class DistilConfig:
    """How a student learns, whatever the loss."""

    lr: float = 1e-3
    warmup: int = 5
    clip: float = 1.0  # the largest norm of all gradients together
    on_policy: float = 0.0  # λ, the share of batches whose replies are written anew
    # α, the teacher's share in what writes them; MiniLLM's loss must be told the same
    mixed: float = 0.0
    new_tokens: int = 32  # of a reply that is written
    end: int | None = None  # a token that ends a reply
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("on_policy", "mixed"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must be 0 … 1")
        for name in ("warmup", "new_tokens"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} must be positive and finite")


def logits_of(
    model: nn.Module, ids: Int[Tensor, "B T"], **options
) -> Float[Tensor, "B T V"]:
    """Logits of our Llama, or of a model of `transformers`."""
    out = model(ids, **options)
    return getattr(out, "logits", out)


def aligned(teacher_logits: Tensor, student_logits: Tensor, batch: Batch) -> Aligned:
    """Each logit beside the token that it predicts."""
    return Aligned(
        teacher_logits[:, :-1],
        student_logits[:, :-1],
        batch.ids[:, 1:],
        batch.reply[:, 1:].bool(),
    )


# Writing replies ----------------------------------------------------------------------


def reply_mask(
    ids: Int[Tensor, "B T"], prompt: int, end: int | None = None
) -> Bool[Tensor, "B T"]:
    """The tokens after the prompt, up to the first `end` and with it."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, :prompt] = False
    if end is not None:
        ended = ((ids == end) & mask).cumsum(-1)
        over = (ended > 1) | ((ended == 1) & (ids != end))
        mask &= ~over
    return mask


class _Reader:
    """What a model says about the next token; ours keeps keys and values."""

    def __init__(self, model: nn.Module, capacity: int) -> None:
        self.model = model
        self.cache = None
        if isinstance(model, Llama):
            self.cache = KVCache(len(model.model.layers), capacity=capacity)
        self.seen = 0

    def next_log_probs(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B V"]:
        if self.cache is None:
            return log_probs(logits_of(self.model, ids)[:, -1])
        new = ids[:, self.seen :]
        self.seen = ids.shape[1]
        return log_probs(self.model(new, cache=self.cache, logits_to_keep=1)[:, -1])


@torch.no_grad()
def write(
    student: nn.Module,
    prompts: Int[Tensor, "B P"],
    new_tokens: int,
    dice: torch.Generator,
    teacher: nn.Module | None = None,
    mixed: float = 0.0,
    end: int | None = None,
) -> Batch:
    """Replies drawn token by token from α p + (1−α) q, at temperature 1. No gradient.

    Args:
        mixed: α; with 1 the teacher writes alone, and the student is not asked.
        end: a token that ends a reply; what comes after it is not in the mask.
    Raises:
        ValueError: α out of range, or above 0 without a teacher.
    """
    if not 0 <= mixed <= 1:
        raise ValueError(f"mixed={mixed} must be 0 … 1")
    if mixed > 0 and teacher is None:
        raise ValueError(f"mixed={mixed} needs a teacher")
    length = prompts.shape[1] + new_tokens
    readers = {}
    if mixed < 1:
        readers["student"] = _Reader(student, length)
    if mixed > 0:
        readers["teacher"] = _Reader(teacher, length)
    ids = prompts
    for _ in range(new_tokens):
        said = {who: reader.next_log_probs(ids) for who, reader in readers.items()}
        one = next(iter(said.values()))
        log_mixed = mixture(said.get("teacher", one), said.get("student", one), mixed)
        token = torch.multinomial(log_mixed.exp(), 1, generator=dice)  # (B, 1)
        ids = torch.cat([ids, token], dim=1)
    return Batch(ids, reply_mask(ids, prompts.shape[1], end), prompts.shape[1])


# Learning -----------------------------------------------------------------------------


def learning_rate(step: int, steps: int, config: DistilConfig) -> float:
    """A linear warm-up, then half a cosine down to a twentieth."""
    rising = (step + 1) / config.warmup
    down = max(0, step - config.warmup) / max(1, steps - 1 - config.warmup)
    falling = 0.525 + 0.475 * math.cos(math.pi * down)
    return config.lr * min(1.0, rising, falling)


def distil(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Batch],
    loss: Loss,
    config: DistilConfig = DistilConfig(),
) -> list[float]:
    """One AdamW step a batch on whatever of the student trains, no weight decay.

    Returns the loss before each step. Both models end up in evaluation mode. All
    batches are looked at before the first step.

    Args:
        loss: of `Aligned` logits, tokens and mask, as in
            `lambda a: gkd.loss(a.teacher_logits, a.student_logits, a.mask, beta=1)`.
    Raises:
        ValueError: no batches, one that does not fit, vocabularies that differ,
            a student without a weight that trains, or a loss that is not finite; the
            weights are then as before that step.
    """
    batches = checked(batches)
    trained = [p for p in student.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("student has no weight that trains: all are frozen")
    student.eval()  # no dropout: replies must come from the model that learns
    teacher.eval()
    optimizer = torch.optim.AdamW(trained, config.lr, (0.9, 0.95), weight_decay=0.0)
    dice = torch.Generator().manual_seed(config.seed)
    losses = []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(batches), config)
        if float(torch.rand((), generator=dice)) < config.on_policy:
            prompts = batch.ids[:, : batch.prompt]
            batch = write(
                student,
                prompts,
                config.new_tokens,
                dice,
                teacher,
                config.mixed,
                config.end,
            )
        with torch.no_grad():
            teacher_logits = logits_of(teacher, batch.ids)
        value = loss(aligned(teacher_logits, logits_of(student, batch.ids), batch))
        if not value.isfinite():
            raise ValueError(f"loss={value.item()} at step {step} is not finite")
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(trained, config.clip)
        optimizer.step()
        losses.append(value.item())
    return losses


def checked(batches: Iterable[Batch]) -> list[Batch]:
    """Raises: ValueError: there are no batches, or one does not fit together."""
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty: there is nothing to learn from")
    for i, batch in enumerate(batches):
        if batch.ids.dim() != 2 or batch.reply.shape != batch.ids.shape:
            raise ValueError(
                f"batches[{i}]: ids {tuple(batch.ids.shape)} and reply"
                f" {tuple(batch.reply.shape)} must both be (B, T)"
            )
        if not 1 <= batch.prompt <= batch.ids.shape[1]:
            raise ValueError(
                f"batches[{i}].prompt={batch.prompt} must be 1 …"
                f" {batch.ids.shape[1]}: the first reply token needs something before"
            )
        if batch.reply[:, : batch.prompt].any():
            raise ValueError(
                f"batches[{i}].reply marks a token of the prompt: it would be learnt"
            )
    return batches
