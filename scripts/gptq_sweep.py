"""GPTQ beside rounding, on the whole real model: llmlab/compression/data/gptq.csv.

    python scripts/gptq_sweep.py            continue, a line a run (a minute or more
                                            each); Ctrl-C loses at most one run
    python scripts/gptq_sweep.py --check 1  run that many lines again and compare

All 210 linears of SmolLM2-135M-Instruct, symmetric levels, groups of 64. What is read
to judge: the first 2,049 tokens of the held-out addresses, 256 at a time. What is read
to calibrate: runs of 256 tokens from random places, drawn by the seed.
"""

from __future__ import annotations

from copy import deepcopy

from sweeping import MEASURED, VERSIONS, RealModel, sweep
from torch import Tensor

from llmlab.compression import gptq
from llmlab.compression import quantization_basics as qb
from llmlab.compression.gptq import FILE, GPTQConfig
from llmlab.compression.quantization_basics import QuantConfig

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
    *MEASURED,  # "gained": under rounding with as many bits
    *VERSIONS,
]


class Sweep(RealModel):
    """The model, its texts, and the losses that others are compared with."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded: dict[int, Tensor] = {}

    def rounding(self, bits: int) -> Tensor:
        """The losses of round to nearest, computed once."""
        if bits not in self.rounded:
            grid = QuantConfig(bits, group_size=64)
            self.rounded[bits] = self.losses(
                qb.round_weights(deepcopy(self.model), grid)
            )
        return self.rounded[bits]

    def run(self, method: str, bits: int, text: str, tokens: int, seed: int) -> list:
        """One line of the file."""
        losses = self.rounding(bits)
        if method != "rounding":
            grid = QuantConfig(bits, group_size=64)
            config = GPTQConfig(grid, **CONFIGS[method])
            batches = self.batches(text, tokens, seed)
            losses = self.losses(gptq.apply(deepcopy(self.model), batches, config))
        return self.line(
            (method, bits, text, tokens, seed), losses, self.rounding(bits)
        )


if __name__ == "__main__":
    sweep(__doc__, FILE, FIELDS, RUNS, lambda: Sweep().run)
