"""Checks of 08-compilers/03-back-end.

The first three answers are numbers that can be compared with what usual mistakes give.
A new generation is drawn, so that only its properties are looked at. A schedule is
data: it is carried out, counted, and its result compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import fields

from llmlab.checks.judging import Outcome, judge
from llmlab.compilers.back_end import Choice, NotLegal, challenge, cost
from llmlab.course.grading.checking import Checks, Mistake, expect

check = Checks("08-compilers/03-back-end")

# 1 ------------------------------------------------------------------------------------

TILES = ((10, 3), (12, 4), (5, 8), (1, 1), (7, 1), (16, 5), (9, 9), (11, 10))


def right_tiles(extent: int, size: int) -> list[tuple[int, int]]:
    """From the first iteration of each tile to behind its last."""
    return [(i, min(i + size, extent)) for i in range(0, extent, size)]


def run_tiles(answer: Callable, n: int) -> Outcome:
    """Case n: the tiles, as pairs."""
    found = expect(answer(*TILES[n]), kind=list, what=f"tiles{TILES[n]}")
    pairs = []
    for each in found:
        if not isinstance(each, tuple) or len(each) != 2:
            raise Mistake(f"a tile is a pair (start, stop), not {each!r}")
        if not all(isinstance(end, int) for end in each):
            raise Mistake(f"start and stop are whole numbers, not {each!r}")
        pairs.append(each)
    return {f"tiles{TILES[n]}": pairs}


@check.exercise(
    points=2,
    minutes=8,
    difficulty=1,
    importance=4,
    hints=(
        "Where does each tile begin? `range` has a third argument.",
        "A tile ends `size` iterations later, or where the loop ends: `min`.",
    ),
)
def tiles(answer):
    """The tiles of a loop, and the shorter one at its end."""
    judge(answer, run_tiles, right_tiles, wrong_tiles(), len(TILES), "tiles")


def wrong_tiles() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "the last tile goes beyond the loop: it would touch what is not in the array,"
        " so end where the loop ends": lambda n, size: [
            (i, i + size) for i in range(0, n, size)
        ],
        "the iterations that do not fill a tile are lost: there is a shorter tile at"
        " the end": lambda n, size: [
            (i, i + size) for i in range(0, n - size + 1, size)
        ],
        "a tile ends before its `stop`, as in range: stop is the first iteration that"
        " is not in it": lambda n, size: [
            (i, min(i + size, n) - 1) for i in range(0, n, size)
        ],
        "the second number is where a tile stops, not how long it is": lambda n, size: [
            (i, min(size, n - i)) for i in range(0, n, size)
        ],
        "the number of a tile is not its first iteration: multiply by"
        " size": lambda n, size: [(t, min(t + size, n)) for t in range(-(-n // size))],
        "an empty tile stands at the end where size divides the loop": lambda n, size: [
            (i, min(i + size, n)) for i in range(0, n + 1, size)
        ],
        "the shorter tile comes last, not first": lambda n, size: [
            (max(0, stop - size), stop) for stop in range(n, 0, -size)
        ][::-1],
        "size is how many iterations a tile has, not how many tiles there"
        " are": lambda n, size: [
            (n * t // size, n * (t + 1) // size) for t in range(size)
        ],
        "the iterations were shared out evenly: every tile has `size` of them, and the"
        " last one what is left": shared_out,
    }


def shared_out(n: int, size: int) -> list[tuple[int, int]]:
    """As many tiles as are needed, of sizes as even as can be."""
    count = -(-n // size)
    return [(n * t // count, n * (t + 1) // count) for t in range(count)]


# 2 ------------------------------------------------------------------------------------

Distances = list[tuple[int, ...]]
ORDERS: tuple[tuple[Distances, tuple[int, ...]], ...] = (
    ([(1, -1)], (1, 0)),
    ([(1, 1)], (1, 0)),
    ([(1, -1)], (0, 1)),
    ([(0, 0)], (1, 0)),
    ([], (1, 0)),
    ([(1, 0), (1, -1)], (1, 0)),
    ([(1, -1), (1, 0)], (1, 0)),
    ([(0, 1), (1, 1)], (1, 0)),
    ([(2, -1)], (1, 0)),
    ([(0, 1, -1)], (1, 2, 0)),
    ([(0, 1, -1)], (2, 0, 1)),
    ([(1, 0, -1)], (1, 2, 0)),
    ([(1, 0, -1)], (1, 0, 2)),
    ([(1, -1, 2)], (2, 1, 0)),
    ([(1, 2, -3)], (1, 0, 2)),
    ([(1, -2, 0)], (2, 0, 1)),
    ([(0, 0, 1), (0, 0, 0)], (2, 1, 0)),
)


def right_legal(distances: Distances, order: tuple[int, ...]) -> bool:
    """Whether each distance still points forward."""
    for each in distances:
        moved = [each[loop] for loop in order]
        if tuple(moved) < (0,) * len(moved):
            return False
    return True


def run_legal(answer: Callable, n: int) -> Outcome:
    """Case n: True or False."""
    found = answer(*ORDERS[n])
    if not isinstance(found, bool):
        raise Mistake(f"return True or False, not {found!r}")
    return {f"legal({ORDERS[n][0]}, {ORDERS[n][1]})": found}


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=5,
    hints=(
        "Put the numbers of each distance into the new order: `[d[l] for l in order]`.",
        (
            "The first number that is not 0 decides: above 0, the reader still comes"
            " after the writer. All 0 is one iteration, whose order stays."
        ),
        (
            "Python compares tuples in this way: `moved < (0, 0)` is what must not"
            " be, for any of them."
        ),
    ),
)
def legal(answer):
    """Whether loops may be put into a new order."""
    judge(answer, run_legal, right_legal, wrong_legal(), len(ORDERS), "legal")


def deciding(
    moved: Callable = lambda d, order: [d[loop] for loop in order],
    bad: Callable = lambda moved: tuple(moved) < (0,) * len(moved),
    every: Callable = lambda bads: not any(bads),
) -> Callable:
    """`legal`, and what comes out with one thing changed."""

    def way(distances: Distances, order: tuple[int, ...]) -> bool:
        return bool(every([bad(moved(each, order)) for each in distances]))

    return way


def wrong_legal() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "a distance with a number below 0 may be legal: the first that is not 0"
        " decides": deciding(bad=lambda moved: min(moved) < 0),
        "the outermost loop alone does not decide: where it is 0, the next one"
        " does": deciding(bad=lambda moved: moved[0] < 0),
        "a distance whose first number is 0 may be legal: the first that is not 0"
        " decides": deciding(bad=lambda moved: any(moved) and moved[0] <= 0),
        "the sum of a distance says nothing: the first number that is not 0"
        " decides": deciding(bad=lambda moved: sum(moved) < 0),
        "every order is legal, as if the old one or numbers without their signs were"
        " looked at: put the numbers of each distance into the new one": deciding(
            moved=lambda d, order: list(d)
        ),
        "the order was read the other way round: order[0] is the loop that comes to be"
        " the outermost": deciding(
            moved=lambda d, order: [d[order.index(place)] for place in range(len(d))]
        ),
        "a distance of zeros is one iteration, in which nothing changes: it is"
        " legal": deciding(bad=lambda moved: tuple(moved) <= (0,) * len(moved)),
        "one distance that points forward is not enough: all of them must": deciding(
            every=lambda bads: not bads or not all(bads)
        ),
        "only the first distance was looked at": deciding(
            every=lambda bads: not any(bads[:1])
        ),
        "only the last distance was looked at": deciding(
            every=lambda bads: not any(bads[-1:])
        ),
        "True and False are exchanged: True means that the new order may be": deciding(
            every=any
        ),
        "the innermost loop decides last, not first": deciding(
            bad=lambda moved: tuple(moved[::-1]) < (0,) * len(moved)
        ),
        "no dependence at all is legal in every order": deciding(
            every=lambda bads: bool(bads) and not any(bads)
        ),
    }


# 3 ------------------------------------------------------------------------------------

PRODUCTS = (
    (12, 5, 20, 4, 10),
    (13, 7, 22, 4, 10),
    (8, 3, 16, 8, 16),
    (9, 11, 6, 2, 4),
    (100, 20, 30, 14, 32),
    (5, 64, 7, 1, 1),
)


def run_product(answer: Callable, n: int) -> Outcome:
    """Case n: bytes."""
    found = expect(answer(*PRODUCTS[n]), kind=int, what=f"product_traffic{PRODUCTS[n]}")
    return {f"product_traffic{PRODUCTS[n]}": found}


@check.exercise(
    points=3,
    minutes=12,
    difficulty=2,
    importance=5,
    hints=(
        (
            "For each block of C, its rows of A are read, and its columns of B. How"
            " many blocks stand side by side, and how many one below the other?"
        ),
        (
            "A is read once for every block in a row of blocks: ⌈m / columns⌉ times. B"
            " is read ⌈n / rows⌉ times."
        ),
        "C is written once: n m numbers. A number has four bytes.",
    ),
)
def product_traffic(answer):
    """The bytes that a tiled product moves."""
    judge(
        answer,
        run_product,
        cost.product_traffic,
        wrong_products(),
        len(PRODUCTS),
        "product_traffic",
    )


def moving(
    a: Callable = lambda rows, columns, n, m: -(-m // columns),
    b: Callable = lambda rows, columns, n, m: -(-n // rows),
    c: int = 1,
    size: int = 4,
) -> Callable:
    """`product_traffic`, and what comes out with one thing changed."""

    def way(n: int, k: int, m: int, rows: int, columns: int) -> int:
        sizes = (rows, columns, n, m)
        return size * (n * k * a(*sizes) + k * m * b(*sizes) + c * n * m)

    return way


def wrong_products() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "A is read once for each block in a row of blocks, and B for each in a column:"
        " you have it the other way round": moving(
            lambda rows, columns, n, m: -(-n // rows),
            lambda rows, columns, n, m: -(-m // columns),
        ),
        "m / columns and n / rows are rounded down: the blocks at the end read"
        " as well": moving(
            lambda rows, columns, n, m: m // columns,
            lambda rows, columns, n, m: n // rows,
        ),
        "A is read more than once: for each block in a row of blocks": moving(
            a=lambda rows, columns, n, m: 1
        ),
        "B is read more than once: for each block in a column of blocks": moving(
            b=lambda rows, columns, n, m: 1
        ),
        "A is read once for each block, not for each column of C": moving(
            a=lambda rows, columns, n, m: m
        ),
        "B is read once for each block, not for each row of C": moving(
            b=lambda rows, columns, n, m: n
        ),
        "C is written: n m numbers more": moving(c=0),
        "C stays in registers while k runs: it is written once and not read": moving(
            c=2
        ),
        "these are numbers, not bytes: a float has four": moving(size=1),
        "a float32 has four bytes, not eight": moving(size=8),
        "a float32 has four bytes, not two": moving(size=2),
        "A and B are read more than once: for each block in a row, or in a column": (
            moving(lambda *sizes: 1, lambda *sizes: 1)
        ),
        "rows and columns are exchanged: a block has `rows` rows of A, so B is read"
        " ⌈n / rows⌉ times": moving(
            lambda rows, columns, n, m: -(-m // rows),
            lambda rows, columns, n, m: -(-n // columns),
        ),
        "a block more is a block, however small: round m / columns and n / rows up": (
            lambda n, k, m, rows, columns: int(
                4 * (n * m * k / rows + n * m * k / columns + n * m)
            )
        ),
        "blocks at the end are smaller: they neither read nor write a whole one": (
            lambda n, k, m, rows, columns: (
                4
                * (-(-n // rows) * -(-m // columns))
                * (k * (rows + columns) + rows * columns)
            )
        ),
        "blocks at the end are smaller: they do not read a whole tile of rows or"
        " columns": lambda n, k, m, rows, columns: (
            4 * (-(-n // rows) * -(-m // columns) * k * (rows + columns) + n * m)
        ),
    }


# 4 ------------------------------------------------------------------------------------

FAST = (
    Choice(6, 2, 0, True, True),
    Choice(8, 3, 0, True, True),
    Choice(10, 2, 256, True, True),
    Choice(12, 3, 256, True, True),
)
FEW, MANY = 12, 40  # children; crossing alone can make twelve of the four fastest
SLOW = (Choice(1, 1, 64, False, False), Choice(2, 4, 128, False, False))
BROKEN = Choice(14, 4, 256, False, False)


def population() -> dict[Choice, float]:
    """Four that are fast and alike, slow ones, and one that could not be run."""
    found = {SLOW[0]: 9.0, FAST[2]: 1.2, BROKEN: float("inf"), FAST[0]: 1.1}
    found |= {FAST[3]: 1.4, SLOW[1]: 8.0, FAST[1]: 1.0}
    return found


@check.exercise(
    points=4,
    minutes=20,
    difficulty=3,
    importance=3,
    hints=(
        (
            "Sort the choices by their seconds, and keep the `best` first: these are"
            " the parents."
        ),
        (
            "A child is `mutated(crossed(a, b, random), random)`, where a and b are"
            " `random.choice(parents)`."
        ),
        (
            "Collect children until there are `size`: a child that was measured before,"
            " or that is in the list already, is not taken."
        ),
    ),
)
def next_generation(answer):
    """Children of the fastest, all of them new."""
    for size, best, seed in ((FEW, 4, 0), (MANY, 4, 1), (8, 2, 2)):
        before = population()
        measured = dict(before)
        found = answer(measured, size, random.Random(seed), best)
        found = expect(found, kind=list, what="next_generation(…)")
        if not all(isinstance(child, Choice) for child in found):
            raise Mistake("a child is a Choice, as `mutated` and `crossed` make it")
        judge_children(before, found, size, best)
        again = answer(dict(before), size, random.Random(seed), best)
        if found != again:
            raise Mistake(
                "the same random numbers give other children the second time: draw"
                " with `random` alone, and do not go through a set"
            )
        other = answer(dict(before), size, random.Random(seed + 10), best)
        if found == other:
            raise Mistake(
                "other random numbers give the same children: draw with the `random`"
                " that is given, not with one of your own"
            )


def judge_children(
    measured: dict[Choice, float], found: list[Choice], size: int, best: int
) -> None:
    """As many as asked, new, and from the right parents."""
    if any(child in measured for child in found):
        raise Mistake("a child was measured before: that run would be wasted")
    if len(set(found)) < len(found):
        raise Mistake("two children are the same: that run would be wasted")
    if len(found) != size:
        raise Mistake(f"{len(found)} children, and size={size} were asked")
    parents = sorted(measured, key=lambda each: measured[each])[:best]
    names = [each.name for each in fields(Choice)]
    allowed = {n: {getattr(p, n) for p in parents} for n in names}
    strange = [
        sum(getattr(child, n) not in allowed[n] for n in names) for child in found
    ]
    if size >= FEW and sum(strange) == 0:
        raise Mistake(
            "no child has a knob that its parents did not have: `mutated` draws one"
            " anew, or the search ends where its first guesses were"
        )
    if max(strange) > 1:
        raise Mistake(
            f"a child has {max(strange)} knobs that none of the {best} fastest has:"
            " parents are the fastest, by the least seconds, and one knob is drawn anew"
        )
    crossing = any(
        all(sum(getattr(child, n) != getattr(p, n) for n in names) > 1 for p in parents)
        for child in found
    )
    if size >= MANY and not crossing:
        raise Mistake("every child has one parent: `crossed` mixes the knobs of two")


# 5 ------------------------------------------------------------------------------------

# As they were when this file was read: no answer reaches them.
TRAFFIC, CYCLES = challenge.TRAFFIC, challenge.CYCLES
NAIVE = "the naive program moves 452,544 bytes in 193,054 cycles"


@check.exercise(
    points=6,
    minutes=45,
    difficulty=5,
    importance=4,
    hints=(
        (
            "Look at the program: `print(challenge.program())`. Which loop walks down"
            " the columns of V? `reorder` it. That is most of the traffic."
        ),
        (
            "Cycles: `tile` loops by 8 and `vectorise` the inner ones. The sum over k0"
            " needs `partial_sums` before it can be lanes; `unroll` what is short."
        ),
        (
            "What is written and read again at once need not be: `merge` zeros, sum and"
            " scale of the scores, then `cache`. `move` helps where something stands"
            " between. A division for each product is dear: do not inline that one."
        ),
    ),
)
def row_schedule(answer):
    """Challenge: an attention row in few cycles and with little traffic."""
    found = answer()
    if not isinstance(found, list | tuple):
        found = expect(found, kind=list, what="row_schedule()")
    for step in found:
        if not isinstance(step, tuple | list) or not step:
            raise Mistake(f"a step is a tuple (name, arguments …), not {step!r}")
    try:
        score = challenge.judge([tuple(step) for step in found])
    except NotLegal as refusal:
        raise Mistake(f"a step is refused. {refusal}") from None
    judge_score(score)


def judge_score(score: challenge.Score) -> None:
    """Below both bounds, and right."""
    told = f"{score.traffic:,} bytes moved, {score.cycles:,} cycles"
    if score.wrong:
        sizes = " and ".join(f"{keys} keys of {width}" for keys, width in score.wrong)
        raise Mistake(f"{told}; but for {sizes} it computes something else")
    much, slow = score.traffic > TRAFFIC, score.cycles > CYCLES
    if much and slow:
        raise Mistake(
            f"{told}. At most {TRAFFIC:,} bytes and {CYCLES:,} cycles are asked"
            f" ({NAIVE})"
        )
    if much:
        raise Mistake(
            f"{told}. The cycles are few enough; at most {TRAFFIC:,} bytes are asked:"
            " what is written and read again?"
        )
    if slow:
        raise Mistake(
            f"{told}. The traffic is little enough; at most {CYCLES:,} cycles are"
            " asked: which loops have no lanes yet, and which divide?"
        )
