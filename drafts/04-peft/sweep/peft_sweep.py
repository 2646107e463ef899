"""Every PEFT method of the catalogue on every shared task at one budget: writes llmlab/peft/data/sweep.csv.

    python scripts/peft_sweep.py            continue the sweep, a line a run; Ctrl-C loses at most one run
    python scripts/peft_sweep.py --check 5  run 5 lines again and compare

For each method and task three learning rates are tried with seed 0; the best by held-out loss runs with seeds 1 and 2.
A run is 40 steps. The seed draws both the examples and the method's start. The held-out examples are the same always.
"""

from __future__ import annotations

import argparse
import csv
import platform

import torch

from llmlab.models import course_model
from llmlab.peft import catalogue, comparison, walk
from llmlab.training import tasks

FILE = comparison.FILE
FIELDS = ["task", "method", "lr", "seed", "steps", "trained", "loss", "accuracy", "torch", "python"]
STEPS = 40
RATES = {
    "full fine-tuning": (1e-3, 2e-3, 4e-3),
    "BitFit": (1e-2, 3e-2, 1e-1),
    "(IA)³": (1e-1, 3e-1, 6e-1),
    "Prompt Tuning": (1e-1, 3e-1, 1.0),
    "P-Tuning": (1e-2, 3e-2, 1e-1),
    "Prefix Tuning": (1e-2, 3e-2, 1e-1),
    "P-Tuning v2": (1e-1, 3e-1, 1.0),
    "QLoRA": (5e-3, 1e-2, 2e-2),
    "LoRA": (5e-3, 1e-2, 2e-2),
    "AdaLoRA": (1e-2, 2e-2, 4e-2),
}
DEFAULT = (3e-3, 1e-2, 3e-2)


def run(task: str, method: catalogue.Method, lr: float, seed: int, tokenizer, valid: list) -> dict:
    """One run: the course model, the method, 40 steps, the held-out score."""
    model = method.apply(course_model.load(), STEPS, seed)
    trained = walk.trainable(model)[0]
    tasks.fit(model, tasks.make(task, tokenizer, seed=seed, batches=STEPS), lr, **catalogue.hooks(model))
    loss, accuracy = tasks.score(model, valid)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    row = {"task": task, "method": method.name, "lr": lr, "seed": seed, "steps": STEPS, "trained": trained}
    return row | {"loss": f"{loss:.5f}", "accuracy": f"{accuracy:.4f}"} | versions


def read() -> list[dict]:
    return comparison.read() if FILE.exists() else []


def plan(rows: list[dict]):
    """The runs still to do, in an order in which a sweep that stops early is still of use."""
    done = {(r["task"], r["method"], float(r["lr"]), int(r["seed"])) for r in rows}
    for task in ("source", "sort", "bible"):
        for method in catalogue.METHODS:
            for lr in RATES.get(method.name, DEFAULT):
                if (task, method.name, lr, 0) not in done:
                    yield task, method, lr, 0
        for method in catalogue.METHODS:
            lr = comparison.best(read(), task)[method.name].lr
            for seed in (1, 2):
                if (task, method.name, lr, seed) not in done:
                    yield task, method, lr, seed


def sweep(tokenizer, valid: dict) -> None:
    FILE.parent.mkdir(exist_ok=True)
    for task, method, lr, seed in plan(read()):
        row = run(task, method, lr, seed, tokenizer, valid[task])
        new = not FILE.exists()
        with FILE.open("a", encoding="utf-8", newline="") as f:
            writer = csv.DictWriter(f, FIELDS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(row["task"], row["method"], lr, seed, row["loss"], row["accuracy"], flush=True)


def check(tokenizer, valid: dict, count: int) -> None:
    """Run some lines again: the loss must come out within 0.03."""
    rows = read()
    for old in rows[:: max(1, len(rows) // count)][:count]:
        method = catalogue.method(old["method"])
        new = run(old["task"], method, float(old["lr"]), int(old["seed"]), tokenizer, valid[old["task"]])
        print(old["task"], old["method"], old["loss"], new["loss"])
        assert abs(float(old["loss"]) - float(new["loss"])) < 0.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", type=int, default=0, metavar="N")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = course_model.load_tokenizer()
    valid = {name: tasks.make(name, tokenizer, "valid", batches=8, size=16) for name in tasks.TASKS}
    if options.check:
        check(tokenizer, valid, options.check)
    else:
        sweep(tokenizer, valid)


if __name__ == "__main__":
    main()
