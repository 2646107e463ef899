"""What a sweep found: each method at its best rate, with its spread over seeds.

The runs are in `data/sweep.csv`, one a line, with the versions that made them;
`scripts/peft_sweep.py` writes it. The rate is chosen with seed 0 on held-out examples
of their own ("dev"), the same way for every method, so that no method is flattered and
no reported loss took part in a choice; the spread is over all seeds at that rate.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Bool, Float
from torch import Tensor

FILE = Path(__file__).parents[1] / "data" / "sweep.csv"


@dataclass(frozen=True)
class Result:
    """One method on one task, at its best rate."""

    method: str
    lr: float
    trained: int
    losses: tuple[float, ...]  # one a seed, seed 0 first
    accuracies: tuple[float, ...]

    @property
    def loss(self) -> float:
        """The mean over seeds, in nats."""
        return sum(self.losses) / len(self.losses)

    @property
    def spread(self) -> float:
        """The largest minus the smallest over seeds."""
        return max(self.losses) - min(self.losses)

    @property
    def accuracy(self) -> float:
        """The mean over seeds."""
        return sum(self.accuracies) / len(self.accuracies)


def read(file: Path = FILE) -> list[dict[str, str]]:
    """The lines of the sweep."""
    with file.open(encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def best(rows: Sequence[dict[str, str]], task: str) -> dict[str, Result]:
    """The best rate's result for each method that has run on `task`, in the order of
    the rows.

    Raises:
        ValueError: no method has run on it.
    """
    own = [row for row in rows if row["task"] == task]
    if not own:
        raise ValueError(
            f"task={task!r} has no runs; there are runs of"
            f" {', '.join(dict.fromkeys(r['task'] for r in rows))}"
        )
    found = {}
    for name in dict.fromkeys(row["method"] for row in own):
        tried = [row for row in own if row["method"] == name]
        lr = min((r for r in tried if r["seed"] == "0"), key=lambda r: float(r["dev"]))[
            "lr"
        ]
        runs = sorted((r for r in tried if r["lr"] == lr), key=lambda r: int(r["seed"]))
        losses, accuracies = (
            tuple(float(r[key]) for r in runs) for key in ("loss", "accuracy")
        )
        found[name] = Result(
            name, float(lr), int(runs[0]["trained"]), losses, accuracies
        )
    return found


def gain(loss: float, base: float, full: float) -> float:
    """The share of full fine-tuning's improvement that a loss stands for: 0 at the
    base, 1 at full fine-tuning.
    """
    return (base - loss) / (base - full)


def pareto(cost: Float[Tensor, "n"], loss: Float[Tensor, "n"]) -> Bool[Tensor, "n"]:
    """Who is not beaten: nobody costs at most as much and loses at most as much, and
    less of one of the two.

    Raises:
        ValueError: the two have different shapes.
    """
    if cost.shape != loss.shape or cost.dim() != 1:
        raise ValueError(
            f"loss has shape {tuple(loss.shape)}: it must be that of cost,"
            f" {tuple(cost.shape)}, one number per method"
        )
    # [i, j]: i is at least as good as j
    no_worse = (cost[:, None] <= cost) & (loss[:, None] <= loss)
    better = (cost[:, None] < cost) | (loss[:, None] < loss)
    return ~(no_worse & better).any(0)
