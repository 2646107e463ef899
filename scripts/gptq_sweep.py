"""GPTQ beside rounding, on the whole real model: llmlab/compression/data/gptq.csv.

    python scripts/gptq_sweep.py            continue, a line a run (a minute or more
                                            each); Ctrl-C loses at most one run
    python scripts/gptq_sweep.py --check 1  run that many lines again and compare

All 210 linears of SmolLM2-135M-Instruct, symmetric levels, groups of 64. What is read
to judge: the first 2,049 tokens of the held-out addresses, 256 at a time. What is read
to calibrate: runs of 256 tokens from random places, drawn by the seed.
"""

from __future__ import annotations

import argparse
import csv
import platform
from copy import deepcopy

import torch
from torch import Tensor

from llmlab.compression import calibration, gptq
from llmlab.compression import quantization_basics as qb
from llmlab.compression.gptq import FILE, GPTQConfig
from llmlab.compression.quantization_basics import QuantConfig
from llmlab.models import course_model, language_model, real_model

# method, bits, calibration text, tokens, seed
RUNS = [
    ("rounding", 3, "", 0, 0),
    ("act-order", 3, "addresses", 2048, 0),
    ("act-order", 3, "addresses", 2048, 1),
    ("in order", 3, "addresses", 2048, 0),
    ("in order", 3, "addresses", 2048, 1),
    ("static groups", 3, "addresses", 2048, 0),
    ("act-order", 3, "bible", 2048, 0),
    ("static groups", 3, "addresses", 2048, 1),
    ("act-order", 3, "bible", 2048, 1),
]
CONFIGS = {
    "in order": {},
    "static groups": {"static_groups": True},
    "act-order": {"act_order": True},
}
FIELDS = [
    "method",
    "bits",
    "text",
    "tokens",
    "seed",
    "loss",  # mean over the judged tokens, in nats
    "grown",  # over the float model
    "grown_error",  # its standard error
    "gained",  # under rounding with as many bits
    "gained_error",
    "torch",
    "python",
]
LENGTH = 256


class Sweep:
    """The model, its texts, and the losses that others are compared with."""

    def __init__(self) -> None:
        self.model = real_model.load()
        self.tokenizer = real_model.load_tokenizer()
        self.judged = self.tokens("addresses", "valid", 20_000)[:2049]
        self.float_losses = self.losses(self.model)
        self.rounded: dict[int, Tensor] = {}

    def tokens(self, name: str, split: str, characters: int) -> Tensor:
        """The first so many characters of a text, as token ids."""
        text = course_model.corpus(name, split)[:characters]
        return torch.tensor(self.tokenizer.encode(text).ids)

    def losses(self, model: torch.nn.Module) -> Tensor:
        return language_model.token_losses(model, self.judged, context=256)

    def rounding(self, bits: int) -> Tensor:
        """The losses of round to nearest, computed once."""
        if bits not in self.rounded:
            grid = QuantConfig(bits, group_size=64)
            self.rounded[bits] = self.losses(
                qb.round_weights(deepcopy(self.model), grid)
            )
        return self.rounded[bits]

    def run(self, method: str, bits: int, text: str, tokens: int, seed: int) -> dict:
        """One line of the file."""
        losses = self.rounding(bits)
        if method != "rounding":
            grid = QuantConfig(bits, group_size=64)
            config = GPTQConfig(grid, **CONFIGS[method])
            known = self.tokens(text, "train", 400_000)
            batches = calibration.sample(known, LENGTH, tokens // LENGTH, seed)
            losses = self.losses(gptq.apply(deepcopy(self.model), batches, config))
        grown = losses - self.float_losses
        gained = self.rounding(bits) - losses
        values = (
            losses.mean(),
            grown.mean(),
            standard_error(grown),
            gained.mean(),
            standard_error(gained),
        )
        line = [method, bits, text, tokens, seed]
        line += [f"{float(value):.4f}" for value in values]
        line += [torch.__version__, platform.python_version()]
        return dict(zip(FIELDS, line, strict=True))


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
