"""Wrong answers to 09-chips/03-tpu, each with its diagnosis."""

from __future__ import annotations

from tests.checks.rejecting import Wrong, rejects


def wrong_sign(x):
    """TODO a plausible mistake; at least three for each exercise."""
    return -x


test_wrong_answers = rejects(
    "09-chips/03-tpu",
    [
        Wrong("tpu_step", wrong_sign, "TODO the mistake, in words"),
    ],
)
