"""Wrong answers to 06-compression/15-compression-compared, each with its diagnosis."""

from __future__ import annotations

from tests.checks.rejecting import Wrong, rejects


def wrong_sign(x):
    """TODO a plausible mistake; at least three for each exercise."""
    return -x


test_wrong_answers = rejects(
    "06-compression/15-compression-compared",
    [
        Wrong("compression_compared_step", wrong_sign, "TODO the mistake, in words"),
    ],
)
