"""Checks of 07-inference/05-sampling-and-speculation."""

from __future__ import annotations

import torch

from llmlab.course.grading.checking import Checks, diagnose, expect
from llmlab.inference.sampling_and_speculation import sampling_and_speculation

check = Checks("07-inference/05-sampling-and-speculation")


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=("TODO a nudge", "TODO more", "TODO nearly all"),
)
def sampling_and_speculation_step(answer):
    """TODO one line: what the exercise asks."""
    # TODO inputs that expose the usual mistake; the runner seeds the global generator
    x = torch.randn(3, 5)
    got = expect(answer(x), shape=(3, 5), dtype=torch.float32, what="sampling_and_speculation_step(x)")
    diagnose(
        got,
        right=sampling_and_speculation.apply(x),
        mistakes={
            "TODO the mistake, in words": -x,
        },
        what="sampling_and_speculation_step(x)",
    )
