import pytest

from llmlab.course.grading import slips


@pytest.fixture(autouse=True, scope="session")
def patience():
    """A slip is looked for on a busy machine, too: what a check says stays the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slips, "SECONDS", 20.0)
        yield
