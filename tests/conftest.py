"""What all tests share."""

import pytest

from llmlab.course.grammar import leave_out_grammar

leave_out_grammar()  # three seconds in each process that imports nbformat

MEASURED = 5  # of a test's cases, the first, the last and each fifth


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Measures the coverage of some cases of a parametrized test, not of all.

    Measuring makes a test take a third longer. Most cases run the same lines, so what
    is found is at most less than what is covered, and the limit still holds. Each wrong
    answer in tests/checks/ has lines of its own: there all are measured.
    """
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if "checks" not in item.path.parts:
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    for alike in cases.values():
        for i, item in enumerate(alike[:-1]):
            if i % MEASURED:
                item.add_marker(pytest.mark.no_cover)
