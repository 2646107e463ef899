"""Checks of 07-inference/01-prefill-decode-kv-cache."""

from __future__ import annotations

import torch

from llmlab.course.grading.checking import Checks, diagnose, expect
from llmlab.inference.prefill_decode_kv_cache import prefill_decode_kv_cache

check = Checks("07-inference/01-prefill-decode-kv-cache")


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=("TODO a nudge", "TODO more", "TODO nearly all"),
)
def prefill_decode_kv_cache_step(answer):
    """TODO one line: what the exercise asks."""
    # TODO inputs that expose the usual mistake; the runner seeds the global generator
    x = torch.randn(3, 5)
    got = expect(answer(x), shape=(3, 5), dtype=torch.float32, what="prefill_decode_kv_cache_step(x)")
    diagnose(
        got,
        right=prefill_decode_kv_cache.apply(x),
        mistakes={
            "TODO the mistake, in words": -x,
        },
        what="prefill_decode_kv_cache_step(x)",
    )
