"""Fewer cases than a product: the few that still hold what the product is there for.

Several parameters of a test span a product of cases. Where a mistake shows with one
value of one parameter, or with one pair of values, most of the product finds what
another of its cases has found.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, cycle, islice, product


def each_value(*axes: Sequence) -> list[tuple]:
    """Cases in which each value occurs, as many as the longest axis has."""
    longest = max(map(len, axes))
    columns = [islice(cycle(axis), longest) for axis in axes]
    return list(zip(*columns, strict=True))


def every_pair(*axes: Sequence) -> list[tuple]:
    """Cases in which each value of an axis meets each value of each other axis.

    The next case is always the one with the most pairs that are still missing.
    """
    cases = list(product(*(range(len(axis)) for axis in axes)))
    missing = set().union(*map(pairs_of, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(missing & pairs_of(case)))
        missing -= pairs_of(best)
        chosen.append(best)
    return [
        tuple(axis[i] for axis, i in zip(axes, case, strict=True)) for case in chosen
    ]


def pairs_of(case: tuple[int, ...]) -> set[tuple]:
    """The pairs of (axis, place on it) in one case."""
    return set(combinations(enumerate(case), 2))
