"""Checks of 06-compression/15-compression-compared."""

from __future__ import annotations

import torch

from llmlab.compression import compression_compared
from llmlab.course.grading.checking import Checks, diagnose, expect

check = Checks("06-compression/15-compression-compared")


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=("TODO a nudge", "TODO more", "TODO nearly all"),
)
def compression_compared_step(answer):
    """TODO one line: what the exercise asks."""
    # TODO inputs that expose the usual mistake; the runner seeds the global generator
    x = torch.randn(3, 5)
    got = expect(answer(x), shape=(3, 5), dtype=torch.float32, what="compression_compared_step(x)")
    diagnose(
        got,
        right=compression_compared.apply(x),
        mistakes={
            "TODO the mistake, in words": -x,
        },
        what="compression_compared_step(x)",
    )
