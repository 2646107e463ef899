"""What a token costs, and what a training run does.

    dollars per 10⁶ tokens  =  dollars per hour / (3600 · tokens per second · u) · 10⁶
    dollars per hour        =  price / (years · 8766) + watts · PUE · dollars per kWh
    GPU-hours               =  6 N D / (3600 · peak · MFU)

    u  utilisation: tokens that were sold, over those that could have been made
    N  parameters that a token is multiplied by        D  tokens trained on

6 N D: Kaplan et al. 2020, https://arxiv.org/abs/2001.08361. Names carry the units.

Simplified: people, buildings and idle spare machines cost nothing unless `upkeep` or a
rent says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmlab.chips.checked import (
    not_negative,
    overhead,
    positive,
    share,
)

HOURS_PER_YEAR = 8766
SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class GpuHour:
    """A price that somebody printed."""

    chip: str
    seller: str
    dollars: float
    read_on: str
    source: str


# On-demand list prices of one GPU for an hour.
GPU_HOURS = (
    GpuHour("H100", "RunPod, community", 2.69, "2026-11-09", "datareceipts2026gpu"),
    GpuHour("H100", "RunPod, secure", 3.99, "2026-11-09", "datareceipts2026gpu"),
    GpuHour("H100", "Lambda, 8 GPUs", 3.99, "2026-09-20", "evangelist2026lambda"),
    GpuHour("H100", "AWS p5.48xlarge", 6.88, "2026-11-09", "datareceipts2026gpu"),
    GpuHour("H100", "Azure ND96isr", 12.29, "2026-11-09", "datareceipts2026gpu"),
    GpuHour("A100", "RunPod, community", 1.39, "2026-11-09", "datareceipts2026gpu"),
    GpuHour("A100", "AWS p4de.24xlarge", 3.43, "2026-11-09", "datareceipts2026gpu"),
)


def dollars_per_million_tokens(
    *, dollars_per_hour: float, tokens_per_second: float, utilisation: float = 1.0
) -> float:
    """What a million tokens cost.

    Raises:
        ValueError: a negative price, no speed, or a utilisation above 1.
    """
    not_negative(dollars_per_hour=dollars_per_hour)
    positive(tokens_per_second=tokens_per_second)
    share(utilisation=utilisation)
    sold_per_hour = tokens_per_second * utilisation * SECONDS_PER_HOUR
    return dollars_per_hour / sold_per_hour * 1e6


def owned_dollars_per_hour(
    *,
    dollars: float,
    years: float,
    watts: float,
    pue: float,
    dollars_per_kwh: float,
    upkeep_per_year: float = 0.0,
) -> float:
    """What an hour of a machine costs that one owns and lets run.

    Args:
        dollars: to buy it.
        years: until it is worth nothing.
        upkeep_per_year: the share of its price that goes into people and repairs.

    Raises:
        ValueError: an amount that is negative, no years, or a PUE below 1.
    """
    not_negative(dollars=dollars, watts=watts, dollars_per_kwh=dollars_per_kwh)
    not_negative(upkeep_per_year=upkeep_per_year)
    positive(years=years)
    overhead(pue)
    bought = dollars * (1 / years + upkeep_per_year) / HOURS_PER_YEAR
    return bought + watts / 1000 * pue * dollars_per_kwh


@dataclass(frozen=True)
class Bar:
    """One input of a cost, and what the cost is at both of its ends."""

    name: str
    low: float
    high: float
    cost_at_low: float
    cost_at_high: float

    @property
    def width(self) -> float:
        """How far it moves the cost."""
        return abs(self.cost_at_high - self.cost_at_low)


def tornado(
    cost: Callable[..., float],
    base: Mapping[str, float],
    ranges: Mapping[str, tuple[float, float]],
) -> list[Bar]:
    """Each input in turn from one end to the other, the rest left; the widest first.

    Raises:
        ValueError: a range of an input that is not in `base`, or that leaves it out.
    """
    bars = []
    for name, (low, high) in ranges.items():
        if name not in base:
            raise ValueError(f"ranges[{name!r}] has no value in base")
        if not low <= base[name] <= high:
            raise ValueError(
                f"ranges[{name!r}]=({low}, {high}) leaves out base[{name!r}]="
                f"{base[name]}"
            )
        ends = [cost(**(base | {name: value})) for value in (low, high)]
        bars.append(Bar(name, low, high, *ends))
    return sorted(bars, key=lambda bar: -bar.width)


@dataclass(frozen=True)
class ServingDay:
    """A day of a service as its owner published it."""

    read_tokens: float
    found_tokens: float  # of these, those whose cache was found on disk
    written_tokens: float
    nodes: float  # on average
    gpus_per_node: int
    dollars_per_gpu_hour: float
    read_per_second: float  # of a node that reads
    written_per_second: float  # of a node that writes
    source: str

    @property
    def cost_dollars(self) -> float:
        """Rent of all nodes."""
        return self.nodes * self.node_dollars_per_hour * 24

    @property
    def node_dollars_per_hour(self) -> float:
        return self.gpus_per_node * self.dollars_per_gpu_hour

    @property
    def nodes_from_tokens(self) -> tuple[float, float]:
        """Nodes that read, and nodes that write, from the tokens of the day."""
        day = 24 * SECONDS_PER_HOUR
        reading = self.read_tokens / day / self.read_per_second
        return reading, self.written_tokens / day / self.written_per_second

    def revenue_dollars(self, *, found: float, read: float, written: float) -> float:
        """If all tokens were sold, at dollars per million of each kind."""
        not_negative(found=found, read=read, written=written)
        missed = self.read_tokens - self.found_tokens
        total = (
            self.found_tokens * found + missed * read + self.written_tokens * written
        )
        return total / 1e6


# V3 and R1 together, 27 February 2025 12:00 to 28 February, as DeepSeek printed it.
DEEPSEEK_DAY = ServingDay(
    read_tokens=608e9,
    found_tokens=342e9,
    written_tokens=168e9,
    nodes=226.75,
    gpus_per_node=8,
    dollars_per_gpu_hour=2.0,
    read_per_second=73_700,
    written_per_second=14_800,
    source="deepseek2025inference",
)


def training_gpu_hours(
    *, parameters: float, tokens: float, flops_per_second: float, mfu: float
) -> float:
    """Hours of one GPU that 6 N D FLOPs take.

    Raises:
        ValueError: an amount that is not above 0, or an MFU above 1.
    """
    positive(parameters=parameters, tokens=tokens, flops_per_second=flops_per_second)
    share(mfu=mfu)
    return 6 * parameters * tokens / (flops_per_second * mfu) / SECONDS_PER_HOUR


def implied_mfu(
    *, parameters: float, tokens: float, flops_per_second: float, gpu_hours: float
) -> float:
    """The share of the peak that 6 N D FLOPs are of all hours paid for.

    Raises:
        ValueError: an amount that is not above 0.
    """
    positive(gpu_hours=gpu_hours)
    full = training_gpu_hours(
        parameters=parameters, tokens=tokens, flops_per_second=flops_per_second, mfu=1
    )
    return full / gpu_hours
