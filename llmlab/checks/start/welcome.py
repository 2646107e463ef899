"""Checks of 01-start/01-welcome."""

from __future__ import annotations

import math
import random

import torch

from llmlab.checks.operations import Operations
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect
from llmlab.start import welcome

check = Checks("01-start/01-welcome")


@check.exercise(
    points=1,
    minutes=5,
    difficulty=1,
    importance=5,
    hints=(
        "Count bits first: how many do all the weights have together?",
        (
            "Eight bits are a byte. Odd widths leave a fraction of a byte: memory has"
            " no fractions."
        ),
        "Multiply before you divide, divide by 8, then `math.ceil`.",
    ),
)
def weight_bytes(answer):
    """The bytes that a model's weights take at a precision."""
    billions = random.randrange(7, 80) * 10**9 + 1
    kinds = []
    some = [(1000, 16), (billions, 8), (7, 4), (6, 4), (11, 3), (24, 3)]
    some += [(billions, 4.5), (1001, 4.25)]
    for params, bits in some:
        what = f"weight_bytes({params}, {bits})"
        got = expect(answer(params, bits), kind=(int, float), what=what)
        exact = params * bits / 8
        kinds.append(type(got))
        diagnose(
            got,
            right=welcome.weight_bytes(params, bits),
            mistakes={
                f"{what} is a number of bits: there are 8 in a byte": params * bits,
                (
                    f"{what} rounds the bits of one weight to whole bytes: 4 bits are"
                    " half a byte"
                ): params * (bits // 8),
                (
                    f"{what} gives each weight whole bytes of its own: they are packed,"
                    " so round once, at the end"
                ): params * -(-bits // 8),
                (
                    f"{what} is not a whole number: a fraction of a byte takes a whole"
                    " one"
                ): exact,
                f"{what} drops the last, part-filled byte: round up": exact // 1,
                f"{what} adds a byte where none is part-filled": exact // 1 + 1,
                f"{what} rounds `bits` up: it may be a fraction, the average width": (
                    math.ceil(params * math.ceil(bits) / 8)
                ),
                f"{what} rounds `bits` down: it may be a fraction, the average width": (
                    math.ceil(params * int(bits) / 8)
                ),
                f"{what} rounds `bits` to halves: it may be any fraction": (
                    math.ceil(params * math.ceil(2 * bits) / 2 / 8)
                ),
                f"{what} takes 2 bytes a weight: take `bits` from the argument": (
                    2 * params
                ),
                f"{what} rounds to the nearest byte: round up": round(exact),
                f"{what} is in KiB; bytes are asked": math.ceil(exact / 1024),
                f"{what} is in KB; bytes are asked": math.ceil(exact / 1000),
                f"{what} is in GB; bytes are asked": exact / 1e9,
                f"{what} is in GiB; bytes are asked": exact / 2**30,
            },
            tol=1e-13,
            what=what,
        )
    if answer(1000) != 2000:
        raise Mistake(
            "weight_bytes(1000), without `bits`, must take 16 bits: keep the default"
        )
    if float in kinds:
        raise Mistake(
            "the values are right, but some are floats: a number of bytes is an int"
            " (`math.ceil` gives one)"
        )


@check.exercise(
    points=2,
    minutes=8,
    difficulty=2,
    importance=5,
    hints=(
        (
            "How many bytes does one step read? How many seconds does that take? How"
            " many tokens does a step yield?"
        ),
        (
            "A step reads the weights once for all requests, and the cache of each"
            " request: W + b·C bytes."
        ),
        "It takes (W + b·C) / β seconds and yields b tokens.",
    ),
)
def tokens_per_second(answer):
    """The most tokens per second that the memory's bandwidth allows."""
    W = random.uniform(5, 150) * 1e9
    beta = random.uniform(1, 5) * 1e12
    for b, C in [(16, random.uniform(0.1, 0.2) * W), (1, 3e9), (1, 0.0), (8, 0.0)]:
        what = (
            f"tokens_per_second(weight_bytes={W:.3g}, bandwidth={beta:.3g}, batch={b},"
            f" cache_bytes={C:.3g})"
        )
        got = expect(answer(W, beta, b, C), kind=float, what=what)
        diagnose(
            got,
            right=welcome.tokens_per_second(W, beta, b, C),
            mistakes={
                (
                    "this is the seconds that one token takes; tokens per second are"
                    " asked"
                ): (W + b * C) / beta / b,
                "this is the seconds that a step takes; tokens per second are asked": (
                    (W + b * C) / beta
                ),
                (
                    "you count steps per second: a step yields one token for each of"
                    " the batch's requests"
                ): beta / (W + b * C),
                "you leave the cache out: each step reads it too": b * beta / W,
                (
                    "you leave the cache out, and the batch: a step reads each"
                    " request's cache and yields b tokens"
                ): beta / W,
                (
                    "you read one request's cache; each of the batch's requests has its"
                    " own"
                ): b * beta / (W + C),
                (
                    "you read the weights once for each request: a step reads them once"
                    " for the whole batch"
                ): beta / (W + C),
                "you share one cache among the requests: each has its own, b · C": (
                    b * beta / (W + C / b)
                ),
                "the cache is read too: W + b·C, not W − b·C": (
                    b * beta / (W - b * C) if b * C != W else -1
                ),
                "W is in bytes already: no factor of 2": b * beta / (2 * W + b * C),
                "bandwidth and W are in bytes: nothing here is in bits": (
                    8 * b * beta / (W + b * C)
                ),
                "the times of reading W and the caches add up, not the rates": (
                    b * beta / W + (beta / C if C else 0)
                ),
                "one memory reads W and the caches in turn: their times add up, the"
                " longer one is not the time of both": (b * beta / max(W, b * C)),
                "whole steps are counted: a rate may have a fraction": (
                    b * (beta // (W + b * C))
                ),
                "the rate is cut off behind the point": b * beta // (W + b * C),
                "you add the batch instead of multiplying by it": (
                    beta / (W + b * C) + b
                ),
                "bandwidth is in bytes per second already: no factor of 8": (
                    b * beta / 8 / (W + b * C)
                ),
            },
            tol=1e-9,
            what=what,
        )
    if not close(answer(W, beta), beta / W):
        raise Mistake(
            "tokens_per_second(weight_bytes, bandwidth) alone must be for one request"
            " without a cache: keep the defaults"
        )


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=(
        (
            "exp(89) no longer fits in fp32. Which number can you take from every logit"
            " of a row and leave the ratios as they are?"
        ),
        (
            "Take each row's own largest logit away before `exp`: then every exponent"
            " is at most 0."
        ),
        (
            "`x.amax(dim=-1, keepdim=True)` keeps the dimension, so that it lines up"
            " with x; the sum needs `keepdim=True` too."
        ),
    ),
)
def softmax(answer):
    """A softmax over the last dimension that survives large logits, very different
    rows, and −∞.
    """
    x = torch.randn(2, 3, 3)
    _small(answer, x)
    shift = torch.tensor([[0.0], [1000.0], [-1000.0]])
    got = expect(
        answer(x + 1000),
        shape=(2, 3, 3),
        dtype=torch.float32,
        finite=False,
        what="softmax(x)",
    )
    if not got.isfinite().all():
        raise Mistake(
            "with logits near 1000 it holds NaN or infinity: exp overflows; first take"
            " something away from the logits"
        )
    large = torch.softmax(x, -1)
    alike = {
        (
            "with logits near 1000 all of a row come out alike: subtract something, do"
            " not clamp"
        ): torch.full_like(x, 1 / 3)
    }
    diagnose(
        got,
        right=large,
        mistakes=alike,
        tol=1e-4,
        what="softmax(x) with logits near 1000",
    )
    got = expect(answer(x + shift), shape=(2, 3, 3), finite=False, what="softmax(x)")
    if not close(got, torch.softmax(x + shift, -1), tol=1e-4):
        raise Mistake(
            "it fails when one row's logits are 1000 above another's: each row needs a"
            " maximum of its own"
        )
    spread = 1000 * x
    spread[..., 0] = -2000.0
    got = expect(answer(spread), shape=(2, 3, 3), finite=False, what="softmax(x)")
    if not close(got, torch.softmax(spread, -1), tol=1e-4):
        raise Mistake(
            "it fails when the logits of one row lie 1000 apart: take the row's largest"
            " away, not another of its logits"
        )
    masked = x.masked_fill(torch.tensor([False, True, False]), -torch.inf)
    got = expect(
        answer(masked),
        shape=(2, 3, 3),
        finite=False,
        what="softmax(x) with a logit of −∞",
    )
    if got.isnan().any():
        raise Mistake(
            "with a logit of −∞ (a masked token) it holds NaN: a row's mean or least is"
            " −∞ too, and −∞ − (−∞) is NaN. Take the row's largest away"
        )
    low = answer(masked - 2e4)
    if close(got, torch.softmax(masked, -1)) and not close(low, got, tol=1e-3):
        raise Mistake(
            "a logit of −∞ counts where the others are near −20000: any number in its"
            " place may be reached; leave it at −∞, whose exponential is 0"
        )
    zeroed = masked.masked_fill(masked.isinf(), 0.0)
    diagnose(
        got,
        right=torch.softmax(masked, -1),
        mistakes={
            "a logit of −∞ gets the probability 0: you took it for a logit of 0": (
                torch.softmax(zeroed, -1)
            ),
        },
        what="softmax(x) with a logit of −∞ (a masked token)",
    )
    wide = torch.randn(4, 7)
    with Operations() as seen:
        got = answer(wide)
    diagnose(
        expect(got, shape=(4, 7)),
        right=torch.softmax(wide, -1),
        what="softmax(x) of shape (4, 7)",
    )
    double = answer(wide.double())
    expect(double, shape=(4, 7), dtype=torch.float64, what="softmax(x) of a float64 x")
    if seen.called("softmax"):
        raise Mistake("the values are right, and torch's own: use `exp` and sums")


def _small(answer, x):
    e = x.exp()
    shifted = (x - x.amax(-1, keepdim=True)).exp()
    diagnose(
        expect(
            answer(x),
            shape=(2, 3, 3),
            dtype=torch.float32,
            finite=False,
            what="softmax(x)",
        ),
        right=welcome.softmax(x),
        mistakes={
            "you sum over the whole tensor: each row is a distribution of its own": (
                e / e.sum()
            ),
            "you normalise over the first dimension, not over the last": (
                e / e.sum(0, keepdim=True)
            ),
            "you normalise over the middle dimension, not over the last": (
                e / e.sum(1, keepdim=True)
            ),
            (
                "the sum lost its dimension and lined up with the wrong one:"
                " `keepdim=True`"
            ): lambda: e / e.sum(-1)[:, None],
            "the rows' sums lined up with the wrong dimension: `keepdim=True`": (
                lambda: shifted / shifted.sum(-1)[:, None]
            ),
            "these are log-probabilities: their exponential is asked": x.log_softmax(
                -1
            ),
            "you divide by the sum of the whole tensor: each row is a distribution of"
            " its own": shifted / shifted.sum(),
            "that is 2 to the power of the logits: exp is e to the power": (
                torch.softmax(x * math.log(2), -1)
            ),
            "you divide by the root of the sum of squares: by the sum": (
                shifted / shifted.square().sum(-1, keepdim=True).sqrt()
            ),
            "that is e / (1 + e), a sigmoid: the sum is over the row": (
                shifted / (1 + shifted)
            ),
            "the logits are halved (a temperature of 2): they count as they are": (
                torch.softmax(x / 2, -1)
            ),
            "you take the exponential twice": torch.softmax(e, -1),
            "you divide by the mean: by the sum": e / e.mean(-1, keepdim=True),
            "you did not divide by the sum": e,
            "you took the maximum away, but did not divide by the sum": shifted,
            "you divide the logits by their sum: exp is missing": (
                x / x.sum(-1, keepdim=True)
            ),
            (
                "you changed the exponentials and not their sum (or the other way"
                " round): take the maximum from both"
            ): shifted / e.sum(-1, keepdim=True),
        },
        what="softmax(x)",
    )
