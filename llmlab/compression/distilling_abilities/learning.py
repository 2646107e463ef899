"""From examples to a student: labels, a loss on them, the loop, and greedy replies.

    labels_i  =  ids_i on tokens of the reply, its end included; −100 elsewhere
    L         =  −mean over labels ≠ −100 of log q(labels_i | ids_<i)

The prompt is read and not learnt: the student is asked to answer questions, not to
make them up. Padding is found by *length*, not by the pad token: many tokenizers have
one token for padding and for the end, and who masks it teaches a model never to stop.

    B  examples     T  tokens of the longest     V  vocabulary
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.compression.distillation import DistilConfig, training
from llmlab.compression.distilling_abilities.tasks import (
    CHARACTERS,
    END,
    PAD,
    decode,
    encode,
)
from llmlab.models.generation import generate
from llmlab.models.llama import Llama, LlamaConfig

IGNORED = -100  # what F.cross_entropy and transformers leave out
Loss = Callable[[nn.Module, random.Random], Tensor]


class Example(NamedTuple):
    """What is read, and what is learnt."""

    prompt: str
    reply: str  # with its end token


def labels(
    ids: Int[Tensor, "B T"], prompts: Int[Tensor, " B"], lengths: Int[Tensor, " B"]
) -> Int[Tensor, "B T"]:
    """The ids, −100 where nothing is to be learnt: the prompt and behind the end.

    Args:
        ids: padded on the right.
        prompts: tokens of each prompt.
        lengths: tokens of each example, prompt and reply.
    Raises:
        ValueError: a reply without a token, or one that ends outside `ids`.
    """
    fits = (prompts > 0) & (prompts < lengths) & (lengths <= ids.shape[1])
    if not fits.all():
        raise ValueError(
            f"prompts={prompts.tolist()} and lengths={lengths.tolist()} must be"
            f" 0 < prompt < length ≤ {ids.shape[1]}"
        )
    at = torch.arange(ids.shape[1], device=ids.device)
    learnt = (at >= prompts[:, None]) & (at < lengths[:, None])  # (B, T)
    return ids.masked_fill(~learnt, IGNORED)


def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """ids and labels, (B, T) both, padded on the right.

    Raises:
        ValueError: no examples, or a prompt or reply without a token.
    """
    if not examples:
        raise ValueError("examples is empty: there is nothing to learn from")
    texts = [encode(e.prompt + e.reply) for e in examples]
    lengths = torch.tensor([len(text) for text in texts])
    ids = torch.full((len(texts), int(lengths.max())), encode(PAD)[0])
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    prompts = torch.tensor([len(e.prompt) for e in examples])
    return ids, labels(ids, prompts, lengths)


def mean_loss(
    logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """The cross-entropy of all labels that count. Logits at t predict the token t + 1.

    Raises:
        ValueError: no label counts; the mean would be 0 / 0.
    """
    after = labels[:, 1:]
    if (after == IGNORED).all():
        raise ValueError(f"labels are all {IGNORED}: there is nothing to learn from")
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), after.flatten())


def draw(examples: Sequence[Example], count: int, dice: random.Random) -> list[Example]:
    """A batch, with replacement."""
    return dice.choices(examples, k=count)


def on(examples: Sequence[Example], batch: int = 64) -> Loss:
    """The loss on a batch drawn from examples: plain supervised training."""

    def loss(student: nn.Module, dice: random.Random) -> Tensor:
        ids, wanted = collate(draw(examples, batch, dice))
        return mean_loss(training.logits_of(student, ids), wanted)

    return loss


# The loop -----------------------------------------------------------------------------


def new_student(seed: int, width: int = 64, layers: int = 2) -> Llama:
    """A Llama for the vocabulary of the tasks: 0.1 M parameters by default."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.06,
    )
    return Llama(config)


def fit(student: nn.Module, loss: Loss, steps: int, lr: float = 3e-3, seed: int = 0):
    """AdamW for so many steps, each on what `loss` draws. Returns the losses.

    Raises:
        ValueError: no steps, or a loss that is not finite; the weights are then as
            before that step.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    config = DistilConfig(lr=lr, warmup=20)
    dice = random.Random(seed)
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr, (0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = training.learning_rate(step, steps, config)
        value = loss(student, dice)
        if not value.isfinite():
            raise ValueError(f"loss={value.item()} at step {step} is not finite")
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(weights, config.clip)
        optimizer.step()
        losses.append(value.item())
    return losses


@torch.no_grad()
def write(student: Llama, prompts: Sequence[str], new_tokens: int) -> list[str]:
    """Greedy replies, without their end token; prompts may differ in length."""
    replies: dict[int, str] = {}
    for length in sorted({len(prompt) for prompt in prompts}):
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([encode(prompts[i]) for i in rows])
        end, pad = encode(END + PAD)
        out = generate(student, ids, new_tokens, eos=end, pad=pad)
        for i, row in zip(rows, out[:, length:].tolist(), strict=True):
            replies[i] = decode(row)
    return [replies[i] for i in range(len(prompts))]
