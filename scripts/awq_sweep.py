"""AWQ beside rounding, on the whole real model: llmlab/compression/data/awq.csv.

    python scripts/awq_sweep.py            continue, a line a run (two minutes or more
                                           for AWQ); Ctrl-C loses at most one run
    python scripts/awq_sweep.py --check 1  run that many lines again and compare

All 210 linears of SmolLM2-135M-Instruct, symmetric levels, groups of 64.
What is read to judge, and to calibrate, is what scripts/gptq_sweep.py reads: the first
2,049 tokens of the held-out addresses, 256 at a time; and 8 runs of 256 tokens from
random places, drawn by the seed. AWQ's trials are judged by the first of the 8, in 3
bits by the first two. GPTQ is there with the largest inputs first, as its best stored
run has it.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from sweeping import MEASURED, VERSIONS, RealModel, sweep
from torch import Tensor, nn

from llmlab.compression import awq, calibration, gptq, walk
from llmlab.compression import quantization_basics as qb
from llmlab.compression.awq import FILE, AWQConfig
from llmlab.compression.gptq import GPTQConfig
from llmlab.compression.quantization_basics import QuantConfig

# method, bits, scales, calibration text, tokens, seed
RUNS = [
    ("rounding", 4, "group", "", 0, 0),
    ("1% by x", 4, "group", "addresses", 2048, 0),
    ("1% random", 4, "group", "", 0, 0),
    ("AWQ", 4, "group", "addresses", 2048, 0),
    ("AWQ", 4, "group", "bible", 2048, 0),
    ("GPTQ", 4, "group", "addresses", 2048, 0),
    ("GPTQ", 4, "group", "bible", 2048, 0),
    ("1% by w", 4, "group", "", 0, 0),
    ("1% by x", 4, "group", "addresses", 2048, 1),
    ("1% random", 4, "group", "", 0, 1),
    ("AWQ", 4, "group", "addresses", 2048, 1),
    ("AWQ", 4, "group", "bible", 2048, 1),
    ("rounding", 3, "group", "", 0, 0),
    ("1% by x", 3, "group", "addresses", 2048, 0),
    ("1% by w", 3, "group", "", 0, 0),
    ("1% random", 3, "group", "", 0, 0),
    ("1% by x", 3, "group", "addresses", 2048, 1),
    ("1% random", 3, "group", "", 0, 1),
    ("AWQ", 3, "group", "addresses", 2048, 0),
]
SHARE = 0.01
TRIAL_BATCHES = {3: 2, 4: 1}  # that judge, by bits
FIELDS = [
    "method",
    "bits",
    "per",
    "text",
    "tokens",
    "seed",
    *MEASURED,  # "gained": under rounding with as many bits and the same scales
    *VERSIONS,
]


class Sweep(RealModel):
    """The model, its texts, and the losses that others are compared with."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded: dict[QuantConfig, Tensor] = {}

    def rounding(self, grid: QuantConfig) -> Tensor:
        """The losses of round to nearest, computed once."""
        if grid not in self.rounded:
            model = qb.round_weights(deepcopy(self.model), grid)
            self.rounded[grid] = self.losses(model)
        return self.rounded[grid]

    def protected(
        self, how: str, grid: QuantConfig, text: str, tokens: int, seed: int
    ) -> nn.Module:
        """1% of the columns of each linear stay as they are."""
        model = deepcopy(self.model)
        linears = walk.linears(model)
        seen = {}
        if how == "by x":
            batches = self.batches(text, tokens, seed)
            seen = calibration.inputs(model, linears, batches, gram=False)
        random = torch.Generator().manual_seed(seed)
        weights = {}
        for name, linear in linears.items():
            W = linear.weight.detach()
            sizes = {
                "by x": lambda name=name: seen[name].absmean,
                "by w": lambda W=W: W.square().sum(0),
                "random": lambda W=W: torch.rand(W.shape[1], generator=random),
            }
            kept = awq.salient(sizes[how](), SHARE)
            weights[name] = awq.protect(W, kept, grid)
        return walk.put_weights(model, weights)

    def run(
        self, method: str, bits: int, per: str, text: str, tokens: int, seed: int
    ) -> list:
        """One line of the file."""
        grid = QuantConfig(bits, per=per, group_size=64)
        losses = self.rounding(grid)
        if method.startswith("1%"):
            how = method.removeprefix("1% ")
            losses = self.losses(self.protected(how, grid, text, tokens, seed))
        elif method == "AWQ":
            config = AWQConfig(grid, trial_batches=TRIAL_BATCHES[bits])
            model = deepcopy(self.model)
            batches = self.batches(text, tokens, seed)
            awq.apply(model, batches, config, floats=True)
            losses = self.losses(model)
        elif method == "GPTQ":
            config = GPTQConfig(grid, act_order=True)
            batches = self.batches(text, tokens, seed)
            losses = self.losses(gptq.apply(deepcopy(self.model), batches, config))
        return self.line(
            (method, bits, per, text, tokens, seed), losses, self.rounding(grid)
        )


if __name__ == "__main__":
    sweep(__doc__, FILE, FIELDS, RUNS, lambda: Sweep().run)
