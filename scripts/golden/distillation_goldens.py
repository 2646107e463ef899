"""GKD's loss in TRL: tests/compression/golden/distillation.json.

Run with an environment of TRL 1.16.0 (it does not fit beside the course):

    python scripts/golden/distillation_goldens.py

Values and gradients of `GKDTrainer.generalized_jsd_loss` for some β and T, with labels
and without, and whether the trainer hands its temperature to its own loss.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tests" / "compression" / "golden" / "distillation.json"


def main() -> None:
    from trl.experimental.gkd import GKDTrainer

    torch.manual_seed(0)
    teacher = (2 * torch.randn(2, 5, 7)).round(decimals=3)
    student = (2 * torch.randn(2, 5, 7)).round(decimals=3)
    labels = torch.randint(7, (2, 5))
    labels[0, :2] = -100  # a prompt of 2 tokens, and one of 3; the last is padding
    labels[1, :3] = -100
    labels[1, 4:] = -100
    cases = []
    for beta in (0, 0.1, 0.5, 0.9, 1):
        for temperature in (1.0, 2.0):
            for masked in (True, False):
                z = student.clone().requires_grad_()
                loss = GKDTrainer.generalized_jsd_loss(
                    z,
                    teacher,
                    labels if masked else None,
                    beta=beta,
                    temperature=temperature,
                )
                loss.backward()
                case = {"beta": beta, "temperature": temperature, "masked": masked}
                grad = [[[round(g, 7) for g in t] for t in s] for s in z.grad.tolist()]
                cases.append({**case, "loss": loss.item(), "grad": grad})
    pair = (torch.tensor([[x]]).log() for x in ([0.5, 0.5], [0.9, 0.1]))
    pair = tuple(pair)  # a student and a teacher, as on the page
    jumps = {
        str(beta): GKDTrainer.generalized_jsd_loss(*pair, beta=beta).item()
        for beta in (0, 0.001, 0.1, 0.5, 0.999, 1)
    }
    source = inspect.getsource(GKDTrainer.compute_loss)
    data = {
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("trl", "transformers", "torch")
        },
        "teacher": teacher.tolist(),
        "student": student.tolist(),
        "labels": labels.tolist(),
        "cases": cases,
        "of_two_tokens": jumps,
        "trainer_passes_temperature": "temperature" in source,
    }
    FILE.write_text(json.dumps(data) + "\n")
    print(FILE, len(FILE.read_text()), data["trainer_passes_temperature"])


if __name__ == "__main__":
    main()
