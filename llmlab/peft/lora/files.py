"""Trained LoRA adapters: save, load, mix, and serve many of them on one base.

The files are those of the `peft` library, so that either side opens what the other
wrote. Serving gives each row of a batch its own adapter (the case that section 4.2 of
Hu et al. 2021 calls not straightforward once weights are merged).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from llmlab.peft import checkpoint, walk
from llmlab.peft.lora.lora import (
    LoRAConfig,
    LoRALinear,
    apply,
    check_known,
    check_unmerged,
    layers_of,
)

# Settings of peft's LoraConfig that would change the maths, and the values that this
# file can do.
PLAIN = {
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "use_dora": False,
    "use_qalora": False,
    "modules_to_save": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}


# Save and load ------------------------------------------------------------------------


def save(model: nn.Module, folder: str | Path, adapter: str = "default") -> None:
    """Write one adapter as `peft` does.

    `PeftModel.from_pretrained(base, folder)` opens it.
    """
    check_known(model, [adapter])
    tensors = {}
    config = None
    for name, layer in walk.installed(model, LoRALinear).items():
        if adapter in layer.configs:
            tensors[f"{name}.lora_A.weight"] = layer.lora_A[adapter]
            tensors[f"{name}.lora_B.weight"] = layer.lora_B[adapter]
            config = layer.configs[adapter]  # the same for all its layers
    settings = _to_peft(config)
    settings["base_model_name_or_path"] = checkpoint.base_name(model)
    checkpoint.write(folder, settings, tensors)


def load(model: nn.Module, folder: str | Path, adapter: str = "default") -> nn.Module:
    """Put an adapter from a folder, ours or `peft`'s, on `model` and make it active.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another method's adapter, a setting that is not plain LoRA, a layer
            that the model lacks, or a tensor of the wrong shape (named). The model is
            then as it was.
    """
    settings, tensors = checkpoint.read(folder, "LORA")
    config = _from_peft(settings)
    wanted = {}
    for name, layer in walk.find(model, config.target_modules).items():
        linear = walk.base_of(layer)
        r = config.rank(name)
        wanted[f"{name}.lora_A.weight"] = (r, linear.in_features)
        wanted[f"{name}.lora_B.weight"] = (linear.out_features, r)
    tensors = checkpoint.without_base_weights(model, tensors, wanted)
    checkpoint.check_tensors(tensors, wanted)

    apply(model, config, adapter)
    layers = walk.installed(model, LoRALinear)
    with torch.no_grad():
        for key, tensor in tensors.items():
            name, factor, _ = key.rsplit(".", 2)  # "….q_proj", "lora_A", "weight"
            getattr(layers[name], factor)[adapter].copy_(tensor)
    return model


def _to_peft(config: LoRAConfig) -> dict:
    """The settings under `peft`'s names."""
    return {
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": checkpoint.targets_to_json(config.target_modules),
        "use_rslora": config.rslora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
        "bias": PLAIN["bias"],
        "fan_in_fan_out": PLAIN["fan_in_fan_out"],
        "use_dora": PLAIN["use_dora"],
    }


def _from_peft(settings: dict) -> LoRAConfig:
    """The settings under our names."""
    checkpoint.check_plain(settings, PLAIN, "LoRA")
    return LoRAConfig(
        r=settings["r"],
        alpha=settings["lora_alpha"],
        dropout=settings.get("lora_dropout", 0.0),
        target_modules=checkpoint.targets_from_json(settings["target_modules"]),
        rslora=settings.get("use_rslora", False),
        rank_pattern=settings.get("rank_pattern") or {},
        alpha_pattern=settings.get("alpha_pattern") or {},
    )


# Mix ----------------------------------------------------------------------------------


def combine(model: nn.Module, weights: dict[str, float], adapter: str) -> nn.Module:
    """Make a new adapter whose ΔW is exactly Σ weight · ΔW.

    The As are stacked, the Bs stand side by side, and the ranks add up.

    Raises:
        ValueError: an adapter that is not there, or the new name is taken.
    """
    check_known(model, list(weights))
    if not weights:
        raise ValueError("weights={} names no adapter to combine")
    stacked = {}
    for name, layer in walk.installed(model, LoRALinear).items():
        if any(a in layer.configs for a in weights):
            stacked[name] = _stack(layer, weights)
    ranks = {name: A.shape[0] for name, (A, _) in stacked.items()}

    # α = r on every layer, so that the scale is 1: `_stack` put the scales into B
    largest = max(ranks.values())
    config = LoRAConfig(
        r=largest,
        alpha=largest,
        target_modules=tuple(ranks),
        rank_pattern=ranks,
        alpha_pattern=ranks,
    )
    apply(model, config, adapter)
    layers = walk.installed(model, LoRALinear)
    with torch.no_grad():
        for name, (A, B) in stacked.items():
            layers[name].lora_A[adapter].copy_(A)
            layers[name].lora_B[adapter].copy_(B)
    return model


def _stack(layer: LoRALinear, weights: dict[str, float]) -> tuple[Tensor, Tensor]:
    """(A, B) with B A = Σ weight · scaling · B_i A_i over this layer's adapters."""
    As = []
    Bs = []
    for adapter, weight in weights.items():
        if adapter in layer.configs:
            As.append(layer.lora_A[adapter])
            Bs.append(weight * layer.scaling[adapter] * layer.lora_B[adapter])
    A = torch.cat(As, dim=0)  # (Σ r, k)
    B = torch.cat(Bs, dim=1)  # (d, Σ r)
    return A, B


# Serve --------------------------------------------------------------------------------


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is its plain base; afterwards the adapters are active again."""
    check_unmerged(model)
    active_before = {layer: layer.active for layer in layers_of(model)}
    for layer in active_before:
        layer.active = ()
    try:
        yield
    finally:
        for layer, active in active_before.items():
            layer.active = active


@contextmanager
def by_row(model: nn.Module, rows: Sequence[str | None]) -> Iterator[None]:
    """Inside, row i of each batch goes through adapter rows[i].

    Where rows[i] is None, it goes through the plain base.

    Raises:
        ValueError: an adapter that is not there, adapters are merged, or later a batch
            of another size.
    """
    check_known(model, [a for a in rows if a is not None])
    check_unmerged(model)
    layers = layers_of(model)
    for layer in layers:
        layer.rows = list(rows)
    try:
        yield
    finally:
        for layer in layers:
            layer.rows = None
