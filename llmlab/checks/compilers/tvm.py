"""Checks of 08-compilers/04-tvm.

Each answer is run on cases, and what comes out is compared with what usual mistakes
make of them. TVM is not needed: that ours does what TVM does is tested elsewhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache

from llmlab.checks.judging import Outcome, judge
from llmlab.compilers import tvm
from llmlab.compilers.tvm import Affine, Kind, Refused, affine, interval
from llmlab.course.grading.checking import Checks, Mistake

check = Checks("08-compilers/04-tvm")


def is_whole(value: object) -> bool:
    """An int, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


# 1 ------------------------------------------------------------------------------------


def split_cases() -> list[tuple[int, tuple[int | None, ...]]]:
    """(extent, factors): they divide or do not; None in each place, and nowhere."""
    return [
        (12, (None, 4)),
        (13, (None, 4)),
        (13, (4, None)),
        (3, (None, 4)),
        (13, (2, None, 3)),
        (24, (2, None, 3)),
        (24, (2, 4, 3)),
        (23, (2, 4, 3)),
        (25, (2, 4, 3)),
        (11, (11,)),
        (12, (11,)),
        (10, (3, 4)),
        (7, (None, 1)),
        (14, (None,)),
        (9, (None, 2, 5)),
        (9, (2, None, 3)),
        (12, (6, 4)),
    ]


def run_split(answer: Callable, n: int) -> Outcome:
    """Case n: the parts and the guard, or a refusal."""
    extent, factors = split_cases()[n]
    loop = f"{extent} iterations with the factors {factors}"
    parts_of, guard_of = f"the parts of {loop}", f"the guard of {loop}"
    given = [factor for factor in factors if factor is not None]
    few = len(given) == len(factors) and math.prod(given) < extent
    try:
        found = answer(extent, factors)
    except Refused as refusal:
        if not str(refusal).strip():
            raise Mistake(
                "Refused was raised without a sentence: say in it what does not fit"
            ) from None
        return {parts_of: "refused", guard_of: "refused"}
    except (ValueError, AssertionError) as error:
        if not few:
            raise
        raise Mistake(
            f"{loop} were refused by {type(error).__name__}: raise Refused"
        ) from None
    if not isinstance(found, tuple) or len(found) != 2:
        raise Mistake(f"split_loop returned {found!r}: return (parts, guarded)")
    parts, guarded = found
    if not isinstance(parts, tuple) or not all(map(is_whole, parts)):
        raise Mistake(f"the parts are {parts!r}: return a tuple of whole numbers")
    if not isinstance(guarded, bool):
        raise Mistake(f"guarded is {guarded!r}: return True or False")
    if few:
        return {parts_of: "not refused", guard_of: "not refused"}
    return {parts_of: parts, guard_of: guarded}


@check.exercise(
    points=2,
    minutes=12,
    difficulty=2,
    importance=4,
    hints=(
        "How many iterations do the given factors make up together? How many more?",
        "Rounded up: `-(-extent // given)`. That is the part for None.",
        (
            "`math.prod(parts)` are all iterations. Fewer than the extent: `raise"
            " Refused(…)`. More: a guard. As many: none."
        ),
    ),
)
def split_loop(answer):
    """The parts of a loop, and whether the last iterations must be cut off."""
    cases = len(split_cases())
    judge(answer, run_split, tvm.split, wrong_splits(), cases, "split_loop(…)")


