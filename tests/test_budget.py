"""What a lesson costs in CI is reckoned with a speed that the machine can sustain."""

from __future__ import annotations

from scripts import budget

CASES = [
    {"stage": "units", "where": "tests.peft.lora.test_lora::test_one", "seconds": 1000},
    {"stage": "units", "where": "tests.test_house::test_two", "seconds": 1000},
]


def lora(speed: float) -> float:
    """Reference seconds of the LoRA lesson's unit tests on two processes."""
    return budget.costs(CASES, {"units": speed}, {"units": 2})["units"][
        "04-peft/05-lora"
    ]


def test_a_slow_machine_is_allowed_for_and_a_burst_is_not_believed():
    assert lora(1.0) == 500
    assert lora(0.5) == 250
    assert lora(2.4) == 500


def test_a_lesson_over_its_budget_is_named():
    found = budget.costs(CASES, {"units": 1.0}, {"units": 2})
    (fault,) = budget.over(found)
    assert fault.startswith("04-peft/05-lora costs 500.0 reference seconds")
