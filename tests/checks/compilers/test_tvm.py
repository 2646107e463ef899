"""Wrong answers to 08-compilers/04-tvm, each with its diagnosis."""

from __future__ import annotations

import math

from llmlab.checks.compilers import tvm as checks
from llmlab.checks.compilers.tvm import check
from llmlab.compilers import tvm
from llmlab.compilers.tvm import Kind, Refused
from tests.checks.rejecting import (
    ByCases,
    Wrong,
    accepts,
    all_foreseen,
    kept_apart,
    rejects,
)

SLUG = "08-compilers/04-tvm"

# Right, written otherwise ------------------------------------------------------------


def split_by_counting(extent, factors):
    rest = 1
    while True:
        parts = tuple(rest if factor is None else factor for factor in factors)
        total = math.prod(parts)
        if total >= extent:
            return parts, total != extent
        if None not in factors:
            raise Refused(f"{total} are fewer than {extent}")
        rest += 1


def split_step_by_step(extent, factors):
    left = extent
    for factor in factors:
        if factor is not None:
            left = math.ceil(left / factor)
    if left > 1 and None not in factors:
        raise Refused("too few")
    parts = tuple(left if factor is None else factor for factor in factors)
    return parts, extent < math.prod(parts)


def region_by_enumeration(indices, moving):
    names = [*moving]
    values = []
    for index in indices:
        terms = dict(index.terms)
        points = [index.constant]
        for name in names:
            steps = range(moving[name])
            points = [p + terms.get(name, 0) * step for p in points for step in steps]
        values += points
    standing = {name: c for name, c in indices[0].terms if name not in moving}
    begin = tvm.Affine.of(standing, min(values))
    return begin, max(values) - min(values) + 1


def region_by_substitution(indices, moving):
    zero = dict.fromkeys(moving, tvm.affine(0))
    low, high = [], []
    for index in indices:
        rest = index - index.substitute(zero)
        first, last = tvm.interval(rest, moving)
        constant = index.constant
        low.append(first + constant)
        high.append(last + constant)
    standing = indices[0].substitute(zero) - indices[0].constant
    return standing + min(low), max(high) + 1 - min(low)


def fuse_by_table(kind, way, between, end, second):
    limits = {
        Kind.ANCHOR: (0, 1, 1, (False,)),
        Kind.ELEMENTWISE: (3, 2, 4, (False, True)),
        Kind.BROADCAST: (3, 2, 4, (False, True)),
        Kind.INJECTIVE: (8, 2, 2, (True,)),
    }
    if kind not in limits:
        return False
    most_way, most_between, most_end, rounds = limits[kind]
    inside = max(between, default=Kind.ELEMENTWISE)
    return (
        way <= most_way
        and inside <= most_between
        and end <= most_end
        and second in rounds
    )


def fuse_by_refusals(kind, way, between, end, second):
    if kind in (Kind.REDUCTION, Kind.OPAQUE) or end is Kind.OPAQUE:
        return False
    if kind is Kind.INJECTIVE:
        return bool(second and max((*between, end)) < Kind.REDUCTION)
    if kind is Kind.ANCHOR:
        if second or way > Kind.ELEMENTWISE:
            return False
        return not [each for each in (*between, end) if each > Kind.BROADCAST]
    return way < Kind.ANCHOR and not [k for k in between if k > Kind.INJECTIVE]


def neighbours_by_looking(tile, most):
    every = tvm.tiles(math.prod(tile), len(tile), most)
    found = set()
    for other in every:
        ratios = sorted(b / a for a, b in zip(tile, other, strict=True) if a != b)
        if len(ratios) != 2 or ratios[0] * ratios[1] != 1:
            continue
        if tvm.primes(round(ratios[1])) == [round(ratios[1])] and ratios[1] % 1 == 0:
            found.add(other)
    return found


def neighbours_by_pairs(tile, most):
    found = []
    for source in range(len(tile)):
        for target in range(len(tile)):
            for p in range(2, tile[source] + 1):
                prime = all(p % d for d in range(2, p))
                if target == source or tile[source] % p or not prime:
                    continue
                new = [*tile]
                new[source], new[target] = new[source] // p, new[target] * p
                if new[-1] <= most and tuple(new) not in found:
                    found.append(tuple(new))
    return found


