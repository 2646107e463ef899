"""One way to call the methods of this part: `llmlab compress` and lesson 15.

A recipe is a method and its numbers, as data. `compress` follows it on a model, which
afterwards holds packed linears (`QuantLinear`) or, after pruning, floats with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor, nn

from llmlab.compression import awq, gptq, walk
from llmlab.compression import magnitude_wanda_sparsegpt as pruning
from llmlab.compression import quantization_basics as qb
from llmlab.compression.magnitude_wanda_sparsegpt import PruneConfig
from llmlab.compression.quantization_basics import QuantConfig, QuantLinear


@dataclass(frozen=True)
class Recipe:
    """A method, and how many bits it leaves."""

    method: str = "gptq"
    bits: int = 4
    group: int | None = 64  # weights that share a scale; None: those of a row
    symmetric: bool = True
    sparsity: float | None = None  # what pruning takes away; or a pattern, as "2:4"
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"method={self.method!r} must be one of {', '.join(METHODS)}"
            )
        # these refuse numbers that make no sense
        if METHODS[self.method].packs:
            grid_of(self)
        else:
            pruning_of(self)

    @property
    def grid(self) -> QuantConfig:
        """The levels that it rounds to."""
        return grid_of(self)


def grid_of(recipe: Recipe) -> QuantConfig:
    """A scale for each group of weights, or for each row."""
    if recipe.group is None:
        return QuantConfig(recipe.bits, symmetric=recipe.symmetric, per="row")
    return QuantConfig(recipe.bits, symmetric=recipe.symmetric, group_size=recipe.group)


def pruning_of(recipe: Recipe) -> PruneConfig:
    """Half of the weights go, where neither a share nor a pattern is given."""
    if recipe.sparsity is None and recipe.pattern is None:
        return PruneConfig(recipe.method, sparsity=0.5)
    return PruneConfig(recipe.method, recipe.sparsity, recipe.pattern)


@dataclass(frozen=True)
class Method:
    """How a recipe is followed: run(model, batches, recipe, progress)."""

    run: Callable[..., nn.Module]
    words: str
    reads_text: bool = True
    packs: bool = True  # else the linears stay floats, with zeros among them


def _round(model, batches, recipe, progress):
    walk.linears(model)  # refuses what cannot be compressed
    return qb.apply(model, recipe.grid)


def _gptq(model, batches, recipe, progress, act_order=False):
    config = gptq.GPTQConfig(recipe.grid, act_order=act_order)
    return gptq.apply(model, batches, config, store=True, progress=progress)


def _awq(model, batches, recipe, progress):
    config = awq.AWQConfig(recipe.grid, trial_batches=2)
    awq.apply(model, batches, config, progress=progress)
    return model


def _prune(model, batches, recipe, progress):
    config = pruning_of(recipe)
    return pruning.apply(model, batches, config, progress=progress)


METHODS = {
    "rtn": Method(_round, "round to nearest", reads_text=False),
    "gptq": Method(_gptq, "later weights make up for the error of each"),
    "gptq-act-order": Method(
        partial(_gptq, act_order=True), "GPTQ, largest inputs first"
    ),
    "awq": Method(_awq, "salient channels are scaled up first"),
    "magnitude": Method(
        _prune, "the smallest weights go", reads_text=False, packs=False
    ),
    "wanda": Method(_prune, "the smallest weight × input go", packs=False),
    "sparsegpt": Method(_prune, "what is left makes up for what has gone", packs=False),
}


def compress(
    model: nn.Module,
    recipe: Recipe,
    batches: Iterable[Int[Tensor, "batch seq"]] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> nn.Module:
    """Follow the recipe, in place.

    Args:
        batches: token ids to calibrate on, where the method reads text.
        progress: called with the blocks that are done, and how many there are.
    Raises:
        ValueError: the method needs text and got none, or as the method; the model is
            then as it was.
    """
    method = METHODS[recipe.method]
    if method.reads_text and batches is None:
        raise ValueError(
            f"batches=None: {recipe.method} calibrates on text, so give it some"
        )
    return method.run(model, batches, recipe, progress)


@torch.no_grad()
def as_floats(model: nn.Module) -> nn.Module:
    """A model that computes the same with decoded weights: faster, and larger.

    What is not packed is shared with `model`.
    """
    dense = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            rows, columns = module.shape
            dense[name] = nn.Linear(columns, rows, device="meta")
            dense[name].weight = nn.Parameter(module.weight, requires_grad=False)
            dense[name].bias = module.bias
    return with_modules(model, dense)


def with_modules(model: nn.Module, modules: dict[str, nn.Module]) -> nn.Module:
    """A shallow copy of the model with other modules in some places."""
    twin = copy(model)
    twin._modules = dict(model._modules)
    for child in model._modules:
        prefix = f"{child}."
        if child in modules:
            twin._modules[child] = modules[child]
            continue
        inside = {
            name.removeprefix(prefix): module
            for name, module in modules.items()
            if name.startswith(prefix)
        }
        if inside:
            twin._modules[child] = with_modules(model._modules[child], inside)
    return twin


def bits_per_weight(model: nn.Module) -> float:
    """Stored bits for each weight of the linears in the blocks, scales included."""
    bits = weights = 0
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            stored = [module.packed, module.scale]
            if module.zero is not None:
                stored.append(module.zero)
            weights += module.shape[0] * module.shape[1]
        elif isinstance(module, nn.Linear) and name != "lm_head":
            stored = [module.weight]
            weights += module.weight.numel()
        else:
            continue
        bits += 8 * sum(t.numel() * t.element_size() for t in stored)
    return bits / weights
