"""LLM-Pruner on the whole real model: llmlab/compression/data/llm_pruner.csv.

    python scripts/llm_pruner_sweep.py            continue, a line a run (seconds each,
                                                  a minute with recovery); Ctrl-C
                                                  loses at most one run
    python scripts/llm_pruner_sweep.py --check 1  run that many lines again and compare

Channels of the MLPs, or key/value heads, leave layers 5 to 28 of
SmolLM2-135M-Instruct. Importance is
measured on 10 texts of 64 tokens, from random places of the addresses. The seed draws
them, and what is random. What is read to judge: the first 1,025 tokens of the held-out
addresses.

Recovery: LoRA of rank 8 on all linears of the blocks, so many steps of 256 tokens of
the addresses. The model that lost nothing is trained likewise, to see what the text
alone gives. The seed draws these texts, too, and the matrices that LoRA starts from.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from sweeping import MEASURED, VERSIONS, RealModel, sweep
from torch import Tensor, nn

from llmlab.compression import calibration, dependencies, llm_pruner
from llmlab.compression.llm_pruner import FILE, PrunerConfig
from llmlab.peft import lora
from llmlab.peft.lora import LoRAConfig

TEXTS = (10, 64)  # how many, and tokens of each
STEPS = 12
SEEDS = (0, 1, 2)
FIELDS = [
    "part",
    "kind",
    "ratio",
    "seed",
    "steps",  # of recovery
    *MEASURED,  # "gained": under "random" of the same seed; by the steps, with recovery
    "parameters",
    *VERSIONS,
]


# part, kind, ratio, seed, steps
RUNS = [
    *[("mlp", "random", "0.2", seed, 0) for seed in SEEDS],
    *[("mlp", "first", "0.2", seed, 0) for seed in (0, 1)],
    ("mlp", "magnitude", "0.2", 0, 0),
    *[("mlp", kind, "0.3", 0, 0) for kind in ("random", "magnitude", "first")],
    *[("mlp", kind, "0.2", 0, 0) for kind in ("mix", "vector")],
    *[("mlp", kind, "0.2", 0, STEPS) for kind in ("first", "random")],
    ("mlp", "first", "0", 0, STEPS),
    # more draws
    *[("mlp", kind, "0.3", seed, 0) for kind in ("random", "first") for seed in (1, 2)],
    *[("mlp", kind, "0.1", seed, 0) for kind in ("random", "first") for seed in (0, 1)],
    ("mlp", "magnitude", "0.1", 0, 0),
    # one of three key/value heads, with the queries that read it
    *[
        ("self_attn", kind, "0.34", s, 0)
        for kind in ("random", "first")
        for s in (0, 1)
    ],
    ("self_attn", "magnitude", "0.34", 0, 0),
    ("mlp", "first", "0.2", 2, 0),
    # recovery, more draws
    *[("mlp", kind, "0.2", s, STEPS) for s in (1, 2) for kind in ("first", "random")],
    *[("mlp", "first", "0", seed, STEPS) for seed in (1, 2)],
]


class Sweep(RealModel):
    """The model, its groups, and what was computed for a seed already."""

    def __init__(self) -> None:
        super().__init__(judged=1024)
        self.groups = dependencies.groups(self.model)
        self.slopes: dict[tuple, dict] = {}
        self.random: dict[tuple, Tensor] = {}

    def importance(self, config: PrunerConfig) -> dict[str, Tensor]:
        """As `llm_pruner.importance`, with the slopes of a seed computed once."""
        if config.kind in ("random", "magnitude"):
            return llm_pruner.importance(self.model, None, config, self.groups)
        chosen = llm_pruner.prunable(self.model, self.groups, config)
        key = config.parts, config.seed
        if key not in self.slopes:
            count, length = TEXTS
            known = self.tokens("addresses", "train", 400_000)
            texts = calibration.sample(known, length, count, config.seed)
            names = [member.name for g in chosen.values() for member in g.members]
            self.slopes[key] = llm_pruner.slopes(self.model, texts, names)
        parameters = dict(self.model.named_parameters())
        return {
            name: llm_pruner.group_importance(
                parameters, self.slopes[key], group, config.kind
            )
            for name, group in chosen.items()
        }

    def pruned(self, config: PrunerConfig) -> nn.Module:
        """A copy of the model without the least important units."""
        if config.ratio == 0:
            return deepcopy(self.model)
        kept = llm_pruner.kept_units(self.importance(config), config.ratio)
        return dependencies.cut(deepcopy(self.model), kept, self.groups)

    def by_chance(self, part: str, ratio: str, seed: int) -> Tensor:
        """The losses without units drawn by chance."""
        key = part, ratio, seed
        if key not in self.random:
            config = PrunerConfig(float(ratio), "random", parts=(part,), seed=seed)
            self.random[key] = self.losses(self.pruned(config))
        return self.random[key]

    def recover(self, model: nn.Module, steps: int, seed: int) -> nn.Module:
        """LoRA on all linears of the blocks, merged."""
        known = self.tokens("addresses", "train", 400_000)
        texts = calibration.sample(known, 257, steps, seed=100 + seed)
        torch.manual_seed(seed)
        model = lora.apply(model, LoRAConfig(r=8, alpha=16, target_modules=LINEARS))
        trained = [p for p in model.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
        for text in texts:
            training_losses(model, text).mean().backward()
            adam.step()
            adam.zero_grad()
        return lora.merge_and_unload(model)

    def run(self, part: str, kind: str, ratio: str, seed: int, steps: int) -> list:
        """One line of the file."""
        config = PrunerConfig(float(ratio), kind, parts=(part,), seed=seed)
        model = self.pruned(config)
        parameters = sum(p.numel() for p in model.parameters())
        if kind == "random" and not steps:
            losses = self.by_chance(part, ratio, seed)
        else:
            losses = self.losses(model)
        reference = losses
        if steps:
            losses = self.losses(self.recover(model, steps, seed))
        else:
            reference = self.by_chance(part, ratio, seed)
        line = self.line((part, kind, ratio, seed, steps), losses, reference)
        place = FIELDS.index("parameters")
        return [*line[:place], parameters, *line[place:]]


LINEARS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)


def training_losses(model: nn.Module, text: Tensor) -> Tensor:
    """Of each token of one text, (1, T)."""
    logits = model(text[:, :-1])[0]
    return nn.functional.cross_entropy(logits, text[0, 1:], reduction="none")


if __name__ == "__main__":
    sweep(__doc__, FILE, FIELDS, RUNS, lambda: Sweep().run)
