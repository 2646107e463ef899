"""Checks of 09-chips/06-precision-power-cost.

An answer is run on cases, and what it returns is compared with what usual mistakes make
of them. Numbers count to nine digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmlab.checks.judging import Outcome, judge, number
from llmlab.chips.precision_power_cost import carbon, energy, price, reliability
from llmlab.course.grading.checking import Checks, Mistake

check = Checks("09-chips/06-precision-power-cost")

Numbers = tuple[float, ...]


def several(found: object, parts: Sequence[str], what: str) -> Outcome:
    """Part → number, of an answer that returned as many.

    Raises:
        Mistake: it returned something else.
    """
    if not isinstance(found, tuple | list) or len(found) != len(parts):
        raise Mistake(
            f"{what} returned {found!r}: return {', '.join(parts)}, as a tuple"
        )
    pairs = enumerate(zip(parts, found, strict=True))
    return {part: number(each, f"{what}[{i}]") for i, (part, each) in pairs}


# 1 ------------------------------------------------------------------------------------

# m, k, n, number_bytes, tile, mac_pj, chip_pj_per_byte, memory_pj_per_byte
ENERGY_CASES = [
    (1, 576, 1536, 2, 1, 0.59, 12.72, 155.28),
    (64, 4096, 1024, 2, 128, 0.59, 12.72, 155.28),
    (48, 96, 240, 4, 24, 4.6, 2.5, 243.75),
    (200, 30, 70, 1, 10, 0.1, 1.75, 31.4),
    (33, 50, 21, 2, 16, 0.2, 3.1, 40.0),  # the tile divides nothing
]
ENERGY_PARTS = (
    "joules of arithmetic",
    "joules of the chip's memory",
    "joules of the large memory",
)


def run_energy(answer: Callable, n: int) -> Outcome:
    """Case n: three energies."""
    return several(answer(*ENERGY_CASES[n]), ENERGY_PARTS, "product_energy(…)")


def right_energy(m, k, n, number_bytes, tile, mac_pj, chip, memory) -> Numbers:
    """The reference."""
    parts = energy.product_joules(
        m,
        k,
        n,
        number_bytes=number_bytes,
        tile=tile,
        mac_pj=mac_pj,
        chip_pj_per_byte=chip,
        memory_pj_per_byte=memory,
    )
    return tuple(parts.values())


def spending(
    macs: Callable = lambda m, k, n: m * k * n,
    fetched: Callable = lambda m, k, n, tile: 2 * m * k * n / tile,
    moved: Callable = lambda m, k, n: m * k + k * n + m * n,
    size: Callable = lambda number_bytes: number_bytes,
    scale: float = 1e-12,
    exchanged: bool = False,
) -> Callable:
    """`product_energy`, and what comes out with one thing changed."""

    def way(m, k, n, number_bytes, tile, mac_pj, chip, memory):
        near, far = (memory, chip) if exchanged else (chip, memory)
        each = size(number_bytes)
        return (
            macs(m, k, n) * mac_pj * scale,
            fetched(m, k, n, tile) * each * near * scale,
            moved(m, k, n) * each * far * scale,
        )

    return way


def wrong_energies() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "FLOPs were counted: the price is for a product with its sum, so m k n": (
            spending(macs=lambda m, k, n: 2 * m * k * n)
        ),
        "an operand is used `tile` times once it is fetched: divide by it": spending(
            fetched=lambda m, k, n, tile: 2 * m * k * n
        ),
        "a product needs two operands, one of x and one of W": spending(
            fetched=lambda m, k, n, tile: m * k * n / tile
        ),
        "the tile was divided by twice: each operand is used `tile` times, not"
        " `tile`²": spending(fetched=lambda m, k, n, tile: 2 * m * k * n / tile**2),
        "a fraction was cut off: divide by `/`, not by `//`": spending(
            fetched=lambda m, k, n, tile: 2 * m * k * n // tile
        ),
        "a product fetches two operands: its sum stays where it is": spending(
            fetched=lambda m, k, n, tile: 3 * m * k * n / tile
        ),
        "the large memory gives x and W once each, not an operand to each"
        " product": spending(moved=lambda m, k, n: 2 * m * k * n + m * n),
        "the tile was multiplied: reuse saves fetches": spending(
            fetched=lambda m, k, n, tile: 2 * m * k * n * tile
        ),
        "the chip's memory was charged like the large one, once per number: it is"
        " read again for each tile": spending(
            fetched=lambda m, k, n, tile: m * k + k * n + m * n
        ),
        "the result is written, too: m n numbers": spending(
            moved=lambda m, k, n: m * k + k * n
        ),
        "x is read, too: m k numbers": spending(moved=lambda m, k, n: k * n + m * n),
        "W is read, too: k n numbers": spending(moved=lambda m, k, n: m * k + m * n),
        "W is read once from the large memory, not once for each row of x": spending(
            moved=lambda m, k, n: m * k + m * k * n + m * n
        ),
        "numbers were counted, not bytes": spending(size=lambda number_bytes: 1),
        "bits were counted: the prices are per byte": spending(
            size=lambda number_bytes: 8 * number_bytes
        ),
        "these are picojoules: 10⁻¹² J each": spending(scale=1.0),
        "pico is 10⁻¹², not 10⁻⁹": spending(scale=1e-9),
        "the prices of the two memories are exchanged": spending(exchanged=True),
    }


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=(
        "Three amounts, three prices: how many MACs, how many bytes from each memory?",
        (
            "m k n MACs take two operands each; one fetch serves `tile` of them. The"
            " large memory gives x and W once, and takes the result once."
        ),
        "`2 * m * k * n / tile * number_bytes * chip_pj_per_byte * 1e-12`.",
    ),
)
def product_energy(answer):
    """Joules of a product: arithmetic, the chip's memory, the large memory."""
    cases = len(ENERGY_CASES)
    judge(
        answer, run_energy, right_energy, wrong_energies(), cases, "product_energy(…)"
    )


