"""Wrong answers to 08-compilers/03-back-end, each with its diagnosis."""

from __future__ import annotations

from tests.checks.rejecting import Wrong, rejects


def wrong_sign(x):
    """TODO a plausible mistake; at least three for each exercise."""
    return -x


test_wrong_answers = rejects(
    "08-compilers/03-back-end",
    [
        Wrong("back_end_step", wrong_sign, "TODO the mistake, in words"),
    ],
)
