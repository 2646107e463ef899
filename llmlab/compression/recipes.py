"""One way to call the methods of this part: `llmlab compress` and lesson 15.

A recipe is a method and its numbers, as data. `compress` follows it on a model. What it
then holds, and what becomes of it on disk, depends on the method (`Method.stores`):

    packed     linears of codes, `QuantLinear`: a folder that other libraries open
    floats     after pruning, zeros among the weights: an ordinary folder
    own        8-bit linears that multiply integers: a folder that only we open
    memory     codes as well, but without a folder: to measure what the method is worth
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn

from llmlab.compression import (
    awq,
    gptq,
    llm_int8,
    low_rank,
    peqa_and_qlora,
    smoothquant,
    walk,
    zeroquant,
)
from llmlab.compression import magnitude_wanda_sparsegpt as pruning
from llmlab.compression import quantization_basics as qb
from llmlab.compression.low_rank import MXFP4, NVFP4, LowRankConfig
from llmlab.compression.magnitude_wanda_sparsegpt import PruneConfig
from llmlab.compression.peqa_and_qlora import PEQAConfig
from llmlab.compression.quantization_basics import QuantConfig, QuantLinear
from llmlab.compression.smoothquant import SmoothQuantConfig
from llmlab.compression.zeroquant import ZeroQuantConfig


@dataclass(frozen=True)
class Recipe:
    """A method, and how many bits it leaves."""

    method: str = "gptq"
    bits: int | None = None  # of a weight's code; None: what the method is known for
    # Weights that share a scale, where the method leaves that open; None: those of a
    # row.
    group: int | None = 64
    symmetric: bool = True
    sparsity: float | None = None  # what pruning takes away; or a pattern, as "2:4"
    pattern: str | None = None
    rank: int = 8  # read by lorc

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"method={self.method!r} must be one of {', '.join(METHODS)}"
            )
        method = METHODS[self.method]
        if self.bits is None:
            object.__setattr__(self, "bits", method.bits)
        if method.fixed and self.bits != method.bits:
            raise ValueError(f"bits={self.bits} must be {method.bits} in {self.method}")
        # these refuse numbers that make no sense
        if method.stores == "floats":
            pruning_of(self)
        elif self.method == "lorc":
            lorc_of(self)
        else:
            grid_of(self)

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


def lorc_of(recipe: Recipe) -> LowRankConfig:
    """Integers, and factors that are the best for the outputs."""
    return LowRankConfig(grid_of(recipe), recipe.rank, aware=True)


def zeroquant_of(recipe: Recipe) -> ZeroQuantConfig:
    """The feed-forward weights get `bits`, those of the attention and inputs 8."""
    return ZeroQuantConfig(mlp_bits=recipe.bits, group_size=recipe.group)


@dataclass(frozen=True)
class Method:
    """How a recipe is followed: run(model, batches, recipe, progress)."""

    run: Callable[..., nn.Module]
    words: str
    reads_text: bool = True
    stores: str = "packed"  # or floats, own, memory: see the top of this file
    bits: int = 4
    fixed: bool = False  # no other bits, and no choice of the group

    @property
    def packs(self) -> bool:
        """Whether its linears become `QuantLinear`."""
        return self.stores == "packed"


def _round(model, batches, recipe, progress):
    walk.linears(model)  # refuses what cannot be compressed
    return qb.apply(model, recipe.grid)


def _gptq(model, batches, recipe, progress, act_order=False):
    config = gptq.GPTQConfig(recipe.grid, act_order=act_order)
    return gptq.apply(model, batches, config, store=True, progress=progress)


def _peqa(model, batches, recipe, progress):
    """Round to nearest, then a step of training for each batch.

    What trains afterwards is what did before, but for the weights that are codes now.
    """
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    floats = walk.linears(model)
    config = PEQAConfig(recipe.grid)
    try:
        peqa_and_qlora.apply(model, config)
        peqa_and_qlora.fit(model, batches, progress=progress)
        peqa_and_qlora.store(model)
    except BaseException:
        walk.put_modules(model, floats)
        raise
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
    return model


def _awq(model, batches, recipe, progress):
    config = awq.AWQConfig(recipe.grid, trial_batches=2)
    awq.apply(model, batches, config, progress=progress)
    return model


def _prune(model, batches, recipe, progress):
    config = pruning_of(recipe)
    return pruning.apply(model, batches, config, progress=progress)


EMBEDDING = "model.embed_tokens"
# The paper's O1, but with a scale for each row of a weight: as cheap, and closer.
W8A8 = SmoothQuantConfig(weights="channel")


def _smoothquant(model, batches, recipe, progress):
    return smoothquant.apply(model, batches, W8A8)


def _llm_int8(model, batches, recipe, progress):
    return llm_int8.apply(model)


def _zeroquant(model, batches, recipe, progress):
    return zeroquant.apply(model, zeroquant_of(recipe), batches)


def _lorc(model, batches, recipe, progress):
    return low_rank.apply(model, lorc_of(recipe), batches, store=True)


def _block_floats(model, batches, recipe, progress, kind):
    return low_rank.apply(model, LowRankConfig(kind, rank=0), store=True)


METHODS = {
    "rtn": Method(_round, "round to nearest", reads_text=False),
    "gptq": Method(_gptq, "later weights make up for the error of each"),
    "gptq-act-order": Method(
        partial(_gptq, act_order=True), "GPTQ, largest inputs first"
    ),
    "awq": Method(_awq, "salient channels are scaled up first"),
    "peqa": Method(_peqa, "rounded; then the scales learn to predict the text"),
    "magnitude": Method(
        _prune, "the smallest weights go", reads_text=False, stores="floats"
    ),
    "wanda": Method(_prune, "the smallest weight × input go", stores="floats"),
    "sparsegpt": Method(
        _prune, "what is left makes up for what has gone", stores="floats"
    ),
    "smoothquant": Method(
        _smoothquant,
        "outliers move to the weights; products of integers",
        stores="own",
        bits=8,
        fixed=True,
    ),
    "llm-int8": Method(
        _llm_int8,
        "products of integers, but for outlier columns",
        reads_text=False,
        stores="memory",
        bits=8,
        fixed=True,
    ),
    "zeroquant": Method(
        _zeroquant,
        "MLP in few bits, all else in 8; products of integers",
        reads_text=False,
        stores="memory",
    ),
    "zeroquant-lkd": Method(
        _zeroquant, "the same, each layer distilled", stores="memory"
    ),
    "lorc": Method(_lorc, "few bits, and a repair of low rank", stores="memory"),
    "mxfp4": Method(
        partial(_block_floats, kind=MXFP4),
        "floats of 4 bits, a power of two for 32",
        reads_text=False,
        stores="memory",
        fixed=True,
    ),
    "nvfp4": Method(
        partial(_block_floats, kind=NVFP4),
        "floats of 4 bits, an 8-bit float for 16",
        reads_text=False,
        stores="memory",
        fixed=True,
    ),
}


def compress(
    model: nn.Module,
    recipe: Recipe,
    batches: Iterable[Int[Tensor, "batch seq"]] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> nn.Module:
    """Follow the recipe, in place.

    Args:
        batches: token ids to calibrate on; a method that reads no text ignores them.
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
    # ZeroQuant with text would distil, which is another method
    text = batches if method.reads_text else None
    return method.run(model, text, recipe, progress)


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
    for stored, shape in stored_linears(model).values():
        weights += shape[0] * shape[1]
        bits += 8 * sum(t.numel() * t.element_size() for t in stored)
    return bits / weights