# 2 ------------------------------------------------------------------------------------

# gpus, dollars_per_gpu_hour, read_per_second, written_per_second, busy
PRICE_CASES = [
    (8, 2.0, 73_700, 14_800, 0.9),
    (1, 2.69, 9000, 1500, 0.4),
    (16, 6.88, 120_000, 30_000, 0.75),
    (3, 0.5, 700, 1900, 0.05),
]
PRICE_PARTS = ("dollars per million tokens in", "dollars per million tokens out")


def run_price(answer: Callable, n: int) -> Outcome:
    """Case n: two prices."""
    return several(answer(*PRICE_CASES[n]), PRICE_PARTS, "token_prices(…)")


def right_price(gpus, dollars_per_gpu_hour, read, written, busy) -> Numbers:
    """The reference."""
    found = [
        price.dollars_per_million_tokens(
            dollars_per_hour=gpus * dollars_per_gpu_hour,
            tokens_per_second=speed,
            utilisation=busy,
        )
        for speed in (read, written)
    ]
    return tuple(found)


def pricing(
    rent: Callable = lambda gpus, dollars: gpus * dollars,
    sold: Callable = lambda speed, busy: speed * busy,
    seconds: float = 3600,
    million: float = 1e6,
    speeds: Callable = lambda read, written: (read, written),
) -> Callable:
    """`token_prices`, and what comes out with one thing changed."""

    def way(gpus, dollars, read, written, busy):
        hour = rent(gpus, dollars)
        return tuple(
            hour / (sold(speed, busy) * seconds) * million
            for speed in speeds(read, written)
        )

    return way


