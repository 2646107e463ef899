"""Wrong answers to 07-inference/07-model-server, each with its diagnosis."""

from __future__ import annotations

from tests.checks.rejecting import Wrong, rejects


def wrong_sign(x):
    """TODO a plausible mistake; at least three for each exercise."""
    return -x


test_wrong_answers = rejects(
    "07-inference/07-model-server",
    [
        Wrong("model_server_step", wrong_sign, "TODO the mistake, in words"),
    ],
)
