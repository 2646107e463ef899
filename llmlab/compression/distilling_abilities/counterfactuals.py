"""Counterfactuals: DISCO's, for questions, and SCOTT's, for rationales.

DISCO, Chen et al. 2022, https://arxiv.org/abs/2212.10534. A large model rewrites a span
of a question so that its label changes from l to l'; a teacher for the task keeps what
moved its belief in l':

    Δ  =  p(l' | x') − p(l' | x)            keep x' where Δ > τ

What did not matter stays as it was in x', and its label is another: so the student
cannot live on it. A pair counts as understood if both of its halves are right.

SCOTT, Wang et al. 2023, https://arxiv.org/abs/2305.01879. First, rationales that belong
to the answer: a token is good if it gets likelier once the answer a* is known, against
a wrong or empty answer a':

    s(t)  =  log p(t | q, a*, r_<) − λ log p(t | q, a', r_<)           greedy in s

λ = 1 is the growth in plausibility alone; the authors' code has λ = 0.5. Second, the
student learns to follow a rationale, also one that leads elsewhere:

    L  =  −log q(r, a | q)  −  log q(a' | q, r')           r' leads to a'

In the second part r' is read, and only a' is learnt.

    x, l   question and label     x', l'   edited, and what it then is
    q      question (and the student's probabilities, as in all of distillation)
    τ      0.25 in the code of DISCO's authors
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmlab.compression.distillation import log_probs, training
from llmlab.compression.distilling_abilities import tasks
from llmlab.compression.distilling_abilities.learning import Example
from llmlab.compression.distilling_abilities.tasks import ANSWER, END
from llmlab.models.llama import Llama

FACTUAL, COUNTERFACTUAL = "F", "C"
OTHER = {"y": "n", "n": "y"}


# DISCO --------------------------------------------------------------------------------


def edit(question: str, dice: random.Random) -> str:
    """A comparison with one digit of it rewritten; the letter before it stays."""
    at = dice.choice([i for i, c in enumerate(question) if c.isdigit()])
    tens = at in (1, 4)
    digits = [d for d in "0123456789" if d != question[at] and not (tens and d == "0")]
    return question[:at] + dice.choice(digits) + question[at + 1 :]


def shift(
    before: Float[Tensor, "N L"], after: Float[Tensor, "N L"], new: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Δ: how much likelier the new label became. Both are probabilities."""
    at = new[:, None]
    return (after.gather(1, at) - before.gather(1, at)).squeeze(1)


@torch.no_grad()
def beliefs(model: Llama, questions: Sequence[str]) -> Float[Tensor, "N 2"]:
    """A model's probabilities of n and y, of these two alone."""
    ids = torch.tensor([tasks.encode(f"{question}:") for question in questions])
    return log_probs(training.logits_of(model, ids)[:, -1, tasks.encode("ny")]).exp()


def disco(
    pairs: Sequence[tuple[str, str]],
    teacher: Llama | None,
    dice: random.Random,
    threshold: float = 0.25,
) -> list[tuple[str, str]]:
    """One edit of each question, claimed to turn its label; the teacher throws out.

    Without a teacher every claim is believed.
    """
    edited = [edit(question, dice) for question, _ in pairs]
    claimed = [(e, OTHER[label]) for e, (_, label) in zip(edited, pairs, strict=True)]
    if teacher is None:
        return claimed
    before = beliefs(teacher, [question for question, _ in pairs])
    new = torch.tensor(["ny".index(label) for _, label in claimed])
    moved = shift(before, beliefs(teacher, edited), new) > threshold
    return [pair for pair, good in zip(claimed, moved.tolist(), strict=True) if good]


def consistency(
    predicted: Sequence, labels: Sequence, predicted_new: Sequence, new: Sequence
) -> tuple[float, float]:
    """Two shares of pairs: in which the prediction changed, and in which both halves
    are right.

    Raises:
        ValueError: lengths that differ, or no pair.
    """
    counts = {len(predicted), len(labels), len(predicted_new), len(new)}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"predicted, labels, predicted_new and new must be as many, and at least"
            f" one; they are {sorted(counts)}"
        )
    rows = list(zip(predicted, labels, predicted_new, new, strict=True))
    changed = [a != b for a, _, b, _ in rows]
    both = [a == label and b == other for a, label, b, other in rows]
    return sum(changed) / len(rows), sum(both) / len(rows)


# SCOTT --------------------------------------------------------------------------------


def contrastive(
    with_answer: Float[Tensor, "*batch V"],
    without: Float[Tensor, "*batch V"],
    weight: float = 0.5,
) -> Float[Tensor, "*batch V"]:
    """s: log-probabilities with the answer, less λ times those without it, from logits.

    Raises:
        ValueError: shapes that differ, or a negative weight.
    """
    if with_answer.shape != without.shape:
        raise ValueError(
            f"with_answer {tuple(with_answer.shape)} and without"
            f" {tuple(without.shape)} must have one shape"
        )
    if weight < 0:
        raise ValueError(f"weight={weight} must be at least 0")
    return log_probs(with_answer) - weight * log_probs(without)


def told(chain: str, value: int) -> str:
    """A rationale of one step that leads to `value`, true or not."""
    return f"{chain}={value}"


def factual(chain: str, value: int, task: str = FACTUAL) -> Example:
    """Rationale and answer are learnt; the rationale leads to `value`."""
    reply = f"{told(chain, value)}{ANSWER}{tasks.answer(chain)}{END}"
    return Example(f"{task}{chain}:", reply)


def counterfactual(chain: str, value: int, task: str = COUNTERFACTUAL) -> Example:
    """The rationale is read, and only the answer that follows from it is learnt."""
    return Example(f"{task}{chain}:{told(chain, value)}{ANSWER}", f"{value}{END}")
