"""W8A8 with and without SmoothQuant, on the whole real model:
llmlab/compression/data/smoothquant.csv.

    python scripts/smoothquant_sweep.py            continue, a line a run (10 to 20
                                                   seconds each); Ctrl-C loses one run
    python scripts/smoothquant_sweep.py --check 1  run that many lines again and compare

All 210 linears of SmolLM2-135M-Instruct, but for those in `left_out`. What is read to
judge: the first 2,049 tokens of the held-out addresses, 256 at a time. What is read to
calibrate: runs of 256 tokens from random places, drawn by the seed.
"""

from __future__ import annotations

import argparse
import csv
import platform
from copy import deepcopy

import torch
from torch import Tensor

from llmlab.compression import calibration, smoothquant
from llmlab.compression.smoothquant import FILE, NORMS, SmoothQuantConfig
from llmlab.models import course_model, language_model, real_model

SEAMS = {"none": (), "norms": NORMS, "norms and up": (*NORMS, "mlp.up_proj")}
# inputs, static: the paper's O1, O2 and O3
INPUTS = {
    "O1": ("token", False),
    "O2": ("tensor", False),
    "O3": ("tensor", True),
}
LENGTH = 256

# setting, weights, seams, alpha, left out, calibration text, tokens, seed
RUNS = []
for weights in ("tensor", "channel"):
    for setting in INPUTS:
        for seams in SEAMS:
            alpha = "" if seams == "none" else 0.5
            RUNS.append((setting, weights, seams, alpha, "", "addresses", 2048, 0))
for left_out in ("down_proj", "o_proj down_proj"):
    for seams in ("none", "norms"):
        alpha = "" if seams == "none" else 0.5
        RUNS.append(("O2", "tensor", seams, alpha, left_out, "addresses", 2048, 0))
for weights, seams in (
    ("tensor", "norms"),
    ("tensor", "norms and up"),
    ("channel", "norms and up"),
):
    for alpha in (0.0, 0.25, 0.7, 0.85, 1.0):
        RUNS.append(("O2", weights, seams, alpha, "", "addresses", 2048, 0))
for weights, seams in (("channel", "norms"), ("channel", "norms and up")):
    for setting in INPUTS:
        run = (setting, weights, seams, 0.85, "", "addresses", 2048, 0)
        if run not in RUNS:
            RUNS.append(run)
for text, tokens in (("addresses", 2048), ("bible", 2048), ("addresses", 256)):
    for seed in (0, 1, 2):
        run = ("O3", "channel", "norms and up", 0.85, "", text, tokens, seed)
        if run not in RUNS:
            RUNS.append(run)
FIELDS = [
    "setting",
    "weights",
    "seams",
    "alpha",
    "left_out",
    "text",
    "tokens",
    "seed",
    "loss",  # mean over the judged tokens, in nats
    "grown",  # over the float model
    "grown_error",  # its standard error
    "gained",  # under the same without smoothing, calibrated on the first draw
    "gained_error",
    "torch",
    "python",
]
KEYS = FIELDS[:8]


class Sweep:
    """The model, its texts, and the losses that others are compared with."""

    def __init__(self) -> None:
        self.model = real_model.load()
        self.tokenizer = real_model.load_tokenizer()
        self.judged = self.tokens("addresses", "valid", 20_000)[:2049]
        self.float_losses = self.losses(self.model)
        self.seen: dict[tuple, dict] = {}
        self.unsmoothed: dict[tuple, Tensor] = {}

    def tokens(self, name: str, split: str, characters: int) -> Tensor:
        """The first so many characters of a text, as token ids."""
        text = course_model.corpus(name, split)[:characters]
        return torch.tensor(self.tokenizer.encode(text).ids)

    def losses(self, model: torch.nn.Module) -> Tensor:
        return language_model.token_losses(model, self.judged, context=LENGTH)

    def statistics(self, text: str, tokens: int, seed: int) -> dict:
        """What entered each linear, collected once for each draw of text."""
        key = (text, tokens, seed)
        if key not in self.seen:
            known = self.tokens(text, "train", 400_000)
            batches = calibration.sample(known, LENGTH, tokens // LENGTH, seed)
            self.seen[key] = smoothquant.statistics(self.model, batches)
        return self.seen[key]

    def quantized(self, setting, weights, seams, alpha, left_out, *draw) -> Tensor:
        """The losses of one setting."""
        inputs, static = INPUTS[setting]
        alpha = None if alpha == "" else alpha
        config = SmoothQuantConfig(alpha, weights, inputs, static, SEAMS[seams])
        skip = ("lm_head", *left_out.split())
        seen = self.statistics(*draw)
        model = smoothquant.quantize(deepcopy(self.model), seen, config, skip)
        return self.losses(model)

    def run(self, setting, weights, seams, alpha, left_out, *draw) -> dict:
        """One line of the file."""
        first = ("addresses", 2048, 0)
        plain = (setting, weights, "none", "", left_out, *first)
        if plain not in self.unsmoothed:
            self.unsmoothed[plain] = self.quantized(*plain)
        losses = self.unsmoothed[plain]
        if seams != "none":
            losses = self.quantized(setting, weights, seams, alpha, left_out, *draw)
        grown = losses - self.float_losses
        gained = self.unsmoothed[plain] - losses
        values = (
            losses.mean(),
            grown.mean(),
            standard_error(grown),
            gained.mean(),
            standard_error(gained),
        )
        line = [setting, weights, seams, alpha, left_out, *draw]
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
