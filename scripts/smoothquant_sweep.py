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

from copy import deepcopy

from sweeping import MEASURED, VERSIONS, RealModel, sweep
from torch import Tensor

from llmlab.compression import smoothquant
from llmlab.compression.smoothquant import FILE, NORMS, SmoothQuantConfig

SEAMS = {"none": (), "norms": NORMS, "norms and up": (*NORMS, "mlp.up_proj")}
# inputs, static: the paper's O1, O2 and O3
INPUTS = {
    "O1": ("token", False),
    "O2": ("tensor", False),
    "O3": ("tensor", True),
}

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
    *MEASURED,  # "gained": under the same without smoothing, first draw
    *VERSIONS,
]


class Sweep(RealModel):
    """The model, its texts, and the losses that others are compared with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple, dict] = {}
        self.unsmoothed: dict[tuple, Tensor] = {}

    def statistics(self, text: str, tokens: int, seed: int) -> dict:
        """What entered each linear, collected once for each draw of text."""
        key = (text, tokens, seed)
        if key not in self.seen:
            batches = self.batches(text, tokens, seed)
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

    def run(self, setting, weights, seams, alpha, left_out, *draw) -> list:
        """One line of the file."""
        first = ("addresses", 2048, 0)
        plain = (setting, weights, "none", "", left_out, *first)
        if plain not in self.unsmoothed:
            self.unsmoothed[plain] = self.quantized(*plain)
        losses = self.unsmoothed[plain]
        if seams != "none":
            losses = self.quantized(setting, weights, seams, alpha, left_out, *draw)
        return self.line(
            (setting, weights, seams, alpha, left_out, *draw),
            losses,
            self.unsmoothed[plain],
        )


if __name__ == "__main__":
    sweep(__doc__, FILE, FIELDS, RUNS, lambda: Sweep().run)
