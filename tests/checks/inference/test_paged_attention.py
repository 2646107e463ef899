"""Wrong answers to 07-inference/03-paged-attention, each with its diagnosis."""

from __future__ import annotations

from tests.checks.rejecting import Wrong, rejects


def wrong_sign(x):
    """TODO a plausible mistake; at least three for each exercise."""
    return -x


test_wrong_answers = rejects(
    "07-inference/03-paged-attention",
    [
        Wrong("paged_attention_step", wrong_sign, "TODO the mistake, in words"),
    ],
)
