"""Wrong answers to 07-inference/06-fused-transformers, each with its diagnosis."""

from __future__ import annotations

from tests.checks.rejecting import Wrong, rejects


def wrong_sign(x):
    """TODO a plausible mistake; at least three for each exercise."""
    return -x


test_wrong_answers = rejects(
    "07-inference/06-fused-transformers",
    [
        Wrong("fused_transformers_step", wrong_sign, "TODO the mistake, in words"),
    ],
)
