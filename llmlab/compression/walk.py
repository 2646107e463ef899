"""The linears of a model that can be compressed, and how they are changed.

What the methods of this part share. A model may be ours or one of `transformers`. All
is looked at, and computed, before the first weight is changed: a compression that fails
leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def linears(
    model: nn.Module, skip: tuple[str, ...] = ("lm_head",)
) -> dict[str, nn.Linear]:
    """The linears of a model by name, once it is sure that all can be compressed.

    The head is skipped: it is often the embedding itself, and small errors there are
    errors of the logits.

    Args:
        skip: last names of linears that are left out.
    Raises:
        ValueError: nothing is left to compress; an adapter is on; a linear is read and
            never called; a weight is no float, has no values, is all zeros, or holds
            NaN or ∞. The layer is named.
    """
    found = {}
    for name, module in model.named_modules():
        check_module(name, module)
        place, _, last = name.rpartition(".")
        if isinstance(module, nn.Linear) and last not in skip:
            if isinstance(model.get_submodule(place), nn.MultiheadAttention):
                raise ValueError(
                    f"{name} is in an nn.MultiheadAttention, which reads its weight and"
                    " never calls it: its input cannot be looked at"
                )
            check_weight(name, module.weight)
            found[name] = module
    if not found:
        raise ValueError(
            f"model={type(model).__name__} has no linear besides skip={skip}"
        )
    return found


def check_module(name: str, module: nn.Module) -> None:
    """Raises: ValueError: the module is an adapter, or compressed already."""
    adapter = getattr(module, "is_wrapper", False)
    if adapter or hasattr(module, "lora_A") or hasattr(module, "base_layer"):
        raise ValueError(
            f"{name} carries an adapter: merge it or take it off, then compress"
        )
    if getattr(module, "is_compressed", False):
        raise ValueError(
            f"{name} is compressed already, a {type(module).__name__}: load the model"
            " anew"
        )


def check_weight(name: str, weight: Tensor) -> None:
    """Raises: ValueError: the weight of layer `name` cannot be compressed."""
    if not weight.is_floating_point():
        raise ValueError(
            f"{name}.weight is in {weight.dtype}: it is quantised already, so"
            " dequantise it first"
        )
    if weight.is_meta:
        raise ValueError(
            f"{name}.weight is on the device 'meta': load its values first"
        )
    # One NaN or ∞ makes the sum one; only then is each value looked at.
    if not weight.detach().sum(dtype=torch.float32).isfinite():
        bad = int((~weight.detach().isfinite()).sum())
        if bad:
            raise ValueError(
                f"{name}.weight holds {bad} values that are NaN or infinite"
            )
    # mostly the first row says it
    if not (weight.detach()[:1].any() or weight.detach().any()):
        raise ValueError(f"{name}.weight is all zeros: was the checkpoint loaded?")


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """The weight of each named linear takes these values, in place, in its own dtype.

    Raises:
        ValueError: a weight has another shape than its linear's, or holds NaN or ∞; no
            weight has been changed then.
    """
    for name, weight in weights.items():
        old = model.get_submodule(name).weight
        if weight.shape != old.shape:
            raise ValueError(
                f"{name}.weight has shape {tuple(old.shape)}, not {tuple(weight.shape)}"
            )
        if not weight.to(old.dtype).isfinite().all():
            raise ValueError(f"{name}.weight would not be finite in {old.dtype}")
    for name, weight in weights.items():
        model.get_submodule(name).weight.copy_(weight)
    return model


def put_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """Each named place of the model gets this module, in the mode of the one before."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        module.train(model.get_submodule(name).training)
        setattr(model.get_submodule(parent), child, module)
    return model
