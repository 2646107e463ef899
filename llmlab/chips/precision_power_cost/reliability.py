"""Failures, and how often to save.

Young 1974, https://doi.org/10.1145/361147.361115; Daly 2006,
https://doi.org/10.1016/j.future.2004.11.016.

    M   mean time between failures of all parts together:  life of one / parts
    δ   a checkpoint stops the work for so long
    R   a failure stops it for so long, before it goes on from the last checkpoint
    τ   work between two checkpoints

    share lost    ≈  δ/τ + (τ/2 + R)/M                      (first order)
    Young            τ = √(2 δ M)
    Daly             τ = √(2 δ M) (1 + ⅓ √(δ/2M) + ⅑ δ/2M) − δ        for δ < 2M
    time to solve    T = M e^(R/M) (e^((τ+δ)/M) − 1) · work/τ    exact, if failures do
                     not remember how long ago the last one was

The exact T is smallest where (1 − τ/M) e^(τ/M) = e^(−δ/M): R does not move it. All
times are hours.

Simplified: every failure stops the whole job; each is seen at once; a checkpoint that
was written can be read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llmlab.chips.checked import not_negative, positive, share

# How often things fail ---------------------------------------------------------------


def mtbf_of_parts(*, life_hours: float, parts: float) -> float:
    """Hours between failures of `parts` parts, each with a mean life.

    Raises:
        ValueError: one of them is not above 0.
    """
    positive(life_hours=life_hours, parts=parts)
    return life_hours / parts


def life_hours(*, failures: float, days: float, parts: float) -> float:
    """Mean hours of one part, from a count of failures of many.

    Raises:
        ValueError: one of them is not above 0.
    """
    positive(failures=failures, days=days, parts=parts)
    return days * 24 * parts / failures


@dataclass(frozen=True)
class Run:
    """A count of failures that somebody published: from `fewest` to `most`."""

    name: str
    chip: str
    parts: int
    days: float
    fewest: float
    most: float
    source: str
    note: str

    @property
    def life(self) -> tuple[float, float]:
        """Hours of one GPU, from the most and from the fewest failures."""
        low, high = (
            life_hours(failures=count, days=self.days, parts=self.parts)
            for count in (self.most, self.fewest)
        )
        return low, high


RUNS = (
    Run("Llama 3", "H100", 16_384, 54, 419, 419, "llama2024herd", "unplanned only"),
    Run("RSC-1", "A100", 8000, 1, 6.5, 6.5, "kokolis2025revisiting", "1,000 node-days"),
    Run(
        "BLOOM", "A100", 400, 7, 1, 2, "bekman2022bloom", "hardware: one or two a week"
    ),
    Run(
        "OPT", "A100", 992, 60, 105, 105, "zhang2022opt", "35 by hand, 70 by themselves"
    ),
)


# How often to save -------------------------------------------------------------------


def young_hours(*, writing_hours: float, mtbf_hours: float) -> float:
    """√(2 δ M).

    Raises:
        ValueError: one of them is not above 0.
    """
    positive(writing_hours=writing_hours, mtbf_hours=mtbf_hours)
    return math.sqrt(2 * writing_hours * mtbf_hours)


def daly_hours(*, writing_hours: float, mtbf_hours: float) -> float:
    """Daly's closed form for the best τ; M where a checkpoint takes 2 M or longer.

    Raises:
        ValueError: one of them is not above 0.
    """
    positive(writing_hours=writing_hours, mtbf_hours=mtbf_hours)
    small = writing_hours / (2 * mtbf_hours)
    if small >= 1:
        return mtbf_hours
    first = young_hours(writing_hours=writing_hours, mtbf_hours=mtbf_hours)
    return first * (1 + math.sqrt(small) / 3 + small / 9) - writing_hours


def best_hours(*, writing_hours: float, mtbf_hours: float) -> float:
    """The τ at which the exact time to solve is smallest.

    Raises:
        ValueError: one of them is not above 0.
    """
    positive(writing_hours=writing_hours, mtbf_hours=mtbf_hours)
    wanted = -writing_hours / mtbf_hours
    low, high = 0.0, 1.0  # τ/M; log of (1 − u) eᵘ falls from 0 without end
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if math.log1p(-middle) + middle > wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2 * mtbf_hours


def share_lost(
    *,
    every_hours: float,
    writing_hours: float,
    mtbf_hours: float,
    restart_hours: float = 0.0,
    behind_hours: float = 0.0,
) -> float:
    """The share of the time that is lost, to first order.

    Args:
        behind_hours: a checkpoint that is written beside the work can be used only so
            long after it was taken; a failure loses that much more.

    Raises:
        ValueError: an amount that is negative, or no interval or mean.
    """
    positive(every_hours=every_hours, mtbf_hours=mtbf_hours)
    not_negative(
        writing_hours=writing_hours,
        restart_hours=restart_hours,
        behind_hours=behind_hours,
    )
    again = every_hours / 2 + behind_hours + restart_hours
    return writing_hours / every_hours + again / mtbf_hours


def expected_hours(
    *,
    work_hours: float,
    every_hours: float,
    writing_hours: float,
    mtbf_hours: float,
    restart_hours: float = 0.0,
) -> float:
    """Hours until the work is done, on average: exact for exponential failures.

    Raises:
        ValueError: an amount that is negative, or no work, interval or mean.
    """
    positive(work_hours=work_hours, every_hours=every_hours, mtbf_hours=mtbf_hours)
    not_negative(writing_hours=writing_hours, restart_hours=restart_hours)
    piece = math.expm1((every_hours + writing_hours) / mtbf_hours)
    longer = math.exp(restart_hours / mtbf_hours)
    return mtbf_hours * longer * piece * work_hours / every_hours


# Tried out ---------------------------------------------------------------------------


def gaps(
    rng: np.random.Generator, mtbf_hours: float, shape: float, count: int
) -> np.ndarray:
    """Hours between failures: exponential, or Weibull with the same mean.

    With a shape below 1 a failure makes the next one likelier for a while.
    """
    if shape == 1:
        return rng.exponential(mtbf_hours, count)
    return rng.weibull(shape, count) * mtbf_hours / math.gamma(1 + 1 / shape)


def simulate(
    *,
    work_hours: float,
    every_hours: float,
    writing_hours: float,
    mtbf_hours: float,
    restart_hours: float = 0.0,
    behind_hours: float = 0.0,
    shape: float = 1.0,
    runs: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Hours that each of many runs took, with failures drawn at random.

    One pass of the loop is the next failure of every run that is not done: the pieces
    between it and the last one are kept, the rest is lost. A failure during a restart
    restarts the restart. The clock of the failures does not know of checkpoints.

    Raises:
        ValueError: an amount that cannot be; work that is no whole number of intervals;
            `behind_hours` longer than an interval; a chance of getting through a piece
            so small that no run would end.
    """
    positive(
        work_hours=work_hours,
        every_hours=every_hours,
        mtbf_hours=mtbf_hours,
        shape=shape,
    )
    not_negative(
        writing_hours=writing_hours,
        restart_hours=restart_hours,
        behind_hours=behind_hours,
    )
    pieces = round(work_hours / every_hours)
    if pieces < 1 or not math.isclose(pieces * every_hours, work_hours, rel_tol=1e-9):
        raise ValueError(
            f"work_hours={work_hours} must be a multiple of every_hours={every_hours}"
        )
    period = every_hours + writing_hours
    if behind_hours > period:
        raise ValueError(
            f"behind_hours={behind_hours} must be at most an interval with its"
            f" checkpoint, {period}"
        )
    if period + restart_hours > 20 * mtbf_hours:
        raise ValueError(
            f"every_hours={every_hours} is so long beside mtbf_hours={mtbf_hours} that"
            " no run ends"
        )
    rng = np.random.default_rng(seed)
    elapsed = np.zeros(runs)
    left = np.full(runs, pieces)  # pieces still to be done
    lost = np.zeros(runs)  # hours that the last failure stops a run for
    busy = np.arange(runs)
    while busy.size:
        gap = gaps(rng, mtbf_hours, shape, busy.size)
        usable = gap - lost[busy]
        ends = usable >= left[busy] * period
        # Pieces whose checkpoint can be used when the failure comes.
        kept = np.floor((usable - behind_hours) / period).clip(min=0).astype(int)
        kept = np.minimum(kept, left[busy] - 1)
        took = np.where(ends, lost[busy] + left[busy] * period, gap)
        elapsed[busy] += took
        left[busy] -= np.where(ends, 0, kept)
        lost[busy] = restart_hours
        busy = busy[~ends]
    return elapsed


def nearest_interval(work_hours: float, every_hours: float) -> float:
    """The interval nearest to that of which the work is a whole number."""
    positive(work_hours=work_hours, every_hours=every_hours)
    return work_hours / max(1, round(work_hours / every_hours))


def spares_needed(*, mean_down: float, risk: float) -> int:
    """The fewest spare nodes with which too few are left at most a share `risk` of the
    time, if nodes fail one by one and `mean_down` of them are away on average.

    Raises:
        ValueError: a negative mean, or a risk that is not between 0 and 1.
    """
    not_negative(mean_down=mean_down)
    share(risk=risk)
    spares = 0
    chance = math.exp(-mean_down)  # that exactly `spares` are down
    within = chance
    while 1 - within > risk:
        spares += 1
        chance *= mean_down / spares
        within += chance
    return spares
