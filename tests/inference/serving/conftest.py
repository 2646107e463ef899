"""What the tests of serving share."""

from __future__ import annotations

import pytest

from tests.inference.serving import live as living


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small model that can chat."""
    return living.make_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    """An adapter for it."""
    return living.make_adapter(tmp_path_factory.mktemp("adapter"))
