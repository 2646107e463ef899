"""What a run emits: by its electricity, and by the making of its machines.

Patterson et al. 2021, https://arxiv.org/abs/2104.10350; Luccioni et al. 2022,
https://arxiv.org/abs/2211.02001.

    kWh            =  GPU-hours · watts / 1000 · PUE
    kg, running    =  kWh · grams per kWh / 1000
    kg, made       =  kg of one machine · hours used / (hours of its life · busy)

All masses are of CO₂ equivalents. A tonne is 1000 kg. Names carry the units.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmlab.chips.checked import (
    not_negative,
    overhead,
    positive,
    share,
)


def energy_kwh(*, gpu_hours: float, watts: float, pue: float = 1.0) -> float:
    """Electricity of a run.

    Raises:
        ValueError: an amount that is negative, or a PUE below 1.
    """
    not_negative(gpu_hours=gpu_hours, watts=watts)
    overhead(pue)
    return gpu_hours * watts / 1000 * pue


def running_kg(*, kwh: float, grams_per_kwh: float) -> float:
    """What the electricity emits.

    Raises:
        ValueError: an amount that is negative.
    """
    not_negative(kwh=kwh, grams_per_kwh=grams_per_kwh)
    return kwh * grams_per_kwh / 1000


def made_kg(
    *, machine_kg: float, used_hours: float, life_hours: float, busy: float = 1.0
) -> float:
    """A run's share of what the making of its machines emitted.

    Args:
        machine_kg: of making one.
        used_hours: machine-hours of the run.
        life_hours: from the first day to the last.
        busy: the share of its life in which anybody uses it.

    Raises:
        ValueError: an amount that is negative, no life, or a share above 1.
    """
    not_negative(machine_kg=machine_kg, used_hours=used_hours)
    positive(life_hours=life_hours)
    share(busy=busy)
    return machine_kg * used_hours / (life_hours * busy)


def implied_grams_per_kwh(*, kg: float, kwh: float) -> float:
    """The intensity that a published pair of mass and energy stands for."""
    not_negative(kg=kg)
    positive(kwh=kwh)
    return kg * 1000 / kwh


@dataclass(frozen=True)
class Training:
    """A run, and what was printed about it; None: not printed.

    Attributes:
        watts: of one GPU, as the authors took it.
        grams_per_kwh: of the grid.
        printed_mwh, printed_tonnes: what they came to.
    """

    name: str
    gpu_hours: float
    watts: float
    pue: float | None
    grams_per_kwh: float | None
    printed_mwh: float | None
    printed_tonnes: float
    source: str

    @property
    def kwh(self) -> float:
        """By the formula; without a PUE where none is printed."""
        return energy_kwh(
            gpu_hours=self.gpu_hours, watts=self.watts, pue=self.pue or 1.0
        )

    @property
    def tonnes(self) -> float | None:
        """By the formula; None without an intensity."""
        if self.grams_per_kwh is None:
            return None
        return running_kg(kwh=self.kwh, grams_per_kwh=self.grams_per_kwh) / 1000


# GPT-3: 3.14e23 FLOP at 24.6 TFLOP/s of each V100. BLOOM: the GPUs alone.
TRAININGS = (
    Training(
        name="GPT-3",
        gpu_hours=3.14e23 / 24.6e12 / 3600,
        watts=330,
        pue=1.10,
        grams_per_kwh=429,
        printed_mwh=1287,
        printed_tonnes=552,
        source="patterson2021carbon",
    ),
    Training(
        name="BLOOM",
        gpu_hours=1_082_990,
        watts=400,
        pue=None,
        grams_per_kwh=57,
        printed_mwh=433,
        printed_tonnes=24.69,
        source="luccioni2023bloom",
    ),
    Training(
        name="Llama 3.1",
        gpu_hours=39.3e6,
        watts=700,
        pue=None,
        grams_per_kwh=None,
        printed_mwh=None,
        printed_tonnes=11_390,
        source="meta2024llama31",
    ),
)
# BLOOM, beyond its GPUs: nodes that wait, and machines that were made (tonnes).
BLOOM_IDLE_KWH = 256_646
BLOOM_MADE_TONNES = 11.2
BLOOM_ALL_TONNES = 50.5
# NVIDIA's product carbon footprint: a board with eight H100, from mine to factory gate.
HGX_H100_KG = 1312
