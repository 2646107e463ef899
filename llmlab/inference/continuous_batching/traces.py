"""Who comes when, and with how much: requests to simulate.

Arrivals of many people who know nothing of each other are a Poisson process: the times
between them are exponential. Where they come in crowds, as when a page is opened in the
morning, a mean rate says little: `bursts` has the same mean. Lengths are log-normal:
many short ones, few very long.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One request of a trace.

    Attributes:
        arrival: seconds from the start.
        prompt: tokens that come.
        output: tokens that are written for it.
        stored: of the prompt, tokens whose keys and values come along.
    """

    arrival: float
    prompt: int
    output: int
    stored: int = 0

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.output < 1:
            raise ValueError(
                f"prompt={self.prompt} and output={self.output} must be at least 1"
            )
        if not 0 <= self.stored < self.prompt:
            raise ValueError(
                f"stored={self.stored} must be from 0 to {self.prompt - 1}: one token"
                " at least is computed"
            )


def poisson(rate: float, count: int, seed: int = 0) -> list[float]:
    """So many arrivals, `rate` per second on average.

    Raises:
        ValueError: a rate that is not above 0.
    """
    if not rate > 0:
        raise ValueError(f"rate={rate!r} must be above 0")
    draw = random.Random(f"arrivals {seed}")
    now, times = 0.0, []
    for _ in range(count):
        now += draw.expovariate(rate)
        times.append(now)
    return times


def bursts(rate: float, count: int, size: int, seed: int = 0) -> list[float]:
    """Crowds of `size` that come at once, `rate` requests per second on average.

    Raises:
        ValueError: a rate that is not above 0, or a size below 1.
    """
    if size < 1:
        raise ValueError(f"size={size!r} must be at least 1")
    crowds = poisson(rate / size, -(-count // size), seed)
    return [time for time in crowds for _ in range(size)][:count]


def lognormal(
    mean: float, count: int, spread: float = 1.0, longest: int = 2048, seed: int = 0
) -> list[int]:
    """Lengths from 1 to `longest`, log-normal.

    Args:
        mean: of the distribution before it is cut at `longest`.
        spread: deviation of the logarithm; at 0 all lengths are the mean.
    Raises:
        ValueError: a mean that is not between 1 and the longest.
    """
    if not 1 <= mean <= longest:
        raise ValueError(f"mean={mean!r} must be from 1 to longest={longest}")
    draw = random.Random(f"lengths {seed}")
    # the mean of exp(N(mu, s²)) is exp(mu + s²/2)
    factors = [draw.lognormvariate(-(spread**2) / 2, spread) for _ in range(count)]
    return [min(longest, max(1, round(mean * factor))) for factor in factors]


def trace(
    arrivals: Sequence[float], prompts: Sequence[int], outputs: Sequence[int]
) -> list[Request]:
    """Requests from their three parts.

    Raises:
        ValueError: lists of unequal lengths, or arrivals that are not in order.
    """
    if not len(arrivals) == len(prompts) == len(outputs):
        raise ValueError(
            f"arrivals, prompts and outputs have {len(arrivals)}, {len(prompts)} and"
            f" {len(outputs)} entries: one of each for a request"
        )
    if list(arrivals) != sorted(arrivals):
        raise ValueError("arrivals must be in the order of time")
    parts = zip(arrivals, prompts, outputs, strict=True)
    return [Request(*each) for each in parts]