RIGHT = {
    "split_loop": (split_by_counting, split_step_by_step),
    "region": (region_by_enumeration, region_by_substitution),
    "may_fuse": (fuse_by_table, fuse_by_refusals),
    "neighbours": (neighbours_by_looking, neighbours_by_pairs),
}


test_right_answers_written_otherwise = accepts(check, RIGHT)


# Wrong --------------------------------------------------------------------------------

KINDS = {
    "split_loop": ByCases(
        checks.run_split,
        tvm.split,
        checks.wrong_splits,
        checks.split_cases,
    ),
    "region": ByCases(
        checks.run_region,
        tvm.region,
        checks.wrong_regions,
        checks.region_cases,
    ),
    "may_fuse": ByCases(checks.run_fuse, tvm.may_fuse, checks.wrong_fusions, [*Kind]),
    "neighbours": ByCases(
        checks.run_tiles,
        tvm.neighbours,
        checks.wrong_tiles,
        checks.tile_cases,
    ),
}


test_no_two_mistakes_come_to_the_same = kept_apart(KINDS)


def parts_alone(extent, factors):
    return tvm.split(extent, factors)[0]


def parts_as_list(extent, factors):
    parts, guarded = tvm.split(extent, factors)
    return [*parts], guarded


def guard_as_number(extent, factors):
    parts, guarded = tvm.split(extent, factors)
    return parts, int(guarded)


def refuses_with_none(extent, factors):
    try:
        return tvm.split(extent, factors)
    except Refused:
        return None


def refuses_without_words(extent, factors):
    try:
        return tvm.split(extent, factors)
    except Refused:
        raise Refused from None


def refuses_with_value_error(extent, factors):
    try:
        return tvm.split(extent, factors)
    except Refused as refusal:
        raise ValueError(str(refusal)) from None


def guards_what_is_too_few(extent, factors):
    given = math.prod(factor for factor in factors if factor is not None)
    parts = tuple(-(-extent // given) if f is None else f for f in factors)
    return parts, math.prod(parts) != extent


def divides_as_float(extent, factors):
    parts, guarded = tvm.split(extent, factors)
    return tuple(map(float, parts)), guarded


def region_as_text(indices, moving):
    begin, extent = tvm.region(indices, moving)
    return str(begin), extent


def ends_instead(indices, moving):
    begin, extent = tvm.region(indices, moving)
    return begin, begin + extent


def region_of_all(indices, moving):
    begin, extent = tvm.region(indices, moving)
    return begin, extent + 2


def fuse_as_number(*case):
    return int(tvm.may_fuse(*case))


def fuse_never(kind, way, between, end, second):
    return False


def as_generator(tile, most):
    return (each for each in tvm.neighbours(tile, most))


def as_lists(tile, most):
    return [list(each) for each in tvm.neighbours(tile, most)]


def twice(tile, most):
    return tvm.neighbours(tile, most) * 2


def floats(tile, most):
    return [tuple(map(float, each)) for each in tvm.neighbours(tile, most)]


def all_tiles(tile, most):
    return tvm.tiles(math.prod(tile), len(tile), most)


test_wrong_answers = rejects(
    SLUG,
    [
        *all_foreseen(KINDS),
        Wrong("split_loop", parts_alone, "return a tuple of whole numbers"),
        Wrong("split_loop", parts_as_list, "return a tuple of whole numbers"),
        Wrong("split_loop", guard_as_number, "return True or False"),
        Wrong("split_loop", refuses_with_none, "return (parts, guarded)"),
        Wrong("split_loop", refuses_without_words, "without a sentence"),
        Wrong("split_loop", refuses_with_value_error, "raise Refused"),
        Wrong("split_loop", guards_what_is_too_few, "fewer iterations than there are"),
        Wrong("split_loop", divides_as_float, "return a tuple of whole numbers"),
        Wrong("region", region_as_text, "return an Affine"),
        Wrong("region", ends_instead, "return a whole number"),
        Wrong("region", region_of_all, "the extent of"),
        Wrong("may_fuse", fuse_as_number, "return True or False"),
        Wrong("may_fuse", fuse_never, "what ELEMENTWISE may do"),
        Wrong("neighbours", as_generator, "return a list"),
        Wrong("neighbours", as_lists, "must be a tuple"),
        Wrong("neighbours", twice, "in the list twice"),
        Wrong("neighbours", floats, "divide with //"),
        Wrong("neighbours", all_tiles, "the list after neighbours"),
    ],
    drawing_nothing=("split_loop", "region", "may_fuse", "neighbours"),
)
