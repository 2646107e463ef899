"""Lion: Jiang et al. 2023, https://arxiv.org/abs/2305.12870. Three stages, in a circle:

    imitate        the student learns the teacher's replies to the training pool
    discriminate   a referee scores both on a cache pool; an instruction is hard where
                   the teacher's score is at least τ above the student's
    generate       the teacher makes new instructions, half of them like hard ones, half
                   like easy ones; they become the training pool

    score_i  =  mean of the referee's two scores, one for each order of the replies
    hard     =  { i :  score_i(teacher) − score_i(student) ≥ τ }              τ = 1

One model plays teacher, referee and generator in the paper. The easy half is there so
that what was learnt is not forgotten.

Simplified: the referee is a grader, 10 for the right answer and 1 for a wrong one, so
that order does not matter; "like" an instruction means the same length of chain.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from jaxtyping import Bool, Float
from torch import Tensor

from llmlab.compression.distilling_abilities import tasks

BEST, WORST = 10.0, 1.0


def hard(
    teacher: Float[Tensor, "N 2"], student: Float[Tensor, "N 2"], threshold: float = 1.0
) -> Bool[Tensor, " N"]:
    """Where the student falls behind; two scores each, one for either order.

    Raises:
        ValueError: shapes that differ.
    """
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher {tuple(teacher.shape)} and student {tuple(student.shape)} must"
            " have scores of the same instructions"
        )
    return teacher.mean(1) - student.mean(1) >= threshold


def score(reply: str, answer: int) -> float:
    """The referee's, of 1 to 10."""
    return BEST if tasks.last_number(reply) == answer else WORST


def like(chain: str, dice: random.Random) -> str:
    """A new chain of the same length."""
    return tasks.draw(1, (len(tasks.steps_of(chain)),), dice)[0]


def generate(
    hard_ones: Sequence[str],
    easy_ones: Sequence[str],
    count: int,
    dice: random.Random,
    share: float = 0.5,
) -> list[str]:
    """New chains, that share of them like hard ones; all, if there are no easy ones.

    Raises:
        ValueError: share out of range, or nothing to be like.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} must be 0 … 1")
    if not hard_ones and not easy_ones:
        raise ValueError("hard_ones and easy_ones are both empty")
    made = []
    for i in range(count):
        source = hard_ones if i < round(share * count) else easy_ones
        made.append(like(dice.choice(source or hard_ones or easy_ones), dice))
    return made
