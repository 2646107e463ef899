"""What the tests of the course share."""

from __future__ import annotations

import pytest

from llmlab.course import kernels


@pytest.fixture(scope="session")
def warm():
    """A warm process is ready, and the kernels that programs start come from it.

    It ends with this process. `tests/course/test_kernels.py` holds a warm kernel to a
    plain one; what a test with this fixture asks is what became of the cells.
    """
    with kernels.warm_kernels():
        kernels.warm_up(seconds=120)
        yield
