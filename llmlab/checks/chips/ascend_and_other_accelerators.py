"""Checks of 09-chips/04-ascend-and-other-accelerators."""

from __future__ import annotations

import torch

from llmlab.chips.ascend_and_other_accelerators import ascend_and_other_accelerators
from llmlab.course.grading.checking import Checks, diagnose, expect

check = Checks("09-chips/04-ascend-and-other-accelerators")


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=("TODO a nudge", "TODO more", "TODO nearly all"),
)
def ascend_and_other_accelerators_step(answer):
    """TODO one line: what the exercise asks."""
    # TODO inputs that expose the usual mistake; the runner seeds the global generator
    x = torch.randn(3, 5)
    got = expect(
        answer(x),
        shape=(3, 5),
        dtype=torch.float32,
        what="ascend_and_other_accelerators_step(x)",
    )
    diagnose(
        got,
        right=ascend_and_other_accelerators.apply(x),
        mistakes={
            "TODO the mistake, in words": -x,
        },
        what="ascend_and_other_accelerators_step(x)",
    )
