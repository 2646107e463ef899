"""Cutting a chain of layers into pipeline stages: Alpa's dynamic program (Zheng et al.
2022, section 5).

    minimise   Σ_i t_i  +  (m − 1) · max_i t_i          t_i  seconds of stage i for one
                                                        microbatch, forward and backward
                                                        m    microbatches

over all ways to cut the chain and to give each stage a share of the devices. Once the
slowest stage may take at most t_max, what is left is a shortest path over (first layer,
devices left); t_max runs over all values that a stage can take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from math import inf

Stage = tuple[int, int, int]  # first layer, one past the last, devices


def latency(times: list[float], m: int) -> float:
    """Seconds of m microbatches through stages that take `times` each."""
    return inf if inf in times else sum(times) + (m - 1) * max(times)


def cut_stages(
    layers: int,
    devices: int,
    m: int,
    seconds: Callable[[int, int, int], float],
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
    shares = shares or tuple(
        1 << i for i in range(devices.bit_length()) if 1 << i <= devices
    )
    limits = sorted(
        {
            seconds(i, j, n)
            for i in range(layers)
            for j in range(i + 1, layers + 1)
            for n in shares
        }
        - {inf}
    )
    best: tuple[float, list[Stage]] = (inf, [])
    for limit in limits:
        if m * limit >= best[0]:
            break  # a slowest stage of `limit` alone takes longer
        stages = _shortest(layers, devices, seconds, shares, limit)
        if stages:
            best = min(best, (latency([seconds(*s) for s in stages], m), stages))
    if not best[1]:
        raise ValueError(
            f"devices={devices}: no cut of {layers} layers uses them all and fits;"
            f" shares are {shares}"
        )
    return best[1], best[0]


def _shortest(
    layers: int, devices: int, seconds: Callable, shares: tuple[int, ...], limit: float
) -> list[Stage]:
    """Stages of the smallest sum, none above `limit`; [] if there are none."""

    @cache
    def rest(first: int, left: int) -> tuple[float, tuple[Stage, ...]]:
        if first == layers:
            return (0.0, ()) if left == 0 else (inf, ())
        found = (inf, ())
        for last in range(first + 1, layers + 1):
            for n in shares:
                t = seconds(first, last, n) if n <= left else inf
                if t <= limit and (tail := rest(last, left - n))[0] < inf:
                    found = min(found, (t + tail[0], ((first, last, n), *tail[1])))
        return found

    return list(rest(0, devices)[1])


def every_cut(
    layers: int, devices: int, shares: tuple[int, ...]
) -> Iterator[list[Stage]]:
    """All ways to cut, for brute force."""

    def grow(first: int, left: int) -> Iterator[list[Stage]]:
        if first == layers and left == 0:
            yield []
        for last in range(first + 1, layers + 1):
            for n in shares:
                if n <= left:
                    yield from (
                        [(first, last, n), *tail] for tail in grow(last, left - n)
                    )

    return grow(0, devices)
