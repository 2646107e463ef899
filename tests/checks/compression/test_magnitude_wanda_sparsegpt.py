"""Wrong answers to 06-compression/09-magnitude-wanda-sparsegpt, each with its diagnosis."""

from __future__ import annotations

from tests.checks.rejecting import Wrong, rejects


def wrong_sign(x):
    """TODO a plausible mistake; at least three for each exercise."""
    return -x


test_wrong_answers = rejects(
    "06-compression/09-magnitude-wanda-sparsegpt",
    [
        Wrong("magnitude_wanda_sparsegpt_step", wrong_sign, "TODO the mistake, in words"),
    ],
)
