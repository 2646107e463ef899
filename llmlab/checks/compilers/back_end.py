"""Checks of 08-compilers/03-back-end."""

from __future__ import annotations

import torch

from llmlab.compilers.back_end import back_end
from llmlab.course.grading.checking import Checks, diagnose, expect

check = Checks("08-compilers/03-back-end")


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=("TODO a nudge", "TODO more", "TODO nearly all"),
)
def back_end_step(answer):
    """TODO one line: what the exercise asks."""
    # TODO inputs that expose the usual mistake; the runner seeds the global generator
    x = torch.randn(3, 5)
    got = expect(answer(x), shape=(3, 5), dtype=torch.float32, what="back_end_step(x)")
    diagnose(
        got,
        right=back_end.apply(x),
        mistakes={
            "TODO the mistake, in words": -x,
        },
        what="back_end_step(x)",
    )
