"""One of our servers for all tests that only ask it."""

from __future__ import annotations

import pytest

from llmlab.inference import model_server as ms
from tests.inference.model_server import asking


@pytest.fixture(scope="package")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "models"
    with ms.ModelServer(asking.write_repository(folder)) as server:
        yield server
