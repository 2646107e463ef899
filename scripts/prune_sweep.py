"""Magnitude, Wanda and SparseGPT on the whole real model: data/prune.csv.

    python scripts/prune_sweep.py            continue, a line a run (up to a minute
                                             each); Ctrl-C loses at most one run
    python scripts/prune_sweep.py --check 1  run that many lines again and compare

All 210 linears of SmolLM2-135M-Instruct lose the same share. What is read to judge: the
first 1,025 tokens of the held-out addresses, 256 at a time. What is read to calibrate:
runs of 256 tokens from random places of a text, drawn by the seed.
"""

from __future__ import annotations

from copy import deepcopy

from sweeping import MEASURED, VERSIONS, RealModel, sweep
from torch import Tensor

from llmlab.compression import magnitude_wanda_sparsegpt as pruning
from llmlab.compression.magnitude_wanda_sparsegpt import FILE, PruneConfig

TOKENS = 1024  # to calibrate on, and to judge by

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
    *MEASURED,  # "gained": under magnitude with the same amount, whole matrix
    *VERSIONS,
]


class Sweep(RealModel):
    """The model, its texts, and the losses that others are compared with."""

    def __init__(self) -> None:
        super().__init__(judged=TOKENS)
        self.by_magnitude: dict[str, Tensor] = {}

    def pruned(self, config: PruneConfig, text: str = "", seed: int = 0) -> Tensor:
        """The losses of the pruned model."""
        batches = None
        if text:
            batches = self.batches(text, TOKENS, seed)
        return self.losses(pruning.apply(deepcopy(self.model), batches, config))

    def magnitude(self, amount: str) -> Tensor:
        """The losses after magnitude pruning, computed once."""
        if amount not in self.by_magnitude:
            config = config_of("magnitude", "", amount)
            self.by_magnitude[amount] = self.pruned(config)
        return self.by_magnitude[amount]

    def run(self, method: str, per: str, amount: str, text: str, seed: int) -> list:
        """One line of the file."""
        reference = self.magnitude(amount)
        losses = reference
        if (method, per) not in (("magnitude", "matrix"), ("magnitude", "")):
            losses = self.pruned(config_of(method, per, amount), text, seed)
        return self.line((method, per, amount, text, seed), losses, reference)


def config_of(method: str, per: str, amount: str) -> PruneConfig:
    """What a line of the file says."""
    if ":" in amount:
        return PruneConfig(method, pattern=amount)
    return PruneConfig(method, sparsity=float(amount), per=per or None)


if __name__ == "__main__":
    sweep(__doc__, FILE, FIELDS, RUNS, lambda: Sweep().run)
