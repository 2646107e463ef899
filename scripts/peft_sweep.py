"""Every PEFT method on every shared task at one budget: llmlab/peft/data/sweep.csv.

    python scripts/peft_sweep.py            continue the sweep, a line a run; Ctrl-C
                                            loses at most one run
    python scripts/peft_sweep.py --check 5  run 5 lines again and compare

One rule for every method: the rate is searched on the grid 1, 3, 10 … from three
neighbours, and as long as the best of them lies at an edge the next one beyond is tried
too, six at most. The rate is chosen with seed 0 on held-out examples ("dev") that are
not those of the table ("loss"); at that rate seeds 1 and 2 follow. A run is 40 steps.
The seed draws both the training examples and the method's start.
"""

from __future__ import annotations

import argparse
import csv
import platform
from collections.abc import Iterator

import torch

from llmlab.models import course_model
from llmlab.peft import walk
from llmlab.peft.best_practice import catalogue, comparison
from llmlab.training import tasks

FILE = comparison.FILE
FIELDS = [
    "task",
    "method",
    "lr",
    "seed",
    "steps",
    "trained",
    "dev",
    "loss",
    "accuracy",
    "torch",
    "python",
]
STEPS, SEEDS, MOST = 40, (0, 1, 2), 6
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
FIRST = {  # the middle of the first three; the search leaves it where it has to
    "full fine-tuning": 1e-3,
    "BitFit": 3e-2,
    "(IA)³": 3e-1,
    "Prompt Tuning": 3e-1,
    "P-Tuning v2": 3e-1,
    "P-Tuning": 3e-2,
    "Prefix Tuning": 3e-2,
}
MIDDLE = 1e-2


def run(
    task: str,
    method: catalogue.Method,
    lr: float,
    seed: int,
    tokenizer,
    sets: dict[str, list],
) -> dict:
    """One run: the course model, the method, 40 steps, the held-out scores."""
    model = method.apply(course_model.load(), STEPS, seed)
    trained = walk.trainable(model)[0]
    batches = tasks.make(task, tokenizer, seed=seed, batches=STEPS)
    tasks.fit(model, batches, lr, **catalogue.hooks(model))
    dev, _ = tasks.score(model, sets["dev"])
    loss, accuracy = tasks.score(model, sets["test"])
    return {
        "task": task,
        "method": method.name,
        "lr": lr,
        "seed": seed,
        "steps": STEPS,
        "trained": trained,
        "dev": f"{dev:.5f}",
        "loss": f"{loss:.5f}",
        "accuracy": f"{accuracy:.4f}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def next_rate(dev: dict[float, float], name: str) -> float | None:
    """The rate to try next, given the dev losses so far.

    None when the best rate has a worse neighbour on either side.
    """
    middle = GRID.index(FIRST.get(name, MIDDLE))
    for rate in GRID[middle - 1 : middle + 2]:
        if rate not in dev:
            return rate
    if len(dev) >= MOST:
        return None
    best = GRID.index(min(dev, key=dev.get))
    for i in (best - 1, best + 1):
        if 0 <= i < len(GRID) and GRID[i] not in dev:
            return GRID[i]
    return None


def plan() -> Iterator[tuple[str, catalogue.Method, float, int]]:
    """The runs still to do: each task's search, then its other seeds."""
    for task in ("source", "bible", "sort"):
        for method in catalogue.METHODS:
            # each run adds a line to the file, which `searched` reads again
            lr = next_rate(searched(task, method.name), method.name)
            while lr is not None:
                yield task, method, lr, 0
                lr = next_rate(searched(task, method.name), method.name)
        for seed in SEEDS[1:]:
            for method in catalogue.METHODS:
                rows = rows_of(task, method.name)
                lr = comparison.best(rows, task)[method.name].lr
                done = {(float(r["lr"]), int(r["seed"])) for r in rows}
                if (lr, seed) not in done:
                    yield task, method, lr, seed


def read() -> list[dict[str, str]]:
    return comparison.read() if FILE.exists() else []


def searched(task: str, name: str) -> dict[float, float]:
    """Dev loss of each rate tried with seed 0; infinite where a run diverged."""
    losses = {}
    for row in rows_of(task, name):
        if row["seed"] == "0":
            diverged = row["dev"] == "nan"
            losses[float(row["lr"])] = float("inf") if diverged else float(row["dev"])
    return losses


def rows_of(task: str, name: str) -> list[dict[str, str]]:
    """What is written down about one method on one task."""
    return [r for r in read() if r["task"] == task and r["method"] == name]


def held_out(task: str, tokenizer) -> dict[str, list]:
    """Held-out examples to choose by (dev) and, of another draw, to report (test)."""
    return {
        "dev": tasks.make(task, tokenizer, "valid", seed=1, batches=4, size=16),
        "test": tasks.make(task, tokenizer, "valid", seed=0, batches=8, size=16),
    }


def sweep(tokenizer, sets: dict) -> None:
    FILE.parent.mkdir(exist_ok=True)
    for task, method, lr, seed in plan():
        row = run(task, method, lr, seed, tokenizer, sets[task])
        new = not FILE.exists()
        with FILE.open("a", encoding="utf-8", newline="") as f:
            writer = csv.DictWriter(f, FIELDS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        shown = ("task", "method", "lr", "seed", "dev", "loss", "accuracy")
        print(*(row[name] for name in shown), flush=True)


def check(tokenizer, sets: dict, count: int) -> None:
    """Run some lines again: the loss must come out within 0.03."""
    rows = read()
    for old in rows[:: max(1, len(rows) // count)][:count]:
        task = old["task"]
        method = catalogue.method(old["method"])
        lr = float(old["lr"])
        seed = int(old["seed"])
        new = run(task, method, lr, seed, tokenizer, sets[task])
        print(task, method.name, old["loss"], new["loss"])
        assert abs(float(old["loss"]) - float(new["loss"])) < 0.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", type=int, default=0, metavar="N")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = course_model.load_tokenizer()
    sets = {name: held_out(name, tokenizer) for name in tasks.TASKS}
    if options.check:
        check(tokenizer, sets, options.check)
    else:
        sweep(tokenizer, sets)


if __name__ == "__main__":
    main()
