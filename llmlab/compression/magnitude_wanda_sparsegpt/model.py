"""Prune all linears of a model, and keep their zeros when training goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llmlab.compression import calibration, walk
from llmlab.compression.calibration import InputStatistics
from llmlab.compression.magnitude_wanda_sparsegpt.config import PruneConfig, n_and_m
from llmlab.compression.magnitude_wanda_sparsegpt.masks import (
    from_each_row,
    from_matrix,
    n_of_m,
    wanda_scores,
)
from llmlab.compression.magnitude_wanda_sparsegpt.sparsegpt import sparsegpt

# What scripts/prune_sweep.py measured on the whole real model, a run a line.
FILE = Path(__file__).parents[1] / "data" / "prune.csv"


def keep_mask(
    W: Float[Tensor, "out in"],
    norm: Float[Tensor, "in"] | None,
    config: PruneConfig,
) -> Bool[Tensor, "out in"]:
    """M of magnitude and of Wanda: True where a weight is kept.

    Args:
        norm: ‖X_j‖₂ of each input channel; only Wanda reads it.
    Raises:
        ValueError: Wanda is not given one norm for each channel, or M does not divide
            the columns.
    """
    if config.method == "magnitude":
        scores = W.abs()
    else:
        if norm is None:
            raise ValueError("norm=None: Wanda needs the norm of each input channel")
        if norm.shape != W.shape[1:]:
            raise ValueError(
                f"norm has shape {tuple(norm.shape)}; for W of shape {tuple(W.shape)}"
                " it must be (in,)"
            )
        scores = wanda_scores(W, norm)
    if config.pattern:
        return n_of_m(scores, *n_and_m(config.pattern))
    per = config.per or {"magnitude": "matrix", "wanda": "row"}[config.method]
    choose = from_each_row if per == "row" else from_matrix
    return choose(scores, config.sparsity)


def prune(
    W: Float[Tensor, "out in"], seen: InputStatistics | None, config: PruneConfig
) -> Float[Tensor, "out in"]:
    """Ŵ by any of the three methods, in float32.

    Args:
        seen: what entered the linear. Magnitude asks for nothing, Wanda for the norms,
            SparseGPT for the gram.
    Raises:
        ValueError: what the method asks for is missing, or does not fit W.
    """
    W = W.detach().float()
    if config.method == "magnitude":
        return W.where(keep_mask(W, None, config), 0.0)
    if seen is None:
        raise ValueError(f"seen=None: method={config.method!r} needs the inputs")
    if config.method == "wanda":
        return W.where(keep_mask(W, seen.norm, config), 0.0)
    if seen.gram is None:
        raise ValueError("seen.gram=None: SparseGPT needs it, collect with gram=True")
    return sparsegpt(W, seen.gram, config)


@torch.no_grad()
def apply(
    model: nn.Module,
    batches: Iterable[Int[Tensor, "batch seq"]] | None,
    config: PruneConfig,
    skip: tuple[str, ...] = ("lm_head",),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> nn.Module:
    """The weight of every linear gets its zeros, in place.

    With Wanda and SparseGPT each block is calibrated on what the pruned blocks before
    it put out. All are computed before the first weight is put in.

    Args:
        batches: token ids to calibrate on, (batch, seq) each; None does for magnitude.
        skip: last names of linears that are left out.
        progress: called with the blocks that are done, and how many there are.
    Raises:
        ValueError: bad text, a weight that cannot be pruned (named), or adapters on
            the model; the model is then as it was.
    """
    if config.method == "magnitude":
        found = {}
        for name, linear in walk.linears(model, skip).items():
            with named(name):
                found[name] = prune(linear.weight, None, config)
        return walk.put_weights(model, found)
    if batches is None:
        raise ValueError(f"batches=None: method={config.method!r} needs text")
    found = {}

    def run() -> None:
        found.update(pruned_weights(model, batches, config, skip, progress))

    calibration.in_eval_mode(model, run)
    return walk.put_weights(model, found)


def pruned_weights(
    model: nn.Module,
    batches: Iterable[Int[Tensor, "batch seq"]],
    config: PruneConfig,
    skip: tuple[str, ...] = ("lm_head",),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Float[Tensor, "out in"]]:
    """Ŵ of every linear in the model's blocks, by name; the model is not changed.

    Raises:
        ValueError: as `apply`.
    """
    walk.linears(model, skip)  # refuses what cannot be compressed
    calls = calibration.first_calls(model, batches)
    with_gram = config.method == "sparsegpt"
    weights: dict[str, Tensor] = {}
    blocks = calibration.blocks(model)
    for i, (prefix, block) in enumerate(blocks.items()):
        block = deepcopy(block)  # its weights become Ŵ, those of the model do not
        linears = walk.linears(block, skip)
        read = partial(calibration.next_calls, block, calls)
        seen = calibration.collect(linears, read, gram=with_gram)
        for name, linear in linears.items():
            with named(f"{prefix}.{name}"):
                linear.weight.copy_(prune(linear.weight, seen[name], config))
            weights[f"{prefix}.{name}"] = linear.weight
        calls = read()  # what the pruned block puts out
        progress(i + 1, len(blocks))
    return weights


@contextmanager
def named(name: str) -> Iterator[None]:
    """`with named(layer):` puts the layer's name in front of what a ValueError says."""
    try:
        yield
    except ValueError as problem:
        raise ValueError(f"{name}: {problem}") from None


def sparsity(model: nn.Module, skip: tuple[str, ...] = ("lm_head",)) -> float:
    """The share of zeros among the weights of the linears."""
    weights = [linear.weight for linear in walk.linears(model, skip).values()]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


def hold_zeros(model: nn.Module, skip: tuple[str, ...] = ("lm_head",)) -> list:
    """The zeros of the linears get no gradient, so that training leaves them zero.

    SGD and Adam keep a weight at 0 whose gradient was always 0, with weight decay too.

    Returns:
        The hooks: `.remove()` each to undo it.
    """

    def hold(keep: Tensor) -> Callable[[Tensor], Tensor]:
        def hook(grad: Tensor) -> Tensor:
            return grad * keep

        return hook

    hooks = []
    for linear in walk.linears(model, skip).values():
        if linear.weight.requires_grad:
            keep = linear.weight.detach() != 0
            hooks.append(linear.weight.register_hook(hold(keep)))
    return hooks
