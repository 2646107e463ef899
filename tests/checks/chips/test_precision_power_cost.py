"""Wrong answers to 09-chips/06-precision-power-cost, each with its diagnosis."""

from __future__ import annotations

from tests.checks.rejecting import Wrong, rejects


def wrong_sign(x):
    """TODO a plausible mistake; at least three for each exercise."""
    return -x


test_wrong_answers = rejects(
    "09-chips/06-precision-power-cost",
    [
        Wrong("precision_power_cost_step", wrong_sign, "TODO the mistake, in words"),
    ],
)