def wrong_prices() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "an hour of idle GPUs is paid for, too: only the share `busy` makes"
        " tokens": pricing(sold=lambda speed, busy: speed),
        "a share of idle time makes a token dearer, not cheaper: divide by `busy`": (
            pricing(sold=lambda speed, busy: speed / busy)
        ),
        "`busy` is the share that works, not the share that waits": pricing(
            sold=lambda speed, busy: speed * (1 - busy)
        ),
        "all GPUs are paid for: the price is that of one": pricing(
            rent=lambda gpus, dollars: dollars
        ),
        "the speeds are those of all GPUs together: do not multiply them": pricing(
            rent=lambda gpus, dollars: dollars / gpus
        ),
        "the number of GPUs counts once: it was squared": pricing(
            rent=lambda gpus, dollars: gpus**2 * dollars
        ),
        "an hour has 3600 seconds, not 60": pricing(seconds=60),
        "the price is per hour, the speed per second: 3600": pricing(seconds=1),
        "the price was taken for that of a day": pricing(seconds=24 * 3600),
        "that is the price of one token: a million of them are asked for": pricing(
            million=1
        ),
        "that is the price of a thousand tokens": pricing(million=1e3),
        "tokens in and tokens out are exchanged": pricing(
            speeds=lambda read, written: (written, read)
        ),
        "both have the price of reading: writing is slower": pricing(
            speeds=lambda read, written: (read, read)
        ),
        "both have the price of writing: reading is faster": pricing(
            speeds=lambda read, written: (written, written)
        ),
        "the speeds were added up: a GPU reads or writes": pricing(
            speeds=lambda read, written: (read + written, read + written)
        ),
        "the speeds were halved: each holds while they read, or while they"
        " write": pricing(speeds=lambda read, written: (read / 2, written / 2)),
    }


@check.exercise(
    points=2,
    minutes=8,
    difficulty=1,
    importance=5,
    hints=(
        "How many tokens are sold in one hour? What does that hour cost?",
        "tokens per second · busy · 3600, against GPUs · dollars per GPU-hour.",
        "`gpus * dollars_per_gpu_hour / (speed * busy * 3600) * 1e6`, for each speed.",
    ),
)
def token_prices(answer):
    """Dollars per million tokens, in and out."""
    cases = len(PRICE_CASES)
    judge(answer, run_price, right_price, wrong_prices(), cases, "token_prices(…)")


# 3 ------------------------------------------------------------------------------------

# failures, days, gpus, my_gpus, writing_seconds, restart_minutes
PLAN_CASES = [
    (419, 54, 16_384, 16_384, 60, 10),
    (419, 54, 16_384, 2048, 60, 10),
    (105, 60, 992, 4096, 300, 30),
    (1.5, 7, 400, 24, 40, 0),
    (12, 30, 512, 2000, 5, 90),
    (3, 10, 100, 36, 20, 5),  # no whole nodes of eight
]
PLAN_PARTS = ("hours between failures", "minutes between checkpoints", "share lost")


def run_plan(answer: Callable, n: int) -> Outcome:
    """Case n: hours, minutes, and a share."""
    return several(answer(*PLAN_CASES[n]), PLAN_PARTS, "checkpoint_plan(…)")


def planning(
    mtbf: Callable = lambda failures, days, gpus, mine: (
        days * 24 / failures * gpus / mine
    ),
    every: Callable = lambda writing, between: (2 * writing * between) ** 0.5,
    writing_unit: float = 1 / 3600,
    restart_unit: float = 1 / 60,
    lost: Callable = lambda writing, between, every, restart: (
        writing / every + (every / 2 + restart) / between
    ),
    out: float = 60,
) -> Callable:
    """`checkpoint_plan`, and what comes out with one thing changed."""

    def way(failures, days, gpus, mine, writing_seconds, restart_minutes):
        between = mtbf(failures, days, gpus, mine)
        writing = writing_seconds * writing_unit
        often = every(writing, between)
        restart = restart_minutes * restart_unit
        return between, often * out, lost(writing, between, often, restart)

    return way


def right_plan(failures, days, gpus, mine, writing_seconds, restart_minutes) -> Numbers:
    """The reference."""
    life = reliability.life_hours(failures=failures, days=days, parts=gpus)
    mtbf = reliability.mtbf_of_parts(life_hours=life, parts=mine)
    writing = writing_seconds / 3600
    every = reliability.young_hours(writing_hours=writing, mtbf_hours=mtbf)
    lost = reliability.share_lost(
        every_hours=every,
        writing_hours=writing,
        mtbf_hours=mtbf,
        restart_hours=restart_minutes / 60,
    )
    return mtbf, every * 60, lost


