"""Magnitude, Wanda and SparseGPT on the whole real model: data/prune.csv.

    python scripts/prune_sweep.py            continue, a line a run (up to a minute
                                             each); Ctrl-C loses at most one run
    python scripts/prune_sweep.py --check 1  run that many lines again and compare

All 210 linears of SmolLM2-135M-Instruct lose the same share. What is read to judge: the
first 1,025 tokens of the held-out addresses, 256 at a time. What is read to calibrate:
runs of 256 tokens from random places of a text, drawn by the seed.
"""

from __future__ import annotations

import argparse
import csv
import platform
from copy import deepcopy

import torch
from torch import Tensor

from llmlab.compression import calibration
from llmlab.compression import magnitude_wanda_sparsegpt as pruning
from llmlab.compression.magnitude_wanda_sparsegpt import FILE, PruneConfig
from llmlab.models import course_model, language_model, real_model

TOKENS = 1024  # to calibrate on, and to judge by
LENGTH = 256

# method, per, sparsity or pattern, calibration text, seed
RUNS = [
    *[("magnitude", "matrix", s, "", 0) for s in ("0.3", "0.5")],
    *[("wanda", "row", s, "addresses", 0) for s in ("0.3", "0.5")],
    *[("sparsegpt", "", s, "addresses", 0) for s in ("0.3", "0.5")],
    ("magnitude", "row", "0.5", "", 0),
    *[("magnitude", "", p, "", 0) for p in ("2:4", "4:8")],
    *[("wanda", "", p, "addresses", 0) for p in ("2:4", "4:8")],
    *[("sparsegpt", "", p, "addresses", 0) for p in ("2:4", "4:8")],
    *[("wanda", "row", "0.5", "addresses", seed) for seed in (1, 2)],
    *[("sparsegpt", "", "0.5", "addresses", seed) for seed in (1, 2)],
    *[("magnitude", "matrix", s, "", 0) for s in ("0.4", "0.6", "0.7", "0.2")],
    ("wanda", "row", "0.6", "addresses", 0),
    ("sparsegpt", "", "0.6", "addresses", 0),
    ("wanda", "row", "0.5", "bible", 0),
    ("sparsegpt", "", "0.5", "bible", 0),
    ("wanda", "row", "0.4", "addresses", 0),
    ("sparsegpt", "", "0.4", "addresses", 0),
    ("wanda", "row", "0.7", "addresses", 0),
    ("sparsegpt", "", "0.7", "addresses", 0),
    ("wanda", "row", "0.5", "bible", 1),
    ("sparsegpt", "", "0.5", "bible", 1),
    ("wanda", "row", "0.2", "addresses", 0),
    ("sparsegpt", "", "0.2", "addresses", 0),
]
FIELDS = [
    "method",
    "per",
    "amount",
    "text",
    "seed",
    "loss",  # mean over the judged tokens, in nats
    "grown",  # over the model as it was
    "grown_error",  # its standard error
    "gained",  # under magnitude with the same amount, among the whole matrix
    "gained_error",
    "torch",
    "python",
]


class Sweep:
    """The model, its texts, and the losses that others are compared with."""

    def __init__(self) -> None:
        self.model = real_model.load()
        self.tokenizer = real_model.load_tokenizer()
        self.judged = self.tokens("addresses", "valid", 20_000)[: TOKENS + 1]
        self.dense_losses = self.losses(self.model)
        self.by_magnitude: dict[str, Tensor] = {}

    def tokens(self, name: str, split: str, characters: int) -> Tensor:
        """The first so many characters of a text, as token ids."""
        text = course_model.corpus(name, split)[:characters]
        return torch.tensor(self.tokenizer.encode(text).ids)

    def losses(self, model: torch.nn.Module) -> Tensor:
        return language_model.token_losses(model, self.judged, context=LENGTH)

    def pruned(self, config: PruneConfig, text: str = "", seed: int = 0) -> Tensor:
        """The losses of the pruned model."""
        batches = None
        if text:
            known = self.tokens(text, "train", 400_000)
            batches = calibration.sample(known, LENGTH, TOKENS // LENGTH, seed)
        return self.losses(pruning.apply(deepcopy(self.model), batches, config))

    def magnitude(self, amount: str) -> Tensor:
        """The losses after magnitude pruning, computed once."""
        if amount not in self.by_magnitude:
            config = config_of("magnitude", "", amount)
            self.by_magnitude[amount] = self.pruned(config)
        return self.by_magnitude[amount]

    def run(self, method: str, per: str, amount: str, text: str, seed: int) -> dict:
        """One line of the file."""
        reference = self.magnitude(amount)
        losses = reference
        if (method, per) not in (("magnitude", "matrix"), ("magnitude", "")):
            losses = self.pruned(config_of(method, per, amount), text, seed)
        grown = losses - self.dense_losses
        gained = reference - losses
        values = (
            losses.mean(),
            grown.mean(),
            standard_error(grown),
            gained.mean(),
            standard_error(gained),
        )
        line = [method, per, amount, text, seed]
        line += [f"{float(value):.4f}" for value in values]
        line += [torch.__version__, platform.python_version()]
        return dict(zip(FIELDS, line, strict=True))


def config_of(method: str, per: str, amount: str) -> PruneConfig:
    """What a line of the file says."""
    if ":" in amount:
        return PruneConfig(method, pattern=amount)
    return PruneConfig(method, sparsity=float(amount), per=per or None)


def standard_error(values: Tensor) -> Tensor:
    return values.std() / len(values) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", type=int, default=0, metavar="LINES")
    asked = parser.parse_args()
    there = []
    if FILE.exists():
        with FILE.open(newline="", encoding="utf-8") as file:
            there = list(csv.DictReader(file))
    sweep = Sweep()
    done = {tuple(line[name] for name in FIELDS[:5]): line for line in there}
    if asked.check:
        for run in RUNS[: asked.check]:
            before = float(done[tuple(map(str, run))]["loss"])
            now = float(sweep.run(*run)["loss"])
            print(*run, f"{before:.4f} then, {now:.4f} now")
        return
    for run in RUNS:
        if tuple(map(str, run)) in done:
            continue
        line = sweep.run(*run)
        new = not FILE.exists()
        with FILE.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(line)
        print(*line.values(), flush=True)


if __name__ == "__main__":
    main()