def stored_linears(
    model: nn.Module,
) -> dict[str, tuple[list[Tensor], tuple[int, int]]]:
    """What each linear of the blocks stores, its bias left out, and its shape."""
    found = {}
    for name, module in model.named_modules():
        # what a compressed linear is made of, and what is no linear of a block
        inside = any(name.startswith(f"{outer}.") for outer in (*found, EMBEDDING))
        if inside or name in ("lm_head", EMBEDDING):
            continue
        if getattr(module, "is_compressed", False):
            tensors = module.state_dict()
            tensors.pop("bias", None)
            found[name] = (list(tensors.values()), shape_of(module))
        elif isinstance(module, nn.Linear):
            found[name] = ([module.weight], tuple(module.weight.shape))
    return found


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a compressed linear, without decoding its weight where that can be
    read off.
    """
    if hasattr(module, "shape"):
        return tuple(module.shape[:2])
    codes = getattr(module, "codes", None)
    if codes is not None:
        return tuple(codes.shape)
    base = getattr(module, "base", None)
    return tuple(module.weight.shape) if base is None else shape_of(base)


# On disk ------------------------------------------------------------------------------


def save_own(model: nn.Module, folder: str | Path, dtype: torch.dtype) -> None:
    """The folder of a method that `stores="own"`: floats are written in `dtype`.

    Raises:
        ValueError: as `smoothquant.save`.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    smoothquant.save(model, folder, W8A8)


def load_own(model: nn.Module, folder: str | Path) -> nn.Module:
    """A float model of the same sizes becomes the one that `save_own` wrote."""
    return smoothquant.load(model, folder)
