"""LoRAPrune on the whole real model, against full gradients: data/loraprune.csv.

    python scripts/loraprune_sweep.py            continue, a line a run (up to a minute
                                                 each); Ctrl-C loses at most one run
    python scripts/loraprune_sweep.py --check 1  run that many lines again and compare

Channels of the MLPs of SmolLM2-135M-Instruct are cut, the same share in each layer but
for the first tenth and the last. (Of 3 key/value heads a fifth is none.) What is read
to judge: the first 1,025 tokens of the held-out addresses, 256 at a time. What is read
to score and to train: runs of 256 tokens from random places of the addresses, drawn by
the seed, as are LoRA's A and what is random.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import torch
from sweeping import MEASURED, VERSIONS, RealModel, measured, sweep, versions
from torch import Tensor, nn

from llmlab.compression import dependencies, loraprune
from llmlab.compression.loraprune import FILE, LoRAPruneConfig
from llmlab.models.language_model import next_token_loss
from llmlab.peft import lora

TOKENS = 1024  # to judge by
SCORED = 1024  # to score by, where all is cut at once
STEPS = 16
SEEDS = (0, 1, 2)

# criterion, when, share, seed
RUNS = [
    *[
        (criterion, "at once", share, seed)
        for share in ("0.2", "0.1")
        for criterion in ("full", "lora", "lora rows", "random", "magnitude")
        for seed in (SEEDS if criterion != "magnitude" else (0,))
    ],
    *[(name, "no average", "0.2", seed) for name in ("full", "lora") for seed in SEEDS],
    *[
        ("lora", when, "0.2", seed)
        for seed in SEEDS
        for when in ("progressive", "at the start", "at the end")
    ],
]
FIELDS = [
    "criterion",
    "when",
    "share",
    "seed",
    # with full gradients, over the same text: rank correlation of all channels of a
    # layer, and of those that go the share in common; the mean over the layers
    "correlation",
    "overlap",
    *MEASURED,  # "gained": under full gradients, at once, with the same share and seed
    *VERSIONS,
]
CRITERIA = {
    "lora": LoRAPruneConfig(),
    "lora rows": LoRAPruneConfig(columns=False),
    "full": LoRAPruneConfig(criterion="full"),
    "magnitude": LoRAPruneConfig(criterion="magnitude"),
}
WHEN = {"progressive": (0.1, 0.5), "at the start": (0.0, 1.0), "at the end": (1.0, 0.0)}


class Sweep(RealModel):
    """The model, its groups, and the scores that several runs share."""

    def __init__(self) -> None:
        super().__init__(judged=TOKENS)
        prunable = loraprune.prunable(self.model)
        self.groups = {n: g for n, g in prunable.items() if n.endswith("mlp")}
        self.scores = cache(self.scores)
        self.full = cache(self.full)

    def with_lora(self, seed: int) -> nn.Module:
        """A copy of the model that LoRA's A and B are on."""
        config = lora.LoRAConfig(
            r=8, alpha=16, target_modules=("gate_proj", "up_proj", "down_proj")
        )
        random = torch.Generator().manual_seed(seed)
        return lora.apply(deepcopy(self.model), config, generator=random)

    def scores(self, seed: int, batches: int) -> dict[str, dict[str, Tensor]]:
        """By criterion: the sum of each group's importance over some batches."""
        model = self.with_lora(seed)
        adapted = loraprune.adapters(model)
        for adapter in adapted.values():
            adapter.base.weight.requires_grad_(True)
        total = {name: {} for name in CRITERIA}
        for batch in self.batches("addresses", SCORED, seed)[:batches]:
            model.zero_grad()
            next_token_loss(model(batch), batch).backward()
            for name, config in CRITERIA.items():
                for group in self.groups.values():
                    with torch.no_grad():
                        new = loraprune.importance(adapted, group, config)
                    total[name][group.name] = total[name].get(group.name, 0) + new
        random = torch.Generator().manual_seed(seed)
        total["random"] = {
            name: torch.rand(group.units, generator=random)
            for name, group in self.groups.items()
        }
        return total

    def agreement(
        self, a: dict[str, Tensor], b: dict[str, Tensor], share: float
    ) -> list[str]:
        """Rank correlation and overlap, the means over the groups."""
        pairs = [(a[name], b[name]) for name in self.groups]
        correlation = [loraprune.rank_correlation(*pair) for pair in pairs]
        count = loraprune.units_pruned(len(pairs[0][0]), share)
        common = [loraprune.overlap(*pair, count) for pair in pairs]
        return [f"{sum(each) / len(each):.3f}" for each in (correlation, common)]

    def cut_at_once(self, scores: dict[str, Tensor], share: float) -> Tensor:
        """The losses of the model without the lowest."""
        kept = {}
        for name, group in self.groups.items():
            count = loraprune.units_pruned(group.units, share)
            kept[name] = scores[name].argsort(stable=True)[count:]
        small = dependencies.cut(deepcopy(self.model), kept, self.groups)
        return self.losses(small)

    def full(self, share: str, seed: int) -> Tensor:
        """What others are compared with."""
        return self.cut_at_once(self.scores(seed, 4)["full"], float(share))

    def trained(self, when: str, share: float, seed: int) -> tuple[list[str], Tensor]:
        """LoRA trains for STEPS steps, and the channels go meanwhile."""
        warmup, cooldown = WHEN[when]
        config = LoRAPruneConfig(share, STEPS, warmup, cooldown, every=1)
        model = self.with_lora(seed)
        A_and_B = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(A_and_B, lr=5e-4)
        pruner = loraprune.Pruner(model, self.groups, config)
        full = None
        if when == "at the end":
            for adapter in pruner.adapted.values():
                adapter.base.weight.requires_grad_(True)
            judge = LoRAPruneConfig(0.0, STEPS, criterion="full")
            full = loraprune.Pruner(model, self.groups, judge)
        for batch in self.batches("addresses", 256 * STEPS, seed + 100):
            model.zero_grad()
            next_token_loss(model(batch), batch).backward()
            pruner.step()
            if full is not None:
                full.step()
            optimizer.step()
        agreement = ["", ""]
        if full is not None:
            agreement = self.agreement(pruner.average, full.average, share)
        pruner.remove()
        loraprune.finish(model, self.groups, pruner.kept)
        return agreement, self.losses(model)

    def run(self, criterion: str, when: str, share: str, seed: int) -> list:
        """One line of the file."""
        if when in WHEN:
            agreement, losses = self.trained(when, float(share), seed)
        else:
            scores = self.scores(seed, 1 if when == "no average" else 4)
            full = self.scores(seed, 4)["full"]
            agreement = self.agreement(scores[criterion], full, float(share))
            losses = self.cut_at_once(scores[criterion], float(share))
        reference = self.full(share, seed)
        found = measured(losses, self.float_losses, reference)
        return [criterion, when, share, seed, *agreement, *found, *versions()]


if __name__ == "__main__":
    sweep(__doc__, FILE, FIELDS, RUNS, lambda: Sweep().run)
