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

A task is here a code: each letter of the input has a digit, drawn anew for every prompt
(Meta-ICT) or from a few fixed codes (Multitask-ICT). The answer stands among the
demonstrations, and only a student that reads them can know it.

Simplified: one token of answer; no loss on plain text; β is fixed (the paper lets it
change with time).
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


def prompt(task: dict[str, str], shots: int, dice: random.Random) -> tuple[str, str]:
    """Demonstrations and a query that is one of them: "a>3;y>7;a>", and its answer.

    Raises:
        ValueError: more demonstrations than there are inputs, or none.
    """
    if not 1 <= shots <= len(INPUTS):
        raise ValueError(f"shots={shots} must be 1 … {len(INPUTS)}")
    shown = dice.sample(INPUTS, shots)
    query = dice.choice(shown)
    text = ";".join(f"{x}>{task[x]}" for x in shown) + f";{query}>"
    return text, task[query]


def icl_loss(
    student_logits: Float[Tensor, "B V"],
    labels: Int[Tensor, " B"],
    teacher_logits: Float[Tensor, "B V"] | None = None,
    weight: float = 1.0,
) -> Float[Tensor, ""]:
    """L_hard + β L_soft at the query; without a teacher L_hard alone.

    Raises:
        ValueError: a negative weight.
    """
    if weight < 0:
        raise ValueError(f"weight={weight} must be at least 0")
    hard = F.cross_entropy(student_logits, labels)
    if teacher_logits is None:
        return hard
    log_p = log_probs(teacher_logits.detach())
    return hard + weight * kl(log_p, log_probs(student_logits)).mean()


def on_prompts(
    shots: int,
    tasks: Sequence[dict[str, str]] | None = None,
    teacher: nn.Module | None = None,
    weight: float = 1.0,
    batch: int = 64,
) -> Loss:
    """A loss on prompts of new tasks (Meta-ICT), or of given ones (Multitask-ICT)."""

    def loss(student: nn.Module, dice: random.Random) -> Tensor:
        drawn = [
            prompt(dice.choice(tasks) if tasks else code(dice), shots, dice)
            for _ in range(batch)
        ]
        ids = torch.tensor([encode(text) for text, _ in drawn])
        wanted = torch.tensor([encode(y)[0] for _, y in drawn])
        teacher_logits = None
        if teacher is not None:
            with torch.no_grad():
                teacher_logits = training.logits_of(teacher, ids)[:, -1]
        logits = training.logits_of(student, ids)[:, -1]
        return icl_loss(logits, wanted, teacher_logits, weight)

    return loss
