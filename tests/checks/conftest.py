import pytest

from llmlab.course.grading import repairs, slips


@pytest.fixture(autouse=True, scope="session")
def patience():
    """What a check says does not depend on how busy the machine is.

    A slip is looked for to the end. The place in the learner's code is not looked for:
    tests/course/test_repairs.py does that.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slips, "SECONDS", 20.0)
        patch.setattr(repairs, "SECONDS", 0.0)
        yield
