"""What the tests of the course share."""

from __future__ import annotations

import os

import psutil
import pytest
from typer.testing import CliRunner

from llmlab.course import kernels
from llmlab.course.cli.main import app
from llmlab.course.kernels.starting import OWNER
from tests.course.learner import course


def common_process() -> str:
    """The process of all these tests, by number and start: that which started the
    workers of pytest-xdist, if this is one of them."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    pid = os.getppid() if is_worker else os.getpid()
    return f"{pid}:{psutil.Process(pid).create_time():.2f}"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A learner's course, and the working folder in it."""
    root = course(tmp_path)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def llmlab(root):
    """The command, as in llmlab("check", "lora"): what it printed, and its status."""
    return lambda *words: CliRunner().invoke(app, [str(w) for w in words])


@pytest.fixture(scope="session")
def warm():
    """A warm process is ready, and the kernels that programs start come from it.

    It ends with these tests, whose workers share it. `tests/course/test_kernels.py`
    holds a warm kernel to a plain one; what a test with this fixture asks is what
    became of the cells.
    """
    with pytest.MonkeyPatch.context() as patch, kernels.warm_kernels():
        patch.setenv(OWNER, common_process())
        kernels.warm_up(seconds=120)
        yield
