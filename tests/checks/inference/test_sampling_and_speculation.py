"""Wrong answers to 07-inference/05-sampling-and-speculation, each with its diagnosis."""

from __future__ import annotations

from tests.checks.rejecting import Wrong, rejects


def wrong_sign(x):
    """TODO a plausible mistake; at least three for each exercise."""
    return -x


test_wrong_answers = rejects(
    "07-inference/05-sampling-and-speculation",
    [
        Wrong("sampling_and_speculation_step", wrong_sign, "TODO the mistake, in words"),
    ],
)
