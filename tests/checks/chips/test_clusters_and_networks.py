"""Wrong answers to 09-chips/05-clusters-and-networks, each with its diagnosis."""

from __future__ import annotations

from tests.checks.rejecting import Wrong, rejects


def wrong_sign(x):
    """TODO a plausible mistake; at least three for each exercise."""
    return -x


test_wrong_answers = rejects(
    "09-chips/05-clusters-and-networks",
    [
        Wrong("clusters_and_networks_step", wrong_sign, "TODO the mistake, in words"),
    ],
)
