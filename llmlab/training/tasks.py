"""Three small tasks on the course model, for fair comparisons.

All methods get the same examples, in the same order, and the same number of steps.

    bible    language modelling on a style that the model has not seen;
             every token counts
    source   which text a passage comes from: " old" or " new" addresses,
             " sea" (Moby-Dick) or " faith" (the Bible);
             the label, one token, counts; chance is 1/4
    sort     digits in order: "538=358"; no text teaches it;
             the answer's digits count

`make` gives batches as `transformers` would have them: labels stand at their own token,
−100 where nothing is predicted, and a model that reads tokens up to t is asked for the
label at t + 1. A batch is a function of (task, split, seed, number).

    B  examples of a batch
    T  tokens of its longest example; the others are padded on the right
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.models import course_model
from llmlab.models.language_model import IGNORE, next_token_loss

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD = 1  # <|pad|> of the course model's tokenizer
LENGTH = 64  # tokens of a Bible window
LABELS = (" old", " new", " sea", " faith")  # one token each
QUESTION = "\n\nFrom:"
DIGITS = (2, 4)  # what is to be sorted has 2, 3 or 4 different digits
# examples in a batch: about as much work for each task
SIZE = {"bible": 8, "source": 8, "sort": 16}
CHARS_A_TOKEN = 8  # enough text for a token, whatever the passage


class Batch(NamedTuple):
    """What a training step reads."""

    input_ids: Int[Tensor, "B T"]
    # the token itself where it is to be predicted, −100 elsewhere
    labels: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]  # 1 for a token, 0 for padding


# (tokens, how many of the last ones are to be predicted)
Example = tuple[list[int], int]


def make(
    name: str,
    tokenizer: Tokenizer,
    split: str = "train",
    seed: int = 0,
    batches: int = 40,
    size: int | None = None,
) -> list[Batch]:
    """Batches of one task.

    Batch i of a (name, split, seed) is the same, however many batches are made.

    Args:
        name: "bible", "source" or "sort".
        split: "train" or "valid". Of the texts whole documents are held out; of the
            digits every set whose sum is a multiple of 5.
        seed: draws the examples; another seed, other examples of the same split.
        size: examples in a batch; None takes the task's own, `SIZE[name]`.
    Raises:
        ValueError: a name or a split that there is not, or a count below 1.
    """
    if name not in TASKS:
        raise ValueError(f"name={name!r} is not a task: use one of {', '.join(TASKS)}")
    if split not in course_model.SPLITS:
        raise ValueError(f"split={split!r} must be 'train' or 'valid'")
    size = SIZE[name] if size is None else size
    for what, value in (("batches", batches), ("size", size)):
        if value < 1:
            raise ValueError(f"{what}={value} must be at least 1")
    start = seed * 1_000_003 + course_model.SPLITS.index(split) * 500_009
    dice = [torch.Generator().manual_seed(start + i) for i in range(batches)]
    return [_pad(TASKS[name](tokenizer, split, size, die)) for die in dice]


def _pad(examples: Sequence[Example]) -> Batch:
    longest = max(len(tokens) for tokens, _ in examples)
    ids = torch.full((len(examples), longest), PAD)
    labels = torch.full((len(examples), longest), IGNORE)
    mask = torch.zeros_like(ids)
    for row, (tokens, counted) in enumerate(examples):
        n = len(tokens)
        ids[row, :n] = torch.tensor(tokens)
        mask[row, :n] = 1
        labels[row, n - counted : n] = ids[row, n - counted : n]
    return Batch(ids, labels, mask)


# The tasks: (tokenizer, split, size, dice) → examples ---------------------------------


def _draw(low: int, high: int, dice: torch.Generator) -> int:
    """An integer of low … high."""
    return int(torch.randint(low, high + 1, (1,), generator=dice))


def _passage(
    text: str, length: int, tokenizer: Tokenizer, dice: torch.Generator
) -> list[int]:
    """`length` tokens from a random place of `text`, from the beginning of a word."""
    last_place = len(text) - CHARS_A_TOKEN * (length + 8)
    start = text.index(" ", _draw(0, last_place, dice)) + 1
    passage = text[start : start + CHARS_A_TOKEN * length]
    return tokenizer.encode(passage).ids[:length]


def bible(
    tokenizer: Tokenizer, split: str, size: int, dice: torch.Generator
) -> list[Example]:
    """Windows of `LENGTH` tokens from the King James Bible."""
    text = course_model.corpus("bible", split)
    return [(_passage(text, LENGTH, tokenizer, dice), LENGTH) for _ in range(size)]


@cache  # each batch reads them, and they are megabytes
def _sources(split: str) -> tuple[str, ...]:
    """The four texts, in the order of `LABELS`.

    They are the first third of the addresses, the last third, and two books.
    """
    addresses = course_model.documents("addresses", split)
    third = len(addresses) // 3
    return (
        "\n\n".join(addresses[:third]),
        "\n\n".join(addresses[-third:]),
        course_model.corpus("moby-dick", split),
        course_model.corpus("bible", split),
    )


def source(
    tokenizer: Tokenizer, split: str, size: int, dice: torch.Generator
) -> list[Example]:
    """A passage of 12 to 24 tokens, a question, and the label.

    Each label comes as often as the others.
    """
    texts = _sources(split)
    question = tokenizer.encode(QUESTION).ids
    answers = [tokenizer.encode(label).ids for label in LABELS]
    order = (torch.randperm(size, generator=dice) % len(LABELS)).tolist()
    examples = []
    for k in order:
        length = _draw(12, 24, dice)
        passage = _passage(texts[k], length, tokenizer, dice)
        examples.append((passage + question + answers[k], 1))
    return examples


def sort(
    tokenizer: Tokenizer, split: str, size: int, dice: torch.Generator
) -> list[Example]:
    """2 to 4 different digits, and the same in order."""
    examples = []
    while len(examples) < size:
        shuffled = torch.randperm(10, generator=dice)
        digits = shuffled[: _draw(*DIGITS, dice)].tolist()
        is_held_out = sum(digits) % 5 == 0
        if is_held_out != (split == "valid"):
            continue
        asked = "".join(map(str, digits))
        in_order = "".join(map(str, sorted(digits)))
        question = tokenizer.encode(f"{asked}=").ids
        answer = tokenizer.encode(in_order).ids
        examples.append((question + answer, len(answer)))
    return examples


TASKS: dict[str, Callable[..., list[Example]]] = {
    "bible": bible,
    "source": source,
    "sort": sort,
}


# Training and measuring ---------------------------------------------------------------


def logits_of(model: nn.Module, batch: Batch) -> Float[Tensor, "B T V"]:
    """Logits of our Llama, or of one from `transformers`.

    `peft` puts its virtual tokens before the others; their logits are left off.
    """
    out = model(batch.input_ids, attention_mask=batch.attention_mask)
    return getattr(out, "logits", out)[:, -batch.input_ids.shape[1] :]


def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    lr: float,
    warmup: int = 5,
    clip: float = 1.0,
    penalty: Callable[[], Tensor] | None = None,
    after_step: Callable[[int], object] | None = None,
) -> list[float]:
    """One AdamW step a batch on whatever of `model` trains, no weight decay.

    Returns the loss before each step.

    lr rises over `warmup` steps and falls to 5% along half a cosine. The model is left
    in evaluation mode.

    Args:
        penalty: what is added to the loss, for a method that asks for it (AdaLoRA's
            regulariser).
        after_step: called with the step's number after the update, gradients still
            there (AdaLoRA's budget).
    """
    batches = list(batches)
    losses = []
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for step, batch in enumerate(batches):
        rising = (step + 1) / warmup
        down = max(0, step - warmup) / max(1, len(batches) - 1 - warmup)
        falling = 0.525 + 0.475 * math.cos(math.pi * down)
        optimizer.param_groups[0]["lr"] = lr * min(rising, falling)
        loss = next_token_loss(logits_of(model, batch), batch.labels)
        total = loss if penalty is None else loss + penalty()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        if after_step is not None:
            after_step(step)
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[Batch]) -> tuple[float, float]:
    """(loss, accuracy) on some examples.

    Loss is in nats per token that counts. Accuracy is the share of examples with every
    such token right.

    Greedy decoding writes the whole answer exactly when each token is the likeliest
    after the right ones before it, so for `source` and `sort` the accuracy is that of
    greedy decoding. In "bible" hardly any window is right throughout.
    """
    total_loss = 0.0
    tokens = 0  # that count
    right = 0  # examples with every such token right
    examples = 0
    for batch in batches:
        logits = logits_of(model, batch)[:, :-1]  # [B, T−1, V]
        targets = batch.labels[:, 1:]  # [B, T−1]
        counts = targets != IGNORE
        loss = F.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction="sum"
        )
        total_loss += loss.item()
        tokens += int(counts.sum())
        is_right = (logits.argmax(-1) == targets) | ~counts
        right += int(is_right.all(dim=1).sum())
        examples += len(targets)
    return total_loss / tokens, right / examples