def wrong_plans() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "that is the time between failures of their cluster: yours has another size": (
            planning(mtbf=lambda failures, days, gpus, mine: days * 24 / failures)
        ),
        "more GPUs fail more often, not less: times theirs, over yours": planning(
            mtbf=lambda failures, days, gpus, mine: days * 24 / failures * mine / gpus
        ),
        "that is the life of one GPU: a job ends with any of its GPUs": planning(
            mtbf=lambda failures, days, gpus, mine: days * 24 / failures * gpus
        ),
        "the time between failures is in days: hours are asked for": planning(
            mtbf=lambda failures, days, gpus, mine: days / failures * gpus / mine
        ),
        "that is failures per hour, not hours per failure": planning(
            mtbf=lambda failures, days, gpus, mine: failures / days / 24 * mine / gpus
        ),
        "writing is in seconds: an hour has 3600 of them": planning(writing_unit=1.0),
        "writing was taken for minutes: it is in seconds": planning(
            writing_unit=1 / 60
        ),
        "restarting was taken for hours: it is in minutes": planning(restart_unit=1.0),
        "restarting was taken for seconds: it is in minutes": planning(
            restart_unit=1 / 3600
        ),
        "the 2 under the root is missing: a failure loses half an interval": planning(
            every=lambda writing, between: (writing * between) ** 0.5
        ),
        "the 2 stands before the root: it is under it": planning(
            every=lambda writing, between: 2 * (writing * between) ** 0.5
        ),
        "the root is missing": planning(
            every=lambda writing, between: 2 * writing * between
        ),
        "that is nearer to Daly's interval: Young's is the root alone": planning(
            every=lambda writing, between: (2 * writing * between) ** 0.5 - writing
        ),
        "the interval is in hours: minutes are asked for": planning(out=1),
        "the interval is in seconds: minutes are asked for": planning(out=3600),
        "each failure also costs a restart": planning(
            lost=lambda writing, between, every, restart: (
                writing / every + every / 2 / between
            )
        ),
        "a failure loses half an interval on average, not all of it": planning(
            lost=lambda writing, between, every, restart: (
                writing / every + (every + restart) / between
            )
        ),
        "the restart was halved with the interval: only the interval is": planning(
            lost=lambda writing, between, every, restart: (
                writing / every + (every + restart) / 2 / between
            )
        ),
        "writing is divided by τ alone here, not by τ + δ": planning(
            lost=lambda writing, between, every, restart: (
                writing / (every + writing) + (every / 2 + restart) / between
            )
        ),
        "a share is asked for, not per cent": planning(
            lost=lambda writing, between, every, restart: (
                100 * (writing / every + (every / 2 + restart) / between)
            )
        ),
        "that is the share that is left: the share that is lost is asked for": planning(
            lost=lambda writing, between, every, restart: (
                1 - writing / every - (every / 2 + restart) / between
            )
        ),
        "writing takes time, too: δ/τ": planning(
            lost=lambda writing, between, every, restart: (
                (every / 2 + restart) / between
            )
        ),
        "a restart comes with each failure, not with each checkpoint": planning(
            lost=lambda writing, between, every, restart: (
                (writing + restart) / every + every / 2 / between
            )
        ),
        "only the restart was divided by the time between failures": planning(
            lost=lambda writing, between, every, restart: (
                writing / every + every / 2 + restart / between
            )
        ),
    }


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=5,
    hints=(
        "Bring everything into hours first, and the answer into minutes last.",
        (
            "Hours between failures there: days · 24 / failures. With other GPUs it"
            " changes as theirs over yours."
        ),
        (
            "`every = (2 * writing * between) ** 0.5`, then `writing / every + (every"
            " / 2 + restart) / between`."
        ),
    ),
)
def checkpoint_plan(answer):
    """Hours between failures, minutes between checkpoints, and the share lost."""
    cases = len(PLAN_CASES)
    judge(answer, run_plan, right_plan, wrong_plans(), cases, "checkpoint_plan(…)")


# 4 ------------------------------------------------------------------------------------

# gpu_hours, watts, pue, grams_per_kwh, gpu_kg, life_years, busy
CARBON_CASES = [
    (1_082_990, 400, 1.2, 57, 150, 6, 0.85),
    (39.3e6, 700, 1.1, 376, 164, 4, 0.6),
    (5000, 330, 1.54, 429, 120, 3, 0.3),
    (720, 1000, 1.0, 20, 300, 5, 0.95),
]
CARBON_PARTS = ("tonnes from running", "tonnes from making")


