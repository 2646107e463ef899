"""Writes llmlab/peft/data/label_curves.csv: accuracy on held-out passages while four
ways to label are trained.

    python scripts/label_curves.py

Each rate of `labelling.RATES` runs with seed 0; the best by accuracy on passages of
their own ("dev") runs with seeds 1 and 2.
"""

from __future__ import annotations

import csv
import platform

import torch

from llmlab.peft.best_practice import labelling

MARKS = (20, 40, 80, 160, 240)
FIELDS = ["method", "rate", "seed", "steps", "dev", "test", "torch", "python"]


def run(method: str, rate: float, seed: int, sets: dict) -> list[dict]:
    """One training run, a line at each mark."""
    model, rows = labelling.prepare(method, seed), []
    for done in labelling.train(model, rate, MARKS[-1], seed):
        if done in MARKS:
            scores = {
                name: f"{labelling.accuracy(model, *data):.4f}"
                for name, data in sets.items()
            }
            rows.append(
                {"method": method, "rate": rate, "seed": seed, "steps": done} | scores
            )
            print(method, rate, seed, done, scores, flush=True)
    return [
        row | {"torch": torch.__version__, "python": platform.python_version()}
        for row in rows
    ]


def main() -> None:
    torch.set_num_threads(1)
    sets = {
        "dev": labelling.passages("valid", 2 * 10**6, 384),
        "test": labelling.passages("valid", 10**6, 384),
    }
    rows = []
    for method, rates in labelling.RATES.items():
        tried = {rate: run(method, rate, 0, sets) for rate in rates}
        best = max(rates, key=lambda rate, tried=tried: float(tried[rate][-1]["dev"]))
        rows += [row for run_of_rate in tried.values() for row in run_of_rate]
        for seed in (1, 2):
            rows += run(method, best, seed, sets)
    with labelling.FILE.open("w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
