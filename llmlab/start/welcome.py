"""What it costs to serve a model; and a softmax that survives large logits.

A decoder that writes one token for each of b requests reads all its weights once, and
each request's own cache once (Pope et al. 2022, https://arxiv.org/abs/2211.05102, §2:
at small batches the time is that of loading memory):

    seconds per step ≥ (W + b·C) / β          tokens per second ≤ b·β / (W + b·C)

    W  bytes of weights
    C  bytes of one request's cache
    b  requests decoded together
    β  bytes per second from the accelerator's memory

Simplified: one device, no arithmetic limit, no overhead. It is a bound, so no system is
faster.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor


def weight_bytes(params: int, bits: float = 16) -> int:
    """Bytes of `params` weights at `bits` each, rounded up to whole bytes.

    Raises:
        ValueError: a count or width that is not positive.
    """
    for name, value in (("params", params), ("bits", bits)):
        if value <= 0:
            raise ValueError(f"{name}={value!r} must be positive")
    return math.ceil(params * bits / 8)


def tokens_per_second(
    weight_bytes: float, bandwidth: float, batch: int = 1, cache_bytes: float = 0.0
) -> float:
    """The most tokens per second that memory allows: b·β / (W + b·C).

    Args:
        weight_bytes: W, read once per step whatever the batch.
        bandwidth: β, bytes per second.
        batch: b, requests that get one token each in a step.
        cache_bytes: C, bytes of one request's keys and values.
    Raises:
        ValueError: a weight, bandwidth or batch that is not positive; a negative cache.
    """
    for name, value in (
        ("weight_bytes", weight_bytes),
        ("bandwidth", bandwidth),
        ("batch", batch),
    ):
        if value <= 0:
            raise ValueError(f"{name}={value!r} must be positive")
    if cache_bytes < 0:
        raise ValueError(f"cache_bytes={cache_bytes!r} must not be negative")
    return batch * bandwidth / (weight_bytes + batch * cache_bytes)


def dollars_per_million_tokens(
    dollars_per_hour: float, tokens_per_second: float
) -> float:
    """What a million tokens cost on hardware that is rented by the hour.

    Raises:
        ValueError: a price that is negative, or a speed that is not positive.
    """
    if dollars_per_hour < 0:
        raise ValueError(f"dollars_per_hour={dollars_per_hour!r} must not be negative")
    if tokens_per_second <= 0:
        raise ValueError(f"tokens_per_second={tokens_per_second!r} must be positive")
    return dollars_per_hour / 3600 / tokens_per_second * 1e6


def softmax(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """exp(x − m) / Σ exp(x − m) over the last dimension, m the largest of each row, so
    that no exp overflows.
    """
    e = (x - x.amax(dim=-1, keepdim=True)).exp()
    return e / e.sum(dim=-1, keepdim=True)
