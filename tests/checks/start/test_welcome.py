"""Wrong answers to 01-start/01-welcome, each with the diagnosis that it must get."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from llmlab.checks.start.welcome import check
from tests.checks.rejecting import Wrong, rejects, verdict


def bits_not_bytes(params, bits=16):
    return int(params * bits)


def whole_bytes_each(params, bits=16):
    return int(params * math.ceil(bits / 8))


def no_byte_for_four_bits(params, bits=16):
    return int(params * (bits // 8))


def rounds_down(params, bits=16):
    return int(params * bits // 8)


def not_rounded(params, bits=16):
    return params * bits / 8


def gigabytes(params, bits=16):
    return params * bits / 8 / 1e9


def whole_but_a_float(params, bits=16):
    return float(math.ceil(params * bits / 8))


def megabytes(params, bits=16):
    return params * bits / 8 / 1e6


def one_argument(params):
    return 2 * params


def seconds_per_token(weight_bytes, bandwidth, batch=1, cache_bytes=0.0):
    return (weight_bytes + batch * cache_bytes) / bandwidth / batch


def steps_per_second(weight_bytes, bandwidth, batch=1, cache_bytes=0.0):
    return bandwidth / (weight_bytes + batch * cache_bytes)


def no_cache(weight_bytes, bandwidth, batch=1, cache_bytes=0.0):
    return batch * bandwidth / weight_bytes


def one_cache(weight_bytes, bandwidth, batch=1, cache_bytes=0.0):
    return batch * bandwidth / (weight_bytes + cache_bytes)


def weights_for_each(weight_bytes, bandwidth, batch=1, cache_bytes=0.0):
    return batch * bandwidth / (batch * (weight_bytes + cache_bytes))


def per_hour(weight_bytes, bandwidth, batch=1, cache_bytes=0.0):
    return 3600 * batch * bandwidth / (weight_bytes + batch * cache_bytes)


def as_tensor(weight_bytes, bandwidth, batch=1, cache_bytes=0.0):
    return torch.tensor(batch * bandwidth / (weight_bytes + batch * cache_bytes))


def overflows(x):
    return x.exp() / x.exp().sum(-1, keepdim=True)


def one_maximum(x):
    e = (x - x.max()).exp()
    return e / e.sum(-1, keepdim=True)


def whole_tensor(x):
    e = (x - x.max()).exp()
    return e / e.sum()


def first_dimension(x):
    return x.softmax(0)


def no_keepdim(x):
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1)[:, None]


def logs(x):
    return x.log_softmax(-1)


def never_divides(x):
    return (x - x.amax(-1, keepdim=True)).exp()


def in_place(x):
    x -= x.amax(-1, keepdim=True)
    return x.exp() / x.exp().sum(-1, keepdim=True)


def clamps(x):
    e = x.clamp(-80, 80).exp()
    return e / e.sum(-1, keepdim=True)


def half_precision(x):
    return x.half().softmax(-1)


def adds_an_epsilon(x):
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / (e.sum(-1, keepdim=True) + 1e-2)


def masks_to_nan(x):
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True) + 0 * x


# Kinds of mistake that once had no sentence, or got through.


def sized(round_bits=lambda b: b, default=16, end=math.ceil):
    def weight_bytes(params, bits=default):
        return end(params * round_bits(bits) / 8)

    return weight_bytes


def rate(tokens, default_batch=1):
    """tokens_per_second from W, β, b and C."""

    def tokens_per_second(W, beta, b=default_batch, C=0.0):
        return tokens(W, beta, b, C)

    return tokens_per_second


def soft(less=lambda x: x.amax(-1, keepdim=True), e=torch.exp, over=-1):
    def softmax(x):
        power = e(x - less(x))
        return power / power.sum(over, keepdim=True)

    return softmax


def zero_for_infinity(x):
    return soft()(x.masked_fill(x.isinf(), 0.0))


MORE = [
    Wrong("weight_bytes", sized(default=32), "keep the default"),
    Wrong("weight_bytes", sized(math.ceil), "rounds `bits` up"),
    Wrong("weight_bytes", sized(int), "rounds `bits` down"),
    Wrong("weight_bytes", sized(lambda b: math.ceil(2 * b) / 2), "to halves"),
    Wrong("weight_bytes", sized(end=lambda x: int(x) + 1), "where none is part-filled"),
    Wrong(
        "tokens_per_second",
        rate(lambda W, beta, b, C: b * beta / (W + b * C), 8),
        "keep the defaults",
    ),
    Wrong(
        "tokens_per_second",
        rate(lambda W, beta, b, C: b * beta / max(W, b * C)),
        "their times add up",
    ),
    Wrong(
        "tokens_per_second",
        rate(lambda W, beta, b, C: b * beta / W + (beta / C if C else 0)),
        "not the rates",
    ),
    Wrong("softmax", soft(lambda x: x.mean(-1, keepdim=True)), "the row's largest"),
    Wrong("softmax", soft(lambda x: x[..., :1]), "lie 1000 apart"),
    Wrong("softmax", soft(e=torch.exp2), "2 to the power"),
    Wrong("softmax", soft(over=(0, 1, 2)), "the sum of the whole tensor"),
    Wrong("softmax", zero_for_infinity, "for a logit of 0"),
]


def by_fraction(params, bits=16):
    return math.ceil(Fraction(bits) * params / 8)


def by_times(weight_bytes, bandwidth, batch=1, cache_bytes=0.0):
    return 1 / (weight_bytes / batch / bandwidth + cache_bytes / bandwidth)


def in_float64(x):
    return soft()(x.double()).to(x.dtype)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("weight_bytes", by_fraction),
        ("tokens_per_second", by_times),
        ("softmax", in_float64),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)


test_wrong_answers = rejects(
    "01-start/01-welcome",
    [
        Wrong("weight_bytes", bits_not_bytes, "there are 8 in a byte"),
        Wrong("weight_bytes", whole_bytes_each, "packed"),
        Wrong("weight_bytes", no_byte_for_four_bits, "half a byte"),
        Wrong("weight_bytes", rounds_down, "round up"),
        Wrong("weight_bytes", not_rounded, "a fraction of a byte takes a whole one"),
        Wrong("weight_bytes", gigabytes, "in GB"),
        Wrong("weight_bytes", whole_but_a_float, "some are floats"),
        Wrong("weight_bytes", megabytes, "10⁶"),
        Wrong("weight_bytes", one_argument, "cannot be called as"),
        Wrong("tokens_per_second", seconds_per_token, "seconds that one token takes"),
        Wrong("tokens_per_second", steps_per_second, "steps per second"),
        Wrong("tokens_per_second", no_cache, "leave the cache out"),
        Wrong("tokens_per_second", one_cache, "one request's cache"),
        Wrong("tokens_per_second", weights_for_each, "once for the whole batch"),
        Wrong("tokens_per_second", per_hour, "hours for seconds"),
        Wrong("tokens_per_second", as_tensor, "`.item()`"),
        Wrong("softmax", overflows, "overflows"),
        Wrong("softmax", one_maximum, "a maximum of its own"),
        Wrong("softmax", whole_tensor, "over the whole tensor"),
        Wrong("softmax", first_dimension, "first dimension"),
        Wrong("softmax", no_keepdim, "keepdim=True"),
        Wrong("softmax", logs, "log-probabilities"),
        Wrong("softmax", never_divides, "did not divide"),
        Wrong("softmax", in_place, "changes its argument `x` in place"),
        Wrong("softmax", clamps, "do not clamp"),
        Wrong("softmax", half_precision, "float16, where float32"),
        Wrong("softmax", adds_an_epsilon, "up to a factor"),
        Wrong("softmax", masks_to_nan, "NaN"),
        *MORE,
    ],
)
