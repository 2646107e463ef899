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

from copy import deepcopy

import torch
from sweeping import LENGTH, MEASURED, VERSIONS, RealModel, sweep
from torch import Tensor

from llmlab.compression import zeroquant
from llmlab.compression.zeroquant import FILE, LKDConfig, ZeroQuantConfig
from llmlab.models import generation

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
    *MEASURED,  # "gained": under the same without LKD
    *VERSIONS,
]
COUNT, STEPS = 8, 16


class Sweep(RealModel):
    """The model, its texts, and the losses that others are compared with."""

    def __init__(self) -> None:
        super().__init__(judged=1024)
        self.rounded: dict[ZeroQuantConfig, Tensor] = {}

    def without_lkd(self, config: ZeroQuantConfig) -> Tensor:
        """The losses of the same levels, rounded to nearest; computed once."""
        if config not in self.rounded:
            model = zeroquant.apply(deepcopy(self.model), config)
            self.rounded[config] = self.losses(model)
        return self.rounded[config]

    def texts(self, text: str, seed: int) -> list[Tensor]:
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
        return self.batches(text, COUNT * LENGTH, seed)

    def run(
        self, weights: str, scales: str, inputs: str, lkd: str, text: str, seed: int
    ) -> list:
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
                batches = self.texts(text, seed)
            model = zeroquant.apply(deepcopy(self.model), config, batches, how)
            losses = self.losses(model)
        return self.line(
            (weights, scales, inputs, lkd, text, seed), losses, self.without_lkd(config)
        )


if __name__ == "__main__":
    sweep(__doc__, FILE, FIELDS, RUNS, lambda: Sweep().run)
