"""Wrong answers to 08-compilers/03-back-end, each with its diagnosis."""

from __future__ import annotations

import random as python_random

from llmlab.checks.compilers import back_end as checks
from llmlab.checks.compilers.back_end import check
from llmlab.compilers.back_end import challenge, cost, tuner
from llmlab.compilers.back_end.machine import AVX2, attention_schedule
from llmlab.compilers.back_end.tuner import crossed, drawn, mutated
from tests.checks.rejecting import (
    ByCases,
    Wrong,
    accepts,
    all_foreseen,
    kept_apart,
    rejects,
    solved,
)

SLUG = "08-compilers/03-back-end"

# Right, written otherwise ------------------------------------------------------------


def tiles_by_counting(extent, size):
    found, start = [], 0
    while start < extent:
        stop = start + size if start + size < extent else extent
        found.append((start, stop))
        start = stop
    return found


def tiles_whole_and_rest(extent, size):
    whole = [(t * size, t * size + size) for t in range(extent // size)]
    rest = [(extent - extent % size, extent)] if extent % size else []
    return whole + rest


def legal_by_the_first(distances, order):
    for distance in distances:
        for loop in order:
            if distance[loop] > 0:
                break
            if distance[loop] < 0:
                return False
    return True


def legal_in_one(distances, order):
    moved = ([d[i] for i in order if d[i]] for d in distances)
    return all(not left or left[0] > 0 for left in moved)


def traffic_block_by_block(n, k, m, rows, columns):
    total = 0
    for i in range(0, n, rows):
        for j in range(0, m, columns):
            height, width = min(rows, n - i), min(columns, m - j)
            total += height * k + k * width + height * width
    return 4 * total


def by_the_package(measured, size, random, best=4):
    return tuner.next_generation(measured, size, random, best)


def generation_by_marks(measured, size, random, best=4):
    parents = [c for _, c in sorted((s, repr(c), c)[::2] for c, s in measured.items())]
    parents = parents[:best]
    found = {}
    while len(found) < size:
        child = crossed(*random.choices(parents, k=2), random)
        child = mutated(child, random)
        if child not in measured:
            found[child] = True
    return list(found)


def unrolled_further():
    steps = solved(SLUG)["row_schedule"]()
    return [*steps, ("tile", "k7", 8), ("unroll", "k7_i"), ("unroll", "zj5")]


def as_lists():
    return [list(step) for step in solved(SLUG)["row_schedule"]()]


RIGHT = {
    "tiles": (tiles_by_counting, tiles_whole_and_rest),
    "legal": (legal_by_the_first, legal_in_one),
    "product_traffic": (traffic_block_by_block, cost.product_traffic),
    "next_generation": (by_the_package, generation_by_marks),
    "row_schedule": (unrolled_further, as_lists),
}


test_right_answers_written_otherwise = accepts(check, RIGHT)


# Wrong --------------------------------------------------------------------------------

KINDS = {
    "tiles": ByCases(
        checks.run_tiles, checks.right_tiles, checks.wrong_tiles, checks.TILES
    ),
    "legal": ByCases(
        checks.run_legal, checks.right_legal, checks.wrong_legal, checks.ORDERS
    ),
    "product_traffic": ByCases(
        checks.run_product,
        cost.product_traffic,
        checks.wrong_products,
        checks.PRODUCTS,
    ),
}


test_no_two_mistakes_come_to_the_same = kept_apart(KINDS)


def tiles_as_ranges(extent, size):
    return [range(i, min(i + size, extent)) for i in range(0, extent, size)]


def tiles_as_fractions(extent, size):
    return [(float(a), float(b)) for a, b in checks.right_tiles(extent, size)]


def legal_as_number(distances, order):
    return int(checks.right_legal(distances, order))


def legal_in_place(distances, order):
    while distances:
        distance = distances.pop()
        if tuple(distance[i] for i in order) < (0,) * len(order):
            return False
    return True


def traffic_as_float(n, k, m, rows, columns):
    return float(cost.product_traffic(n, k, m, rows, columns))


def generation(parents=None, child=None, known=True, twice=False, count=0):
    def way(measured, size, random, best=4):
        chosen = sorted(measured, key=measured.get)
        chosen = parents(chosen, best) if parents else chosen[:best]
        found = []
        while len(found) < size + count:
            two = random.choice(chosen), random.choice(chosen)
            new = (
                child(*two, random) if child else mutated(crossed(*two, random), random)
            )
            if (known and new in measured) or (new in found and not twice):
                continue
            found.append(new)
        return found

    return way


def draws_by_itself(measured, size, random, best=4):
    return tuner.next_generation(measured, size, python_random.Random(), best)


def draws_with_its_own_seed(measured, size, random, best=4):
    return tuner.next_generation(measured, size, python_random.Random(0), best)


def forgets_what_it_was_given(measured, size, random, best=4):
    found = tuner.next_generation(measured, size, random, best)
    for choice in [*measured]:
        if measured[choice] > 2:
            del measured[choice]
    return found


def generation_of_words(measured, size, random, best=4):
    return [str(c) for c in tuner.next_generation(measured, size, random, best)]


def only_mutated(a, b, random):
    return mutated(a, random)


def anything(a, b, random):
    return drawn(random)


def only_reordered():
    return [("reorder", "k7", "j7")]


def first_schedule():
    return attention_schedule(AVX2)


def all_but_the_order():
    steps = solved(SLUG)["row_schedule"]()
    ending = steps.index(("reorder", "k7", "j7"))
    return [*steps[:ending], ("tile", "k5", 2)]


def illegal():
    return [("vectorise", "k0")]


def unknown_loop():
    return [("tile", "banana", 8)]


def not_steps():
    return ["tile k0 8"]


def nothing_said():
    return None


def wide_lanes():
    """Lanes over the keys pick each number from another line."""
    return [
        ("reorder", "k7", "j7"),
        ("tile", "j0", 8),
        ("reorder", "j0_o", "k0", "j0_i"),
    ]


G, R = "next_generation", "row_schedule"
test_wrong_answers = rejects(
    SLUG,
    [
        *all_foreseen(KINDS),
        Wrong("tiles", tiles_as_ranges, "a tile is a pair"),
        Wrong("tiles", tiles_as_fractions, "whole numbers"),
        Wrong("legal", legal_as_number, "return True or False"),
        Wrong("legal", legal_in_place, "changes its argument"),
        Wrong("product_traffic", traffic_as_float, "int"),
        Wrong(G, generation(known=False), "was measured before"),
        Wrong(G, generation(twice=True, parents=lambda c, b: c[:1]), "are the same"),
        Wrong(G, generation(count=-1), "children, and size="),
        Wrong(G, generation(lambda c, best: c[-best:]), "none of the 4 fastest has"),
        Wrong(G, generation(lambda c, best: c), "fastest has"),
        Wrong(G, generation(child=only_mutated), "every child has one parent"),
        Wrong(G, generation(child=anything), "fastest has"),
        Wrong(G, draws_by_itself, "draw with `random` alone"),
        Wrong(G, draws_with_its_own_seed, "draw with the `random` that is given"),
        Wrong(G, forgets_what_it_was_given, "changes its argument"),
        Wrong(G, generation_of_words, "a child is a Choice"),
        Wrong(R, only_reordered, "At most 56,000 bytes and 29,000 cycles"),
        Wrong(R, first_schedule, "which loops have no lanes yet"),
        Wrong(R, all_but_the_order, "At most 56,000 bytes"),
        Wrong(R, illegal, "lanes would meet"),
        Wrong(R, unknown_loop, "loop='banana'"),
        Wrong(R, not_steps, "a step is a tuple"),
        Wrong(R, nothing_said, "returned None"),
        Wrong(R, wide_lanes, "29,000 cycles are asked"),
    ],
    drawing_nothing=("row_schedule",),
)


def test_the_text_says_what_the_naive_program_costs():
    score = challenge.judge([])
    words = f"{score.traffic:,} bytes in {score.cycles:,} cycles"
    assert words in checks.NAIVE
    assert (checks.TRAFFIC, checks.CYCLES) == (56_000, 29_000)
