"""Wrong answers to 09-chips/06-precision-power-cost, each with its diagnosis."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from llmlab.checks.chips import precision_power_cost as checks
from llmlab.checks.chips.precision_power_cost import check
from tests.checks.rejecting import (
    ByCases,
    Wrong,
    accepts,
    all_foreseen,
    kept_apart,
    rejects,
)

SLUG = "09-chips/06-precision-power-cost"

# Right, written otherwise -------------------------------------------------------------


def energy_by_array(m, k, n, number_bytes, tile, mac_pj, chip, memory):
    amounts = np.array(
        [
            m * k * n,
            2 * m * k * n * number_bytes / tile,
            (m * (k + n) + k * n) * number_bytes,
        ],
        dtype=np.float64,
    )
    return list(amounts * np.array([mac_pj, chip, memory]) / 1e12)


def energy_by_tiles(m, k, n, number_bytes, tile, mac_pj, chip, memory):
    pj = 10**-12
    operands = m * n / tile**2 * k * (tile + tile)
    return (
        pj * mac_pj * k * m * n,
        pj * chip * number_bytes * operands,
        pj * memory * number_bytes * (k * n + k * m + n * m),
    )


def prices_by_token(gpus, dollars, read, written, busy):
    per_second = gpus * dollars / 60 / 60
    return [per_second / busy / speed * 10**6 for speed in (read, written)]


def prices_by_millions(gpus, dollars, read, written, busy):
    millions = [3600 * busy * speed / 1_000_000 for speed in (read, written)]
    rent = dollars * gpus
    return rent / millions[0], rent / millions[1]


def plan_in_seconds(failures, days, gpus, mine, writing, restart):
    between = days * 86_400 * gpus / (failures * mine)
    every = math.sqrt(2 * writing * between)
    wasted = writing / every + every / between / 2 + 60 * restart / between
    return between / 3600, every / 60, wasted


def plan_by_life(failures, days, gpus, mine, writing, restart):
    life = 24 * days * gpus / failures
    between = life / mine
    root = math.sqrt(2 * writing / 3600 / between)  # what is lost but for restarts
    return [between, root * between * 60, root + restart / 60 / between]


def footprint_by_fractions(hours, watts, pue, grams, kg, years, busy):
    values = [Fraction(each) for each in (hours, watts, pue, grams, kg, years, busy)]
    h, w, p, g, k, y, b = values
    return float(h * w * p * g / 10**9), float(k * h / (y * 8766 * b) / 1000)


def footprint_in_kilograms(hours, watts, pue, grams, kg, years, busy):
    running = hours * watts * 1e-3 * pue * grams * 1e-3
    made = kg / (years * 365.25 * 24) / busy * hours
    return running / 1000, made / 1000


RIGHT = {
    "product_energy": (energy_by_array, energy_by_tiles),
    "token_prices": (prices_by_token, prices_by_millions),
    "checkpoint_plan": (plan_in_seconds, plan_by_life),
    "footprint": (footprint_by_fractions, footprint_in_kilograms),
}


test_right_answers_written_otherwise = accepts(check, RIGHT)


# Wrong --------------------------------------------------------------------------------

KINDS = {
    "product_energy": ByCases(
        checks.run_energy,
        checks.right_energy,
        checks.wrong_energies,
        checks.ENERGY_CASES,
    ),
    "token_prices": ByCases(
        checks.run_price, checks.right_price, checks.wrong_prices, checks.PRICE_CASES
    ),
    "checkpoint_plan": ByCases(
        checks.run_plan, checks.right_plan, checks.wrong_plans, checks.PLAN_CASES
    ),
    "footprint": ByCases(
        checks.run_carbon,
        checks.right_carbon,
        checks.wrong_footprints,
        checks.CARBON_CASES,
    ),
}


test_no_two_mistakes_come_to_the_same = kept_apart(KINDS)


def energy_in_all(*case):
    return sum(checks.right_energy(*case))


def energy_as_array(*case):
    return np.array(checks.right_energy(*case))


def energy_by_whole_tiles(m, k, n, number_bytes, tile, mac_pj, chip, memory):
    first, _, last = checks.right_energy(
        m, k, n, number_bytes, tile, mac_pj, chip, memory
    )
    operands = k * n * math.ceil(m / tile) + m * k * math.ceil(n / tile)
    return first, operands * number_bytes * chip / 1e12, last


def price_of_writing_only(*case):
    return checks.right_price(*case)[1]


def plan_without_share(*case):
    return checks.right_plan(*case)[:2]


def plan_by_nodes(failures, days, gpus, mine, writing, restart):
    nodes, my_nodes = gpus // 8, mine // 8
    return checks.right_plan(failures, days, nodes, my_nodes, writing, restart)


def footprint_by_whole_gpus(hours, watts, pue, grams, kg, years, busy):
    running, _ = checks.right_carbon(hours, watts, pue, grams, kg, years, busy)
    return running, kg / 1000 * math.ceil(hours / (years * 8766 * busy))


def footprint_as_text(*case):
    running, made = checks.right_carbon(*case)
    return f"{running} t", f"{made} t"


def plan_for_their_case(*case):
    return checks.right_plan(*checks.PLAN_CASES[0])


test_wrong_answers = rejects(
    SLUG,
    [
        *all_foreseen(KINDS),
        Wrong("product_energy", energy_in_all, "return joules of arithmetic"),
        Wrong("product_energy", energy_as_array, "as a tuple"),
        Wrong("product_energy", energy_by_whole_tiles, "is not right in case 2"),
        Wrong("token_prices", price_of_writing_only, "per million tokens in"),
        Wrong("checkpoint_plan", plan_without_share, "share lost"),
        Wrong("checkpoint_plan", plan_for_their_case, "is not right in case 2"),
        Wrong("checkpoint_plan", plan_by_nodes, "is not right in case 6"),
        Wrong("footprint", footprint_by_whole_gpus, "tonnes from making"),
        Wrong("footprint", footprint_as_text, "return a number"),
    ],
)
