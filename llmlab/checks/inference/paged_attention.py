"""Checks of 07-inference/03-paged-attention."""

from __future__ import annotations

import torch

from llmlab.course.grading.checking import Checks, diagnose, expect
from llmlab.inference import paged_attention

check = Checks("07-inference/03-paged-attention")


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=("TODO a nudge", "TODO more", "TODO nearly all"),
)
def paged_attention_step(answer):
    """TODO one line: what the exercise asks."""
    # TODO inputs that expose the usual mistake; the runner seeds the global generator
    x = torch.randn(3, 5)
    got = expect(answer(x), shape=(3, 5), dtype=torch.float32, what="paged_attention_step(x)")
    diagnose(
        got,
        right=paged_attention.apply(x),
        mistakes={
            "TODO the mistake, in words": -x,
        },
        what="paged_attention_step(x)",
    )
