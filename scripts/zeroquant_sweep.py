"""ZeroQuant on the whole real model: llmlab/compression/data/zeroquant.csv.

    python scripts/zeroquant_sweep.py            continue, a line a run (about a minute
                                                 with LKD); Ctrl-C loses at most one run
    python scripts/zeroquant_sweep.py --check 2  run that many lines again and compare

All 210 linears of SmolLM2-135M-Instruct. What is read to judge: the first 1,025 tokens
of the held-out addresses, 256 at a time. What is read to distil: eight runs of 256
tokens, drawn by the seed, each read twice. The learning rate is one of four that were
tried on four layers, judged by the first 512 of the same tokens.
"""

from __future__ import annotations

import argparse
import csv
import platform
from copy import deepcopy

import torch
from torch import Tensor

from llmlab.compression import calibration, zeroquant
from llmlab.compression.zeroquant import FILE, LKDConfig, ZeroQuantConfig
from llmlab.models import course_model, generation, language_model, real_model

# weights' bits, what shares a scale, inputs, what enters a layer in LKD, text, seed
RUNS = [
    ("8", "row", "tensor", "", "", 0),
    ("8", "64 per matrix", "token", "", "", 0),
    ("8", "row", "token", "", "", 0),
    ("8", "64 columns", "token", "", "", 0),
    ("4/8", "64 per matrix", "token", "", "", 0),
    ("4/8", "row", "token", "", "", 0),
    ("4/8", "64 columns", "token", "", "", 0),
    ("4", "row", "token", "", "", 0),
    ("4/8", "row", "float", "", "", 0),
    ("4/8", "row", "token", "float", "addresses", 0),
    ("4/8", "row", "token", "quantized", "addresses", 0),
    ("4/8", "row", "token", "float", "random tokens", 0),
    ("4/8", "row", "token", "float", "bible", 0),
    ("4/8", "row", "token", "float", "its own", 0),
    ("4/8", "row", "token", "float", "addresses", 1),
    ("4/8", "64 columns", "token", "float", "addresses", 0),
    ("4/8", "row", "token", "quantized", "addresses", 1),
    ("4/8", "row", "token", "float", "random tokens", 1),
]
BITS = {"8": (8, 8), "4/8": (8, 4), "4": (4, 4)}
SCALES = {
    "64 per matrix": {"group_size": None, "groups": 64},
    "row": {"group_size": None},
    "64 columns": {"group_size": 64},
}
FIELDS = [
    "weights",
    "scales",
    "inputs",
    "lkd",
    "text",
    "seed",
    "loss",  # mean over the judged tokens, in nats
    "grown",  # over the float model
    "grown_error",  # its standard error
    "gained",  # under the same without LKD
    "gained_error",
    "torch",
    "python",
]
KEYS = FIELDS[:6]
LENGTH, COUNT, STEPS = 256, 8, 16


class Sweep:
    """The model, its texts, and the losses that others are compared with."""

    def __init__(self) -> None:
        self.model = real_model.load()
        self.tokenizer = real_model.load_tokenizer()
        self.judged = self.tokens("addresses", "valid", 10_000)[:1025]
        self.float_losses = self.losses(self.model)
        self.rounded: dict[ZeroQuantConfig, Tensor] = {}

    def tokens(self, name: str, split: str, characters: int) -> Tensor:
        """The first so many characters of a text, as token ids."""
        text = course_model.corpus(name, split)[:characters]
        return torch.tensor(self.tokenizer.encode(text).ids)

    def losses(self, model: torch.nn.Module) -> Tensor:
        return language_model.token_losses(model, self.judged, context=LENGTH)

    def without_lkd(self, config: ZeroQuantConfig) -> Tensor:
        """The losses of the same levels, rounded to nearest; computed once."""
        if config not in self.rounded:
            model = zeroquant.apply(deepcopy(self.model), config)
            self.rounded[config] = self.losses(model)
        return self.rounded[config]

    def batches(self, text: str, seed: int) -> list[Tensor]:
        """What is read to distil."""
        vocabulary = self.model.config.vocab_size
        random = torch.Generator().manual_seed(seed)
        if text == "random tokens":
            ids = torch.randint(vocabulary, (COUNT, LENGTH), generator=random)
            return list(ids[:, None])
        if text == "its own":
            first = torch.randint(vocabulary, (COUNT, 1), generator=random)
            ids = generation.generate(
                self.model, first, LENGTH - 1, temperature=1.0, seed=seed
            )
            return list(ids[:, None])
        known = self.tokens(text, "train", 400_000)
        return calibration.sample(known, LENGTH, COUNT, seed)

    def run(
        self, weights: str, scales: str, inputs: str, lkd: str, text: str, seed: int
    ) -> dict:
        """One line of the file."""
        attention_bits, mlp_bits = BITS[weights]
        config = ZeroQuantConfig(
            attention_bits,
            mlp_bits,
            activation_bits=None if inputs == "float" else 8,
            activation_scales="tensor" if inputs == "tensor" else "token",
            **SCALES[scales],
        )
        losses = self.without_lkd(config)
        if lkd:
            how = LKDConfig(steps=STEPS, inputs=lkd)
            with torch.no_grad():
                batches = self.batches(text, seed)
            model = zeroquant.apply(deepcopy(self.model), config, batches, how)
            losses = self.losses(model)
        grown = losses - self.float_losses
        gained = self.without_lkd(config) - losses
        values = (
            losses.mean(),
            grown.mean(),
            standard_error(grown),
            gained.mean(),
            standard_error(gained),
        )
        line = [weights, scales, inputs, lkd, text, seed]
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
    done = {tuple(line[name] for name in KEYS): line for line in there}
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
