"""Cutting a chain of layers into pipeline stages: Alpa's dynamic program.

Zheng et al. 2022, https://arxiv.org/abs/2201.12023, section 5.

    minimise   Σ_i t_i  +  (m − 1) · max_i t_i

over all ways to cut the chain and to give each stage a share of the devices. Once the
slowest stage may take at most `limit`, the rest is a shortest path over (first layer,
devices left). `limit` runs over all values that a stage can take.

    t_i     seconds of stage i for one microbatch, forward and backward
    m       microbatches
    limit   the most that the slowest stage may take; t_max in the paper
    n       devices of one stage
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from math import inf

Stage = tuple[int, int, int]  # first layer, one past the last, devices
StageSeconds = Callable[[int, int, int], float]  # of a `Stage`


def latency(times: list[float], m: int) -> float:
    """Seconds of m microbatches through stages that take `times` each."""
    if inf in times:
        return inf
    return sum(times) + (m - 1) * max(times)


def cut_stages(
    layers: int,
    devices: int,
    m: int,
    seconds: StageSeconds,
    shares: tuple[int, ...] = (),
) -> tuple[list[Stage], float]:
    """The best stages and their latency.

    Args:
        seconds: (first, last + 1, devices) → seconds of such a stage; inf where it does
            not fit.
        shares: how many devices a stage may have; () is every power of two up to
            `devices`.
    Raises:
        ValueError: counts below 1, or no way to use exactly all devices.
    """
    for name, value in (("layers", layers), ("devices", devices), ("m", m)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not shares:
        shares = _powers_of_two(devices)

    best_latency = inf
    best_stages: list[Stage] = []
    for limit in _limits(layers, seconds, shares):
        if m * limit >= best_latency:
            break  # a slowest stage of `limit` alone takes longer than the best so far
        stages = _shortest(layers, devices, seconds, shares, limit)
        if not stages:
            continue
        found = latency([seconds(*stage) for stage in stages], m)
        if (found, stages) < (best_latency, best_stages):
            best_latency = found
            best_stages = stages
    if not best_stages:
        raise ValueError(
            f"devices={devices}: no cut of {layers} layers uses them all and fits;"
            f" shares are {shares}"
        )
    return best_stages, best_latency


def _powers_of_two(most: int) -> tuple[int, ...]:
    powers = []
    power = 1
    while power <= most:
        powers.append(power)
        power *= 2
    return tuple(powers)


def _limits(layers: int, seconds: StageSeconds, shares: tuple[int, ...]) -> list[float]:
    """All times that a stage can take, the shortest first."""
    limits = set()
    for first in range(layers):
        for end in range(first + 1, layers + 1):
            for n in shares:
                limits.add(seconds(first, end, n))
    limits.discard(inf)
    return sorted(limits)


def _shortest(
    layers: int,
    devices: int,
    seconds: StageSeconds,
    shares: tuple[int, ...],
    limit: float,
) -> list[Stage]:
    """Stages of the smallest sum, none above `limit`; [] if there are none."""

    @cache
    def rest(first: int, left: int) -> tuple[float, tuple[Stage, ...]]:
        """The smallest sum from layer `first` on, with `left` devices, and how."""
        if first == layers:
            return (0.0, ()) if left == 0 else (inf, ())
        best = (inf, ())
        for end in range(first + 1, layers + 1):
            for n in shares:
                if n > left:
                    continue
                t = seconds(first, end, n)
                if t > limit:
                    continue
                after, stages = rest(end, left - n)
                if after < inf:
                    best = min(best, (t + after, ((first, end, n), *stages)))
        return best

    _, stages = rest(0, devices)
    return list(stages)


def every_cut(
    layers: int, devices: int, shares: tuple[int, ...]
) -> Iterator[list[Stage]]:
    """All ways to cut, for brute force."""

    def grow(first: int, left: int) -> Iterator[list[Stage]]:
        if first == layers and left == 0:
            yield []
        for end in range(first + 1, layers + 1):
            for n in shares:
                if n > left:
                    continue
                for stages in grow(end, left - n):
                    yield [(first, end, n), *stages]

    return grow(0, devices)
