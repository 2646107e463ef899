"""GKD's loss as TRL computes it: `scripts/golden/distillation_goldens.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmlab.compression.distillation import divergences, gkd

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "distillation.json").read_text()
)
NAMES = [f"{c['beta']} {c['temperature']} {c['masked']}" for c in GOLDEN["cases"]]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=NAMES)
def test_value_and_gradient_are_those_of_trl(case):
    teacher = torch.tensor(GOLDEN["teacher"])
    student = torch.tensor(GOLDEN["student"], requires_grad=True)
    mask = torch.ones(2, 5, dtype=torch.bool)
    if case["masked"]:
        mask = torch.tensor(GOLDEN["labels"]) != -100
    loss = gkd.loss(teacher, student, mask, case["beta"], case["temperature"])
    loss.backward()
    # without labels TRL divides by the sequences, not by their tokens
    factor = 1 if case["masked"] else 5
    found = factor * loss
    torch.testing.assert_close(found.item(), case["loss"], rtol=1e-5, atol=1e-6)
    expected = torch.tensor(case["grad"])
    torch.testing.assert_close(factor * student.grad, expected, rtol=1e-4, atol=1e-6)


def test_the_value_jumps_at_the_ends_in_trl_too():
    teacher, student = (torch.tensor([q]).log() for q in ([0.9, 0.1], [0.5, 0.5]))
    for beta, value in GOLDEN["of_two_tokens"].items():
        ours = divergences.jsd(teacher, student, float(beta)).item()
        assert ours == pytest.approx(value, abs=2e-6)


def test_trl_s_trainer_does_not_hand_its_temperature_to_its_loss():
    """The lesson says so; a newer golden file would say when it changes."""
    assert GOLDEN["versions"]["trl"] == "1.16.0"
    assert GOLDEN["trainer_passes_temperature"] is False
