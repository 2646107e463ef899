from itertools import combinations, product

import pytest

from tests.covering import each_value, every_pair

AXES = [(1, 2, 3, 5, 8), ("a", "b"), (None, [0], 1.5)]


def test_each_value_occurs():
    cases = each_value(*AXES)
    assert len(cases) == 5
    for axis, column in zip(AXES, zip(*cases, strict=True), strict=True):
        assert all(value in column for value in axis)


@pytest.mark.parametrize("axes", [AXES, AXES[:2], AXES * 2])
def test_each_pair_occurs_in_fewer_cases_than_the_product_has(axes):
    cases = every_pair(*axes)
    for i, k in combinations(range(len(axes)), 2):
        met = [(case[i], case[k]) for case in cases]
        assert all(pair in met for pair in product(axes[i], axes[k]))
    if len(axes) > 2:
        size = len(list(product(*axes)))
        assert len(cases) <= size // 2
