"""Writes llmlab/peft/data/label_curves.csv.

It holds the accuracy on held-out passages while four ways to label are trained.

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
    model = labelling.prepare(method, seed)
    rows = []
    for done in labelling.train(model, rate, MARKS[-1], seed):
        if done not in MARKS:
            continue
        row = {"method": method, "rate": rate, "seed": seed, "steps": done}
        for name, data in sets.items():
            row[name] = f"{labelling.accuracy(model, *data):.4f}"
        print(*row.values(), flush=True)
        row["torch"] = torch.__version__
        row["python"] = platform.python_version()
        rows.append(row)
    return rows


def main() -> None:
    torch.set_num_threads(1)
    sets = {
        "dev": labelling.passages("valid", 2 * 10**6, 384),
        "test": labelling.passages("valid", 10**6, 384),
    }
    rows = []
    for method, rates in labelling.RATES.items():
        best = None
        highest = -1.0
        for rate in rates:
            tried = run(method, rate, 0, sets)
            rows += tried
            accuracy = float(tried[-1]["dev"])
            if accuracy > highest:
                best = rate
                highest = accuracy
        for seed in (1, 2):
            rows += run(method, best, seed, sets)
    with labelling.FILE.open("w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
