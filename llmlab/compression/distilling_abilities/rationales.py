"""Rationales as data: Fine-tune-CoT and MT-CoT.

Fine-tune-CoT, Ho et al. 2022, https://arxiv.org/abs/2212.10071. The teacher is asked
for a rationale and an answer to each question, several times; what ends in a wrong
answer is thrown away; the student is trained on the rest as on any text:

    D  =  { (q_i, r_ij # a_i) :  answer of r_ij = a_i,  j = 1 … m,  all r_ij different }

m is the paper's "diverse reasoning". The filter looks at the answer alone, so that a
rationale with two mistakes that cancel is kept.

MT-CoT, Li et al. 2022, https://arxiv.org/abs/2210.06726. One student learns two tasks:
to answer at once, and to write the rationale and then the answer:

    L  =  α L_answer + (1−α) L_rationale          each the mean over its own tokens

    q  question     r  rationale     a  answer     α  weight of the answers

Simplified: the teacher is a program that solves chains (`tasks`) and makes mistakes at
a rate; the two tasks of MT-CoT are told apart by a letter before the question.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.compression.distillation import training
from llmlab.compression.distilling_abilities import tasks
from llmlab.compression.distilling_abilities.learning import (
    Example,
    Loss,
    collate,
    draw,
    mean_loss,
)
from llmlab.compression.distilling_abilities.tasks import ANSWER, END

ANSWER_TASK, RATIONALE_TASK = "A", "R"


def rationale(
    chain: str, dice: random.Random | None = None, mistakes: float = 0.0
) -> str:
    """A teacher's rationale and answer: "3+5=8;8*2=6#6".

    Args:
        dice: with it a sum or a product is written either way round, 3+5 or 5+3.
        mistakes: the share of steps whose result is wrong; it is carried on.
    Raises:
        ValueError: mistakes out of range, or asked for without dice.
    """
    if not 0 <= mistakes <= 1:
        raise ValueError(f"mistakes={mistakes} must be 0 … 1")
    if mistakes and dice is None:
        raise ValueError(f"mistakes={mistakes} need dice")
    value = int(chain[0])
    lines = []
    for step in tasks.steps_of(chain):
        after = tasks.apply(value, step)
        if dice is not None and dice.random() < mistakes:
            after = (after + dice.randint(1, 9)) % 10
        line = f"{value}{step}={after}"
        if dice is not None and step[0] != "-" and dice.random() < 0.5:
            line = f"{step[1]}{step[0]}{value}={after}"
        lines.append(line)
        value = after
    return ";".join(lines) + f"{ANSWER}{value}"


def keep(sampled: Sequence[str], answer: int, most: int | None = None) -> list[str]:
    """Rationales that end in the answer, each once, in their order, at most so many.

    Raises:
        ValueError: `most` below 1.
    """
    if most is not None and most < 1:
        raise ValueError(f"most={most} must be at least 1")
    right = [text for text in sampled if tasks.last_number(text) == answer]
    return list(dict.fromkeys(right))[:most]


def sound(text: str) -> bool:
    """Whether every line of a rationale is true: more than its answer says."""
    lines = text.split(ANSWER)[0].split(";")
    return all(tasks.answer(line[:3]) == int(line[4]) for line in lines)


def answers_only(chains: Sequence[str], task: str = "") -> list[Example]:
    """The baseline: the answer and nothing else."""
    return [
        Example(f"{task}{chain}:", f"{ANSWER}{tasks.answer(chain)}{END}")
        for chain in chains
    ]


def with_rationales(chains: Sequence[str], task: str = "") -> list[Example]:
    """The teacher's one rationale for each question, without mistakes."""
    return [Example(f"{task}{chain}:", rationale(chain) + END) for chain in chains]


def diverse(
    chains: Sequence[str],
    each: int,
    dice: random.Random,
    mistakes: float = 0.1,
    samples: int = 16,
) -> list[Example]:
    """Fine-tune-CoT: sampled, filtered by the answer, up to `each` different ones."""
    examples = []
    for chain in chains:
        sampled = [rationale(chain, dice, mistakes) for _ in range(samples)]
        for text in keep(sampled, tasks.answer(chain), each):
            examples.append(Example(f"{chain}:", text + END))
    return examples


def mt_cot_loss(
    answer_logits: Float[Tensor, "B T V"],
    answer_labels: Int[Tensor, "B T"],
    rationale_logits: Float[Tensor, "B S V"],
    rationale_labels: Int[Tensor, "B S"],
    alpha: float = 0.5,
) -> Float[Tensor, ""]:
    """α L_answer + (1−α) L_rationale, each a mean over its own labels.

    One mean over all labels would weigh the tasks by their lengths instead.

    Raises:
        ValueError: α out of range, or a task without a label that counts.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must be 0 … 1")
    of_answers = mean_loss(answer_logits, answer_labels)
    of_rationales = mean_loss(rationale_logits, rationale_labels)
    return alpha * of_answers + (1 - alpha) * of_rationales


def both_tasks(chains: Sequence[str], alpha: float = 0.5, batch: int = 64) -> Loss:
    """MT-CoT on a batch of questions, each asked both ways."""
    pairs = list(
        zip(
            answers_only(chains, ANSWER_TASK),
            with_rationales(chains, RATIONALE_TASK),
            strict=True,
        )
    )

    def loss(student: nn.Module, dice: random.Random) -> Tensor:
        answers, rationales = zip(*draw(pairs, batch, dice), strict=True)
        ids, wanted = collate(answers)
        long_ids, long_wanted = collate(rationales)
        return mt_cot_loss(
            training.logits_of(student, ids),
            wanted,
            training.logits_of(student, long_ids),
            long_wanted,
            alpha,
        )

    return loss