def splitting(
    rest: Callable = lambda extent, given: -(-extent // math.prod(given)),
    refused: Callable = lambda extent, total: total < extent,
    guarded: Callable = lambda extent, total, parts: total > extent,
) -> Callable:
    """`split_loop`, and what comes out with one thing changed."""

    def way(extent: int, factors: tuple) -> tuple:
        given = [factor for factor in factors if factor is not None]
        parts = tuple(rest(extent, given) if f is None else f for f in factors)
        total = math.prod(parts)
        if refused(extent, total):
            raise Refused("too few")
        return parts, guarded(extent, total, parts)

    return way


def wrong_splits() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "the part for None was rounded down: 13 in parts of 4 are four parts, or the"
        " last iteration is lost": splitting(
            rest=lambda extent, given: max(1, extent // math.prod(given)),
            refused=lambda extent, total: False,
        ),
        "the part for None was rounded down, so what divides badly is refused: round it"
        " up": splitting(rest=lambda extent, given: extent // math.prod(given)),
        "13 in parts of 4 are four parts, not five, and 12 in parts of 4 are three:"
        " round up, rather than add one": splitting(
            rest=lambda extent, given: extent // math.prod(given) + 1
        ),
        "the part for None looks at one of the other factors alone: it is the extent by"
        " their product": splitting(
            rest=lambda extent, given: -(-extent // (given[-1] if given else 1))
        ),
        "the part for None looks at the first of the other factors alone: it is the"
        " extent by their product": splitting(
            rest=lambda extent, given: -(-extent // (given[0] if given else 1))
        ),
        "the part for None is the extent by the sum of the others: it is by their"
        " product": splitting(
            rest=lambda extent, given: -(-extent // (sum(given) or 1))
        ),
        "the part for None was rounded to the nearest: 13 in parts of 4 are four parts,"
        " so round up": splitting(
            rest=lambda extent, given: round(extent / math.prod(given))
        ),
        "it was refused before None was worked out: compare the product of all parts"
        " with the extent": refused_without_the_rest,
        "parts that make up just the extent were refused: they fit": splitting(
            refused=lambda extent, total: total <= extent
        ),
        "factors that make up fewer iterations than there are were accepted: raise"
        " Refused": splitting(refused=lambda extent, total: False),
        "factors that make up more iterations than there are were refused: the guard"
        " cuts them off": splitting(refused=lambda extent, total: total != extent),
        "a guard stands where the parts are as many as the iterations: it costs time"
        " and cuts off nothing": splitting(guarded=lambda extent, total, parts: True),
        "there is never a guard: where the parts make up more, the loop leaves the"
        " tensor": splitting(guarded=lambda extent, total, parts: False),
        "the guard is asked for by the last part alone: compare the product of all"
        " parts with the extent": splitting(
            guarded=lambda extent, total, parts: extent % parts[-1] != 0
        ),
        "each part was asked whether it divides the extent: 6 and 4 divide 12, and are"
        " 24 together": splitting(
            guarded=lambda extent, total, parts: any(extent % part for part in parts)
        ),
        "there is a guard wherever a part is None: it is needed where the parts make up"
        " more": guarded_for_none,
        "the guard stands where it is not needed, and is missing where it is": (
            splitting(guarded=lambda extent, total, parts: total <= extent)
        ),
        "there is a guard for a part None alone: given factors that make up more need"
        " one, too": guarded_with_none,
        "given factors that make up more iterations than there are were refused: the"
        " guard cuts them off": refused_without_none,
        "the parts stand in another order than the factors: None keeps its place": (
            none_in_front
        ),
    }


def guarded_with_none(extent: int, factors: tuple) -> tuple:
    """`split_loop` with a guard only where a part is None."""
    parts, guarded = tvm.split(extent, factors)
    return parts, guarded and None in factors


def guarded_for_none(extent: int, factors: tuple) -> tuple:
    """`split_loop` with a guard for every None, and for no other reason."""
    return tvm.split(extent, factors)[0], None in factors


def refused_without_the_rest(extent: int, factors: tuple) -> tuple:
    """`split_loop`, which asks the given factors alone whether they are enough."""
    if math.prod(factor for factor in factors if factor is not None) < extent:
        raise Refused("too few")
    return tvm.split(extent, factors)


def refused_without_none(extent: int, factors: tuple) -> tuple:
    """`split_loop`, which takes given factors only where they come out even."""
    if None not in factors and math.prod(factors) != extent:
        raise Refused("they do not come out even")
    return tvm.split(extent, factors)


def none_in_front(extent: int, factors: tuple) -> tuple:
    """`split_loop` with the part for None before the others."""
    return tvm.split(extent, tuple(sorted(factors, key=lambda each: each is not None)))


# 2 ------------------------------------------------------------------------------------

Reads = tuple[list[Affine], dict[str, int]]


def region_cases() -> list[Reads]:
    """(indices of the reads, loops that run inside): strides, signs, several reads."""
    i, j, o, k = (Affine.of({name: 1}) for name in "ijok")
    return [
        ([i], {"i": 4}),
        ([i * 2 + k], {"i": 4, "k": 3}),
        ([o * 8 + i * 2 + k], {"i": 4, "k": 3}),
        ([k - i + 5], {"i": 4, "k": 3}),
        ([o * 4 + i, o * 4 + i + 1], {"i": 4}),
        ([i + 6, i + 1, i + 3], {"i": 2}),
        ([o * 3 + 2], {"i": 4}),
        ([affine(7)], {"i": 4}),
        ([i * -2 + j * 3 + o - 1], {"i": 3, "j": 2, "k": 9}),
        ([o * 5 + i, o * 5 + k], {"i": 2, "k": 6}),
        ([o * -4 + i * 3], {"i": 1}),
    ]


def run_region(answer: Callable, n: int) -> Outcome:
    """Case n: where the region begins and how long it is."""
    indices, moving = region_cases()[n]
    found = answer(list(indices), dict(moving))
    if not isinstance(found, tuple) or len(found) != 2:
        raise Mistake(f"region returned {found!r}: return (begin, extent)")
    begin, extent = found
    if is_whole(begin):
        begin = affine(begin)
    if not isinstance(begin, Affine):
        raise Mistake(f"begin is {begin!r}: return an Affine, or a whole number")
    if not is_whole(extent):
        raise Mistake(f"extent is {extent!r}: return a whole number")
    reads = " and ".join(map(str, indices))
    loops = ", ".join(f"{name} of {size}" for name, size in moving.items())
    what = f"of {reads} with {loops}"
    return {f"the beginning {what}": str(begin), f"the extent {what}": extent}


@check.exercise(
    points=4,
    minutes=25,
    difficulty=4,
    importance=5,
    hints=(
        (
            "An index has two parts. `index.part(index.names - moving.keys())` is the"
            " one that stands still; the rest, `index - standing`, moves."
        ),
        (
            "`interval(rest, moving)` gives the smallest and the largest value of the"
            " rest, the constant included."
        ),
        (
            "Over all reads: the smallest of the smallest, the largest of the largest."
            " The region begins at standing + smallest. From 2 to 5 are four places."
        ),
    ),
)
def region(answer):
    """Which part of a dimension one iteration of the outer loops needs."""
    cases = len(region_cases())
    judge(answer, run_region, tvm.region, wrong_regions(), cases, "region(…)")


def regions(
    span: Callable = interval,
    begin: Callable = lambda standing, first: standing + first,
    length: Callable = lambda first, last: last - first + 1,
    first_of: Callable = min,
    last_of: Callable = max,
    kept: Callable = lambda indices: indices,
) -> Callable:
    """`region`, and what comes out with one thing changed."""

    def way(indices: list[Affine], moving: dict[str, int]) -> tuple:
        spans = []
        for index in kept(indices):
            standing = index.part(index.names - moving.keys())
            spans.append(span(index - standing, moving))
        first = first_of(span[0] for span in spans)
        last = last_of(span[1] for span in spans)
        return begin(standing, first), length(first, last)

    return way


def at_the_ends(index: Affine, moving: dict[str, int]) -> tuple[int, int]:
    """As if every coefficient were positive."""
    last = index.constant
    for name, c in index.terms:
        last += c * (moving[name] - 1)
    return index.constant, last


def wrong_regions() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "from 2 to 5 are four places, not three: the extent is last − first + 1": (
            regions(length=lambda first, last: last - first)
        ),
        "a loop of 4 iterations ends at 3, and the extent is one too long for each"
        " step: `interval` counts from 0 to extent − 1": regions(
            span=lambda index, moving: interval(
                index, {n: e + 1 for n, e in moving.items()}
            )
        ),
        "a loop with a negative coefficient goes down: the smallest value is at its end"
        " (`interval` knows)": regions(span=at_the_ends),
        "the region begins at the part that stands still, without the smallest value of"
        " the rest": regions(begin=lambda standing, first: standing),
        "the region begins at the smallest value of the rest, without the part that"
        " stands still: each tile would read the first one's": regions(
            begin=lambda standing, first: affine(first)
        ),
        "the constants of the indices are lost: `index.part(names)` leaves them out,"
        " `index - standing` keeps them": regions(
            span=lambda index, moving: interval(index - index.constant, moving)
        ),
        "only the first read counts: the region must hold what all of them read": (
            regions(kept=lambda indices: indices[:1])
        ),
        "only the last read counts: the region must hold what all of them read": (
            regions(kept=lambda indices: indices[-1:])
        ),
        "the region holds only what all reads have in common: from the smallest"
        " beginning to the largest end": regions(first_of=max, last_of=min),
        "a step of 2 was counted as one: the region of 2i + k over 4 × 3 is 9 long": (
            regions(
                span=lambda index, moving: interval(
                    Affine(
                        tuple((n, 1 if c > 0 else -1) for n, c in index.terms),
                        index.constant,
                    ),
                    moving,
                )
            )
        ),
        "an index's constant is counted twice: it is in what stands still or in what"
        " moves, not in both": lambda indices, moving: (
            tvm.region(indices, moving)[0] + indices[0].constant,
            tvm.region(indices, moving)[1],
        ),
        "the constants are in what stands still alone, that of the first read for all:"
        " i + 6 and i + 1 begin at 1, and reach 6 apart": first_constant,
        "the iterations of the loops inside were counted, and the places are asked:"
        " 2i + k over 4 × 3 reaches 9 with its 12": region_as_iterations,
        "the reads' extents were added up: where they overlap, a place is held once": (
            region_as_sum
        ),
        "the longest read alone gives the extent: two reads beside each other reach"
        " further": region_as_longest,
        "the region begins where the first read does: another one may begin before": (
            regions(first_of=lambda firsts: next(iter(firsts)))
        ),
        "the places that are read were counted: a region goes from the smallest to the"
        " largest, with what lies between": region_as_places,
    }


def first_constant(indices: list[Affine], moving: dict[str, int]) -> tuple:
    """Every read as if it had the first one's constant."""
    first = indices[0].constant
    return tvm.region([i - i.constant + first for i in indices], moving)


def region_as_iterations(indices: list[Affine], moving: dict[str, int]) -> tuple:
    """How often the loops run in the place of how far they reach."""
    return tvm.region(indices, moving)[0], math.prod(moving.values())


def region_as_sum(indices: list[Affine], moving: dict[str, int]) -> tuple:
    """Each read's extent by itself, added up."""
    alone = [tvm.region([index], moving)[1] for index in indices]
    return tvm.region(indices, moving)[0], sum(alone)


def region_as_longest(indices: list[Affine], moving: dict[str, int]) -> tuple:
    """The largest extent of one read."""
    alone = [tvm.region([index], moving)[1] for index in indices]
    return tvm.region(indices, moving)[0], max(alone)


def region_as_places(indices: list[Affine], moving: dict[str, int]) -> tuple:
    """How many different places are read."""
    places = set()
    for index in indices:
        rest = index - index.part(index.names - moving.keys())
        for steps in itertools.product(*map(range, moving.values())):
            at = dict(zip(moving, steps, strict=True))
            places.add(rest.constant + sum(c * at[name] for name, c in rest.terms))
    return tvm.region(indices, moving)[0], len(places)


# 3 ------------------------------------------------------------------------------------

FuseCase = tuple[Kind, Kind, tuple[Kind, ...], Kind, bool]


@cache
def fuse_cases(kind: Kind) -> tuple[FuseCase, ...]:
    """All cases of a step of this kind, with none to two steps between."""
    easy, wide, turned, summed, *_ = Kind
    inside = [(), (wide, easy), (easy, turned), (summed, wide), (wide, summed)]
    rounds = (False, True)
    return tuple(itertools.product([kind], Kind, inside, Kind, rounds))


def run_fuse(answer: Callable, n: int) -> Outcome:
    """All cases with one kind of the step: a text with a letter for each."""
    kind = [*Kind][n]
    letters = []
    for case in fuse_cases(kind):
        found = answer(*case)
        if not isinstance(found, bool):
            raise Mistake(f"may_fuse(…) returned {found!r}: return True or False")
        letters.append("y" if found else "n")
    return {f"what {kind.name} may do": "".join(letters)}


RIGHT_FUSION = cache(tvm.may_fuse)  # thousands of cases, the same in every check


@check.exercise(
    points=4,
    minutes=25,
    difficulty=4,
    importance=5,
    hints=(
        "Kinds are numbers in their order: `end <= Kind.BROADCAST` says two at once.",
        (
            "Three cases by `kind`: an ANCHOR; ELEMENTWISE or BROADCAST; INJECTIVE. All"
            " others stay alone."
        ),
        (
            "For the second: `way <= Kind.REDUCTION`, all in between `<="
            " Kind.INJECTIVE`, and `end <= Kind.ANCHOR`. `way` of an ANCHOR must be"
            " ELEMENTWISE itself."
        ),
    ),
)
def may_fuse(answer):
    """Whether an operation joins the one that all ways from it lead to."""
    words = "may_fuse(…)"

    def hidden(found: object) -> str:
        return "go through its sentence word by word"

    judge(answer, run_fuse, RIGHT_FUSION, wrong_fusions(), len(Kind), words, hidden)


def fusing(
    anchor_way: Callable = lambda way: way is Kind.ELEMENTWISE,
    anchor_first: Callable = lambda second: not second,
    anchor_most: Kind = Kind.BROADCAST,
    anchor_end: Callable = lambda end: end <= Kind.BROADCAST,
    easy_way: Callable = lambda way: way <= Kind.REDUCTION,
    easy_between: Kind = Kind.INJECTIVE,
    easy_end: Callable = lambda end: end <= Kind.ANCHOR,
    easy: Callable = lambda kind: kind <= Kind.BROADCAST,
    injective_second: Callable = lambda second: second,
    injective_end: Callable = lambda end: end <= Kind.INJECTIVE,
    injective_between: Kind = Kind.INJECTIVE,
    injective_way: Callable = lambda way: True,
    easy_round: Callable = lambda second: True,
    looked_at: Callable = lambda between: between,
    rest: bool = False,
) -> Callable:
    """`may_fuse`, and what comes out with one thing changed."""

    def way_of(kind, way, between, end, second) -> bool:
        between = looked_at(between)
        if kind is Kind.ANCHOR:
            inside = all(each <= anchor_most for each in between)
            return (
                anchor_first(second) and anchor_way(way) and inside and anchor_end(end)
            )
        if easy(kind):
            inside = all(each <= easy_between for each in between)
            return easy_round(second) and easy_way(way) and inside and easy_end(end)
        if kind is Kind.INJECTIVE:
            inside = all(each <= injective_between for each in between)
            begun = injective_second(second) and injective_way(way)
            return begun and inside and injective_end(end)
        return rest

    return way_of


def wrong_fusions() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    yes = lambda *_: True  # noqa: E731 a condition that was forgotten
    return {
        "an anchor joins whatever reads it: `way` must be ELEMENTWISE, so that each"
        " number of the product is used once, at its place": fusing(anchor_way=yes),
        "an anchor joins by a broadcast: `way` must be ELEMENTWISE itself": fusing(
            anchor_way=lambda way: way <= Kind.BROADCAST
        ),
        "an anchor joins in the second round as well: its turn is the first": fusing(
            anchor_first=yes
        ),
        "an anchor joins the function of a reduction or of another anchor: all that it"
        " joins must be BROADCAST at most": fusing(anchor_end=yes),
        "on an anchor's way something is more than BROADCAST: look at `between`, not at"
        " the end alone": fusing(anchor_most=Kind.OPAQUE),
        "an anchor's `between` may be BROADCAST, not ELEMENTWISE alone": fusing(
            anchor_most=Kind.ELEMENTWISE
        ),
        "an anchor's `between` must be BROADCAST at most: a transpose in it is too"
        " much": fusing(anchor_most=Kind.INJECTIVE),
        "an anchor may join an `end` of BROADCAST, not of ELEMENTWISE alone": fusing(
            anchor_end=lambda end: end is Kind.ELEMENTWISE
        ),
        "an anchor's `end` must be BROADCAST at most: a transpose is too much": fusing(
            anchor_end=lambda end: end <= Kind.INJECTIVE
        ),
        "a transpose may lie `between` an elementwise operation and its post-dominator:"
        " INJECTIVE at most": fusing(easy_between=Kind.BROADCAST),
        "ELEMENTWISE and BROADCAST join in one round alone: they join in both": fusing(
            easy_round=lambda second: not second
        ),
        "ELEMENTWISE and BROADCAST wait for the second round: they join in both": (
            fusing(easy_round=lambda second: second)
        ),
        "INJECTIVE joins by the rule of ELEMENTWISE: it has one of its own": fusing(
            easy=lambda kind: kind <= Kind.INJECTIVE
        ),
        "a transpose may join a function that is INJECTIVE itself": fusing(
            injective_end=lambda end: end <= Kind.BROADCAST
        ),
        "a transpose may have one `between`: INJECTIVE at most": fusing(
            injective_between=Kind.BROADCAST
        ),
        "a transpose joins the function of a reduction: its `end` must be INJECTIVE at"
        " most": fusing(injective_end=lambda end: end <= Kind.REDUCTION),
        "`way` was asked for INJECTIVE, too: its rule has `between` and `end`"
        " alone": fusing(injective_way=lambda way: way <= Kind.INJECTIVE),
        "`way` of REDUCTION at most was asked for INJECTIVE, too: its rule has"
        " `between` and `end` alone": fusing(
            injective_way=lambda way: way <= Kind.REDUCTION
        ),
        "only the first step `between` was looked at: each must be small enough": (
            fusing(looked_at=lambda between: between[:1])
        ),
        "only the last step `between` was looked at: each must be small enough": (
            fusing(looked_at=lambda between: between[-1:])
        ),
        "the smallest step `between` was looked at: each must be small enough, so ask"
        " `all`, not `any`": fusing(looked_at=lambda between: sorted(between)[:1]),
        "an anchor never joins: elementwise operations after a product are what fusion"
        " is for": fusing(anchor_first=lambda second: False),
        "an elementwise operation joins a product that reads it: it would be computed"
        " for every row. `way` must be REDUCTION at most": fusing(easy_way=yes),
        "an elementwise operation does not join a reduction: Σ exp(x) needs no exp(x)"
        " in memory": fusing(easy_way=lambda way: way <= Kind.INJECTIVE),
        "an elementwise operation joins across a reduction: what is `between` must be"
        " INJECTIVE at most": fusing(easy_between=Kind.OPAQUE),
        "an elementwise operation does not join a function that holds an anchor: the"
        " other operand of x w + y may": fusing(easy_end=lambda end: end < Kind.ANCHOR),
        "an operation joins an opaque one: nobody can look into it": fusing(
            easy_end=yes
        ),
        "BROADCAST stays alone: it joins as ELEMENTWISE does": fusing(
            easy=lambda kind: kind is Kind.ELEMENTWISE
        ),
        "a transpose joins in the first round: it waits, so that products take their"
        " readers first": fusing(injective_second=yes),
        "a transpose joins in the first round, and not in the second": fusing(
            injective_second=lambda second: not second
        ),
        "a transpose joins the function of a reduction or of a product: INJECTIVE at"
        " most": fusing(injective_end=yes),
        "a transpose joins across a reduction: what is `between` must be INJECTIVE at"
        " most": fusing(injective_between=Kind.OPAQUE),
        "a reduction or an opaque operation joins: they begin a new function each, and"
        " end one": fusing(rest=True),
    }


# 4 ------------------------------------------------------------------------------------


def tile_cases() -> list[tuple[tuple[int, ...], int]]:
    """(a tile, the largest last part)."""
    return [
        ((128, 4), 16),
        ((32, 16), 16),
        ((32, 8), 16),
        ((2, 6), 64),
        ((5, 3, 1), 64),
        ((1, 1, 7), 7),
        ((4, 9), 9),
        ((1, 1), 8),
        ((12,), 64),
        ((3, 2, 2), 5),
        ((10, 10), 30),
        ((2, 3, 16), 8),
    ]


def run_tiles(answer: Callable, n: int) -> Outcome:
    """Case n: the neighbours, in any order."""
    tile, most = tile_cases()[n]
    found = answer(tile, most)
    if not isinstance(found, list | set | tuple):
        raise Mistake(f"neighbours returned a {type(found).__name__}: return a list")
    if not all(isinstance(each, tuple) for each in found):
        raise Mistake("each neighbour must be a tuple, as the tile is")
    if not all(is_whole(part) for each in found for part in each):
        raise Mistake("parts must be whole numbers: divide with //")
    if len(set(found)) < len(found):
        raise Mistake(
            f"a neighbour of {tile} is in the list twice: it would be drawn twice as"
            " often"
        )
    return {"the list": sorted(found)}


@check.exercise(
    points=3,
    minutes=20,
    difficulty=3,
    importance=3,
    hints=(
        (
            "Three loops: over the part that gives, over its prime factors"
            " (`primes(part)`), and over the part that takes."
        ),
        "`new = list(tile)`, then `new[source] //= prime` and `new[target] *= prime`.",
        (
            "A set keeps each once. Leave out source == target, and what has a last"
            " part above `most`."
        ),
    ),
)
def neighbours(answer):
    """The tiles that are one small move away."""
    cases = len(tile_cases())
    judge(answer, run_tiles, tvm.neighbours, wrong_tiles(), cases, "neighbours(…)")


def moving_one(
    factors: Callable = lambda part: tvm.primes(part),
    limit: Callable = lambda new, most: new[-1] <= most,
    pairs: Callable = lambda n: itertools.permutations(range(n), 2),
    itself: bool = False,
    take: Callable = lambda part, prime: part * prime,
) -> Callable:
    """`neighbours`, and what comes out with one thing changed."""

    def way(tile: tuple[int, ...], most: int) -> list:
        found = {tile} if itself else set()
        for source, target in pairs(len(tile)):
            for prime in factors(tile[source]):
                new = list(tile)
                new[source] //= prime
                new[target] = take(new[target], prime)
                if limit(new, most):
                    found.add(tuple(new))
        return sorted(found)

    return way


def where_it_grows(tile: tuple[int, ...], most: int) -> list:
    """`most` as a limit of the move, not of the tile."""
    limit = max(most, tile[-1])
    every = tvm.neighbours(tile, limit)
    return [new for new in every if new[-1] <= most or new[-1] == tile[-1]]


def every_tile(tile: tuple[int, ...], most: int) -> list:
    """Whatever has the same product."""
    found, waiting = {tile}, [tile]
    while waiting:
        for new in tvm.neighbours(waiting.pop(), math.prod(tile)):
            if new not in found:
                found.add(new)
                waiting.append(new)
    return [new for new in found if new != tile and new[-1] <= most]


def adding_up(tile: tuple[int, ...], most: int) -> list:
    """One list for all, which is changed and changed again."""
    new, found = list(tile), set()
    for source, target in itertools.permutations(range(len(tile)), 2):
        for prime in tvm.primes(tile[source]):
            new[source] //= prime
            new[target] *= prime
            if new[-1] <= most:
                found.add(tuple(new))
    return sorted(found)


def divisors(n: int) -> list[int]:
    """All that divide n, but 1."""
    return [d for d in range(2, n + 1) if n % d == 0]


def wrong_tiles() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "the last part may not be larger than `most`": moving_one(
            limit=lambda new, most: True
        ),
        "a last part of just `most` is allowed": moving_one(
            limit=lambda new, most: new[-1] < most
        ),
        "every part was held to `most`: it limits the last one alone": moving_one(
            limit=lambda new, most: max(new) <= most
        ),
        "the first part was held to `most`: it limits the last one": moving_one(
            limit=lambda new, most: new[0] <= most
        ),
        "factors move only to the right: they may go back": moving_one(
            pairs=lambda n: itertools.combinations(range(n), 2)
        ),
        "factors move only to the left: they may go the other way": moving_one(
            pairs=lambda n: (p[::-1] for p in itertools.combinations(range(n), 2))
        ),
        "factors move only to the part beside: any other part may take one": moving_one(
            pairs=lambda n: (
                p for p in itertools.permutations(range(n), 2) if abs(p[0] - p[1]) == 1
            )
        ),
        "a whole divisor moved, not a prime: moves should be as small as can be": (
            moving_one(factors=divisors)
        ),
        "only twos move: 3, 5 and 7 are primes, too": moving_one(
            factors=lambda part: [2] if part % 2 == 0 else []
        ),
        "only the smallest prime of a part moves: each of them may": moving_one(
            factors=lambda part: tvm.primes(part)[:1]
        ),
        "the tile itself is in the list: a mutation would change nothing": moving_one(
            itself=True
        ),
        "a prime moves from a part to itself, and the tile is in its own list: leave"
        " that out": moving_one(pairs=lambda n: itertools.product(range(n), repeat=2)),
        "`most` was asked only where the last part grows: a last part that is too large"
        " stays too large": where_it_grows,
        "a part that is a prime itself moves, too": moving_one(
            factors=lambda part: [p for p in tvm.primes(part) if p < part]
        ),
        "all tiles of the same product are in the list: one prime moves, once": (
            every_tile
        ),
        "the changes add up: begin each neighbour from the tile": adding_up,
        "the product has changed: what one part gives, another takes": moving_one(
            take=lambda part, prime: part
        ),
    }
