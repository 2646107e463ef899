"""LoRAPrune against full gradients, at once and while LoRA trains: data/loraprune.csv.

    python scripts/loraprune_sweep.py            continue, a line a run (up to a minute
                                                 each); Ctrl-C loses at most one run
    python scripts/loraprune_sweep.py --check 1  run that many lines again and compare

"at once": channels of the MLPs of SmolLM2-135M-Instruct are cut, the same share in each
layer but for the first tenth and the last. (Of 3 key/value heads a fifth is none.) What
is read to judge: the first 1,025 tokens of the held-out addresses, 256 at a time. What
is read to score: runs of 256 tokens from random places of the addresses, drawn by the
seed, as are LoRA's A and what is random.

The other times: LoRA of rank 8 on all linears of the course model trains, and the
channels of all its MLPs go meanwhile. It is small enough to train many times. Judged on
the first 4,097 tokens of the held-out addresses, 256 at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from functools import cache

import torch
from sweeping import MEASURED, VERSIONS, RealModel, measured, sweep, versions
from torch import Tensor, nn

from llmlab.compression import calibration, dependencies, loraprune
from llmlab.compression.loraprune import FILE, LoRAPruneConfig
from llmlab.models import course_model, language_model
from llmlab.models.language_model import next_token_loss
from llmlab.peft import lora

TOKENS = 1024  # to judge by
SCORED = 1024  # to score by, where all is cut at once
STEPS = 100  # of training, on BATCH runs of LENGTH tokens each
BATCH, LENGTH = 4, 128
SEEDS = (0, 1, 2)
MLP = ("gate_proj", "up_proj", "down_proj")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", *MLP)

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
        (criterion, when, "0.4" if when != "uncut" else "0", seed)
        for seed in SEEDS
        for criterion, when in (
            ("lora", "at the start"),
            ("lora", "progressive"),
            ("lora", "at the end"),
            ("full", "progressive"),
            ("magnitude", "progressive"),
            ("lora", "uncut"),
        )
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
    # "gained": under full gradients, at once, with the same share and seed; on the
    # course model, under what was cut at the start by LoRA's
    *MEASURED,
    *VERSIONS,
]
CRITERIA = {
    "lora": LoRAPruneConfig(),
    "lora rows": LoRAPruneConfig(columns=False),
    "full": LoRAPruneConfig(criterion="full"),
    "magnitude": LoRAPruneConfig(criterion="magnitude"),
}
# warm-up and cool-down
WHEN = {
    "progressive": (0.1, 0.5),
    "at the start": (0.0, 1.0),
    "at the end": (1.0, 0.0),
    "uncut": (0.1, 0.1),
}


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
        config = lora.LoRAConfig(r=8, alpha=16, target_modules=MLP)
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

    def run(self, criterion: str, when: str, share: str, seed: int) -> list:
        """One line of the file."""
        scores = self.scores(seed, 1 if when == "no average" else 4)
        full = self.scores(seed, 4)["full"]
        agreement = self.agreement(scores[criterion], full, float(share))
        losses = self.cut_at_once(scores[criterion], float(share))
        reference = self.full(share, seed)
        found = measured(losses, self.float_losses, reference)
        return [criterion, when, share, seed, *agreement, *found, *versions()]


class Trained:
    """The course model, with LoRA that trains while channels go."""

    def __init__(self) -> None:
        self.model = course_model.load()
        encode = course_model.load_tokenizer().encode
        seen = course_model.corpus("addresses", "train")[:400_000]
        held_out = course_model.corpus("addresses", "valid")[:40_000]
        self.seen = torch.tensor(encode(seen).ids)
        self.judged = torch.tensor(encode(held_out).ids)[:4097]
        prunable = loraprune.prunable(self.model, first=0, last=0)
        self.groups = {n: g for n, g in prunable.items() if n.endswith("mlp")}
        self.float_losses = self.losses(self.model)
        self.trained = cache(self.trained)

    def losses(self, model: nn.Module) -> Tensor:
        """Of each judged token."""
        return language_model.token_losses(model, self.judged, context=256)

    def trained(self, criterion: str, when: str, share: str, seed: int) -> Tensor:
        """The losses of the model that is left."""
        warmup, cooldown = WHEN[when]
        pruning = LoRAPruneConfig(
            float(share), STEPS, warmup, cooldown, every=1, criterion=criterion
        )
        config = lora.LoRAConfig(r=8, alpha=16, target_modules=LINEARS)
        random = torch.Generator().manual_seed(seed)
        model = lora.apply(deepcopy(self.model), config, generator=random)
        A_and_B = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(A_and_B, lr=2e-3)
        if criterion == "full":
            for adapter in loraprune.adapters(model).values():
                adapter.base.weight.requires_grad_(True)
        runs = calibration.sample(self.seen, LENGTH, BATCH * STEPS, seed)
        batches = torch.cat(runs).split(BATCH)
        if criterion == "full":
            batches = forgetting(model, batches)
        loraprune.apply(model, batches, pruning, self.groups, optimizer)
        return self.losses(model)

    def run(self, criterion: str, when: str, share: str, seed: int) -> list:
        """One line of the file."""
        losses = self.trained(criterion, when, share, seed)
        reference = self.trained("lora", "at the start", "0.4", seed)
        found = measured(losses, self.float_losses, reference)
        return [criterion, when, share, seed, "", "", *found, *versions()]


def forgetting(model: nn.Module, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches; before each, all gradients are gone, those of W₀ too."""
    for batch in batches:
        model.zero_grad()
        yield batch


class Runs:
    """Each kind of run by what it needs, made when it is needed first."""

    def __init__(self) -> None:
        self.at_once: Sweep | None = None
        self.while_training: Trained | None = None

    def run(self, criterion: str, when: str, share: str, seed: int) -> list:
        """One line of the file."""
        if when in WHEN:
            self.while_training = self.while_training or Trained()
            return self.while_training.run(criterion, when, share, seed)
        self.at_once = self.at_once or Sweep()
        return self.at_once.run(criterion, when, share, seed)


if __name__ == "__main__":
    sweep(__doc__, FILE, FIELDS, RUNS, lambda: Runs().run)
