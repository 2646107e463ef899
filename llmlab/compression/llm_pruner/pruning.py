"""Which units stay, and the whole model without the others.

Units of the first and the last layers all stay: what they do, no other layer can make
up for. Of the others, in each layer the same share of channels and of heads goes, those
of least importance; or those of least importance anywhere (`everywhere`).

    n    units of a group
    r    ratio: the share that goes; ⌊n · r⌋ in a group, as r is written
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.compression import calibration, dependencies
from llmlab.compression.dependencies import Group
from llmlab.compression.llm_pruner.importance import (
    AGGREGATES,
    KINDS,
    group_importance,
    slopes,
)

# What scripts/llm_pruner_sweep.py measured on the whole real model, a run a line.
FILE = Path(__file__).parents[1] / "data" / "llm_pruner.csv"
PARTS = ("mlp", "self_attn")


@dataclass(frozen=True)
class PrunerConfig:
    """What is pruned, how much of it, and what counts as important."""

    ratio: float  # of the units of each group
    kind: str = "first"  # or "random"
    aggregate: str = "sum"
    parts: tuple[str, ...] = PARTS  # last names of the groups that are pruned
    keep_first: int = 4  # layers that stay whole, as in the paper's LLaMA-7B
    keep_last: int = 2
    everywhere: bool = False  # units of all layers are compared with each other
    seed: int = 0  # of "random"

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio={self.ratio} must be at least 0 and below 1")
        if self.kind not in (*KINDS, "random"):
            raise ValueError(f"kind={self.kind!r} must be one of {(*KINDS, 'random')}")
        if self.aggregate not in AGGREGATES:
            raise ValueError(
                f"aggregate={self.aggregate!r} must be one of {AGGREGATES}"
            )
        if not self.parts or set(self.parts) - set(PARTS):
            raise ValueError(f"parts={self.parts} must be one or both of {PARTS}")
        for name in ("keep_first", "keep_last"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")


def kept_count(n: int, ratio: float) -> int:
    """n − ⌊n · r⌋, with r as it is written: at least one stays."""
    return n - math.floor(n * Fraction(str(ratio)))


def kept_units(
    scores: Mapping[str, Float[Tensor, "units"]], ratio: float, everywhere: bool = False
) -> dict[str, Int[Tensor, "kept"]]:
    """The units to keep, by group: of equal scores the first go.

    Args:
        everywhere: units are compared across groups of one part (channels with
            channels, heads with heads); the best unit of a group stays in any case.
    """
    if not everywhere:
        return {name: best(s, kept_count(len(s), ratio)) for name, s in scores.items()}
    kept = {}
    for part in PARTS:
        names = [name for name in scores if name.rpartition(".")[2] == part]
        if not names:
            continue
        lifted = []
        for name in names:
            its = scores[name].clone()
            its[its.argmax()] = torch.inf  # no group becomes empty
            lifted.append(its)
        every = torch.cat(lifted)
        stays = torch.zeros(len(every), dtype=torch.bool)
        stays[best(every, kept_count(len(every), ratio))] = True
        for name, its in zip(names, stays.split([len(x) for x in lifted]), strict=True):
            kept[name] = its.nonzero().flatten()
    return {name: kept[name] for name in scores}


def best(scores: Float[Tensor, "n"], count: int) -> Int[Tensor, "count"]:
    """Where the `count` largest are, in order; of equal ones the last."""
    order = scores.argsort(stable=True)
    return order[len(scores) - count :].sort().values


def prunable(
    model: nn.Module, known: Mapping[str, Group], config: PrunerConfig
) -> dict[str, Group]:
    """The groups that a config prunes.

    Raises:
        ValueError: there is none.
    """
    layers = list(calibration.blocks(model))
    inner = layers[config.keep_first : len(layers) - config.keep_last]
    wanted = {f"{layer}.{part}" for layer in inner for part in config.parts}
    found = {name: group for name, group in known.items() if name in wanted}
    if not found:
        raise ValueError(
            f"keep_first={config.keep_first} and keep_last={config.keep_last} leave"
            f" nothing to prune of {len(layers)} layers, for parts={config.parts}"
        )
    return found


def importance(
    model: nn.Module,
    batches: Iterable[Int[Tensor, "batch seq"]] | None,
    config: PrunerConfig,
    known: Mapping[str, Group] | None = None,
) -> dict[str, Float[Tensor, "units"]]:
    """What each unit that a config prunes is worth, by group; nothing is changed.

    Args:
        batches: texts, token ids (batch, seq); None does for "magnitude" and "random".
        known: the model's groups, where they were found already.
    Raises:
        ValueError: as `apply`.
    """
    known = dependencies.groups(model) if known is None else known
    chosen = prunable(model, known, config)
    if config.kind == "random":
        random = torch.Generator().manual_seed(config.seed)
        return {n: torch.rand(g.units, generator=random) for n, g in chosen.items()}
    found = {}
    if config.kind != "magnitude":
        if batches is None:
            raise ValueError(f"batches=None: kind={config.kind!r} needs texts")
        names = [member.name for g in chosen.values() for member in g.members]
        found = slopes(model, batches, names)
    parameters = dict(model.named_parameters())
    return {
        name: group_importance(parameters, found, group, config.kind, config.aggregate)
        for name, group in chosen.items()
    }


def apply(
    model: nn.Module,
    batches: Iterable[Int[Tensor, "batch seq"]] | None,
    config: PrunerConfig,
) -> nn.Module:
    """The least important units leave the model, in place: its weights are shorter.

    Args:
        batches: texts, token ids (batch, seq); None does for "magnitude" and "random".
    Raises:
        ValueError: bad text; adapters, or weights that are quantised or not finite;
            nothing to prune. The model is then as it was.
    """
    known = dependencies.groups(model)
    scores = importance(model, batches, config, known)
    kept = kept_units(scores, config.ratio, config.everywhere)
    return dependencies.cut(model, kept, known)