def run_carbon(answer: Callable, n: int) -> Outcome:
    """Case n: two masses."""
    return several(answer(*CARBON_CASES[n]), CARBON_PARTS, "footprint(…)")


def right_carbon(
    gpu_hours, watts, pue, grams_per_kwh, gpu_kg, life_years, busy
) -> Numbers:
    """The reference."""
    kwh = carbon.energy_kwh(gpu_hours=gpu_hours, watts=watts, pue=pue)
    made = carbon.made_kg(
        machine_kg=gpu_kg,
        used_hours=gpu_hours,
        life_hours=life_years * price.HOURS_PER_YEAR,
        busy=busy,
    )
    running = carbon.running_kg(kwh=kwh, grams_per_kwh=grams_per_kwh)
    return running / 1000, made / 1000


def emitting(
    kwh: Callable = lambda hours, watts, pue, busy: hours * watts / 1000 * pue,
    tonnes: float = 1e-6,
    part: Callable = lambda hours, life, busy: hours / (life * busy),
    year: float = price.HOURS_PER_YEAR,
    made: Callable = lambda kg, pue: kg / 1000,
    exchanged: bool = False,
) -> Callable:
    """`footprint`, and what comes out with one thing changed."""

    def way(hours, watts, pue, grams, kg, years, busy):
        running = kwh(hours, watts, pue, busy) * grams * tonnes
        share = part(hours, years * year, busy) * made(kg, pue)
        return (share, running) if exchanged else (running, share)

    return way


def wrong_footprints() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "the building takes more than its GPUs: times PUE": emitting(
            kwh=lambda hours, watts, pue, busy: hours * watts / 1000
        ),
        "PUE makes it more, not less: multiply": emitting(
            kwh=lambda hours, watts, pue, busy: hours * watts / 1000 / pue
        ),
        "only what the building adds was counted, not the GPUs": emitting(
            kwh=lambda hours, watts, pue, busy: hours * watts / 1000 * (pue - 1)
        ),
        "GPU-hours are hours of use already: `busy` is for the making": emitting(
            kwh=lambda hours, watts, pue, busy: hours * watts / 1000 * pue * busy
        ),
        "both are in kilograms: tonnes are asked for": emitting(
            tonnes=1e-3, made=lambda kg, pue: kg
        ),
        "running is a thousand times too large: watts are not kilowatts, and kilograms"
        " are not tonnes": emitting(tonnes=1e-3),
        "running is in grams: a tonne has a million": emitting(tonnes=1.0),
        "making is in kilograms: tonnes are asked for": emitting(
            made=lambda kg, pue: kg
        ),
        "PUE is about electricity: making a GPU has nothing to do with it": emitting(
            made=lambda kg, pue: kg / 1000 * pue
        ),
        "hours in which nobody uses it are carried by those in which somebody does:"
        " divide by `busy`": emitting(part=lambda hours, life, busy: hours / life),
        "the less it is used, the more each hour carries: divide by `busy`": emitting(
            part=lambda hours, life, busy: hours / life * busy
        ),
        "`busy` is the share that is used, not the share that waits": emitting(
            part=lambda hours, life, busy: hours / (life * (1 - busy))
        ),
        "a GPU was counted whole for each hour: an hour is a small part of its"
        " life": emitting(part=lambda hours, life, busy: hours),
        "one GPU was counted whole: the run used many, each for a part of its"
        " life": emitting(part=lambda hours, life, busy: 1),
        "life is in years: a year has 8766 hours": emitting(year=1),
        "a year has 8766 hours here, leap days included": emitting(year=8760),
        "a day has 24 hours, a year 8766: life was taken in days": emitting(
            year=365.25
        ),
        "running and making are exchanged": emitting(exchanged=True),
    }


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=3,
    hints=(
        "Write the unit behind each number, and cancel.",
        (
            "GPU-hours · W / 1000 · PUE are kWh; times g per kWh are grams. The other"
            " one: kg of a GPU times the share of its used life."
        ),
        "`gpu_kg / 1000 * gpu_hours / (life_years * 8766 * busy)`.",
    ),
)
def footprint(answer):
    """Tonnes of a run: from running, and from making."""
    cases = len(CARBON_CASES)
    judge(answer, run_carbon, right_carbon, wrong_footprints(), cases, "footprint(…)")
