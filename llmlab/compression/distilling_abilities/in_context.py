"""In-context-learning distillation: Huang et al. 2022,
https://arxiv.org/abs/2212.10670.

A prompt shows k demonstrations of a task and asks for one more. The student learns the
right answer and the teacher's whole distribution, both given the same demonstrations:

    L_hard  =  −log q(y | D, x)
    L_soft  =  KL( p(· | D, x) ‖ q(· | D, x) )
    L       =  L_hard + β L_soft        + the same two of plain text, where there is any

    Meta-ICT        tasks for training, other tasks for use: only reading is learnt
    Multitask-ICT   the tasks of use are trained on, too

    D  demonstrations x_i > y_i     x, y  query and its answer     β  weight

A task is here a code: each letter has a digit, drawn anew for every text (Meta-ICT) or
from a few fixed codes (Multitask-ICT). A text runs through some letters again and
again, "a3y7a3n1y7", so that each digit is a query and the text before it shows how.

Simplified: one token of answer; no loss on plain text; β is fixed.

    B  texts     K  queries of a text     V  vocabulary
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.compression.distillation import kl, log_probs, training
from llmlab.compression.distilling_abilities.learning import Loss
from llmlab.compression.distilling_abilities.tasks import encode

INPUTS = "abynAFCR"
OUTPUTS = "0123456789"


def code(dice: random.Random) -> dict[str, str]:
    """A task: a digit for each input."""
    return {x: dice.choice(OUTPUTS) for x in INPUTS}


def stream(
    task: dict[str, str], letters: int, queries: int, dice: random.Random
) -> tuple[str, list[bool]]:
    """A text of so many letters with their digits, and which of them had been shown.

    Raises:
        ValueError: more letters than there are inputs, or no letter or query.
    """
    if not 1 <= letters <= len(INPUTS) or queries < 1:
        raise ValueError(
            f"letters={letters} must be 1 … {len(INPUTS)}, queries={queries} at least 1"
        )
    asked = dice.choices(dice.sample(INPUTS, letters), k=queries)
    shown = [x in asked[:i] for i, x in enumerate(asked)]
    return "".join(x + task[x] for x in asked), shown


def icl_loss(
    student_logits: Float[Tensor, "B K V"],
    labels: Int[Tensor, "B K"],
    teacher_logits: Float[Tensor, "B K V"] | None = None,
    weight: float = 1.0,
) -> Float[Tensor, ""]:
    """L_hard + β L_soft, the mean over queries; without a teacher L_hard alone.

    Raises:
        ValueError: a negative weight.
    """
    if weight < 0:
        raise ValueError(f"weight={weight} must be at least 0")
    hard = F.cross_entropy(student_logits.flatten(0, 1), labels.flatten())
    if teacher_logits is None:
        return hard
    log_p = log_probs(teacher_logits.detach())
    return hard + weight * kl(log_p, log_probs(student_logits)).mean()


def at_queries(logits: Float[Tensor, "B T V"]) -> Float[Tensor, "B K V"]:
    """Those behind a letter: what they predict is its digit."""
    return logits[:, 0::2]


def on_streams(
    tasks: Sequence[dict[str, str]] | None = None,
    teacher: nn.Module | None = None,
    weight: float = 1.0,
    letters: int = 4,
    queries: int = 12,
    batch: int = 64,
) -> Loss:
    """The loss on texts of new codes (Meta-ICT), or of given ones (Multitask-ICT)."""

    def loss(student: nn.Module, dice: random.Random) -> Tensor:
        texts = []
        for _ in range(batch):
            task = dice.choice(tasks) if tasks else code(dice)
            texts.append(stream(task, letters, queries, dice)[0])
        ids = torch.tensor([encode(text) for text in texts])
        teacher_logits = None
        if teacher is not None:
            with torch.no_grad():
                teacher_logits = at_queries(training.logits_of(teacher, ids))
        logits = at_queries(training.logits_of(student, ids))
        return icl_loss(logits, ids[:, 1::2], teacher_logits, weight)

    return loss


@torch.no_grad()
def accuracy(model: nn.Module, count: int, dice: random.Random, tasks=None) -> float:
    """The share of digits that are right, of letters that had been shown."""
    right, asked = 0, 0
    for _ in range(count):
        task = dice.choice(tasks) if tasks else code(dice)
        text, shown = stream(task, 4, 12, dice)
        ids = torch.tensor([encode(text)])
        logits = at_queries(training.logits_of(model, ids))
        hits = (logits.argmax(-1) == ids[:, 1::2])[0]
        right += int(hits[torch.tensor(shown)].sum())
        asked += sum(shown)
    return right / asked
