"""Checks of 07-inference/06-fused-transformers."""

from __future__ import annotations

import torch

from llmlab.course.grading.checking import Checks, diagnose, expect
from llmlab.inference.fused_transformers import fused_transformers

check = Checks("07-inference/06-fused-transformers")


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=("TODO a nudge", "TODO more", "TODO nearly all"),
)
def fused_transformers_step(answer):
    """TODO one line: what the exercise asks."""
    # TODO inputs that expose the usual mistake; the runner seeds the global generator
    x = torch.randn(3, 5)
    got = expect(answer(x), shape=(3, 5), dtype=torch.float32, what="fused_transformers_step(x)")
    diagnose(
        got,
        right=fused_transformers.apply(x),
        mistakes={
            "TODO the mistake, in words": -x,
        },
        what="fused_transformers_step(x)",
    )
