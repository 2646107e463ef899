"""Checks of 09-chips/03-tpu."""

from __future__ import annotations

import torch

from llmlab.chips.tpu import tpu
from llmlab.course.grading.checking import Checks, diagnose, expect

check = Checks("09-chips/03-tpu")


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=("TODO a nudge", "TODO more", "TODO nearly all"),
)
def tpu_step(answer):
    """TODO one line: what the exercise asks."""
    # TODO inputs that expose the usual mistake; the runner seeds the global generator
    x = torch.randn(3, 5)
    got = expect(answer(x), shape=(3, 5), dtype=torch.float32, what="tpu_step(x)")
    diagnose(
        got,
        right=tpu.apply(x),
        mistakes={
            "TODO the mistake, in words": -x,
        },
        what="tpu_step(x)",
    )
