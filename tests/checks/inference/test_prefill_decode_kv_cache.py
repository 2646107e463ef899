"""Wrong answers to 07-inference/01-prefill-decode-kv-cache, each with its diagnosis."""

from __future__ import annotations

from tests.checks.rejecting import Wrong, rejects


def wrong_sign(x):
    """TODO a plausible mistake; at least three for each exercise."""
    return -x


test_wrong_answers = rejects(
    "07-inference/01-prefill-decode-kv-cache",
    [
        Wrong("prefill_decode_kv_cache_step", wrong_sign, "TODO the mistake, in words"),
    ],
)
