"""What is done with LoRA adapters once they are trained: save, load, mix, and serve
many on one base.

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
    _known,
    _layers,
    _refuse_merged,
    apply,
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


def save(model: nn.Module, folder: str | Path, adapter: str = "default") -> None:
    """Write one adapter as `peft` does: `PeftModel.from_pretrained(base, folder)` opens
    it.
    """
    _known(model, [adapter])
    layers = {
        n: layer
        for n, layer in walk.installed(model, LoRALinear).items()
        if adapter in layer.configs
    }
    tensors = {
        f"{n}.lora_A.weight": layer.lora_A[adapter] for n, layer in layers.items()
    }
    tensors |= {
        f"{n}.lora_B.weight": layer.lora_B[adapter] for n, layer in layers.items()
    }
    config = next(iter(layers.values())).configs[adapter]
    checkpoint.write(
        folder,
        {**_to_peft(config), "base_model_name_or_path": checkpoint.base_name(model)},
        tensors,
    )


def load(model: nn.Module, folder: str | Path, adapter: str = "default") -> nn.Module:
    """Put an adapter from a folder, ours or `peft`'s, on `model` and make it the active
    one.

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
        linear, r = walk.base_of(layer), config.rank(name)
        wanted[f"{name}.lora_A.weight"] = (r, linear.in_features)
        wanted[f"{name}.lora_B.weight"] = (linear.out_features, r)
    tensors = {
        name: t
        for name, t in tensors.items()
        if name in wanted or not _is_base_weight(model, name, t)
    }
    checkpoint.check_tensors(tensors, wanted)
    apply(model, config, adapter)
    layers = walk.installed(model, LoRALinear)
    with torch.no_grad():
        for name, tensor in tensors.items():
            place, which, _ = name.rsplit(".", 2)
            getattr(layers[place], which)[adapter].copy_(tensor)
    return model


def _is_base_weight(model: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether this is a copy of the model's own weight: `peft` adds those of embedding
    and head if one is a target.
    """
    place, _, what = name.replace(".base_layer.", ".").rpartition(".")
    layer = walk.base_of(dict(walk.places(model)).get(place))
    own = getattr(layer, what, None)
    return (
        own is not None
        and own.shape == tensor.shape
        and torch.equal(own.detach(), tensor.to(own))
    )


def combine(model: nn.Module, weights: dict[str, float], adapter: str) -> nn.Module:
    """Make a new adapter whose ΔW is exactly Σ weight · ΔW: the As stacked, the Bs side
    by side, the ranks added.

    Raises:
        ValueError: an adapter that is not there, or the new name is taken.
    """
    _known(model, list(weights))
    if not weights:
        raise ValueError("weights={} names no adapter to combine")
    stacked = {
        name: _stack(layer, weights)
        for name, layer in walk.installed(model, LoRALinear).items()
    }
    stacked = {name: pair for name, pair in stacked.items() if pair}
    ranks = {name: A.shape[0] for name, (A, _) in stacked.items()}
    config = LoRAConfig(
        r=max(ranks.values()), alpha=max(ranks.values()), target_modules=tuple(ranks)
    )
    config = LoRAConfig(
        config.r,
        config.alpha,
        0.0,
        config.target_modules,
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


def _stack(
    layer: LoRALinear, weights: dict[str, float]
) -> tuple[Tensor, Tensor] | None:
    """(A, B) with B A = Σ weight · scaling · B_i A_i, or None where none of the
    adapters is on this layer.
    """
    here = [a for a in weights if a in layer.configs]
    if not here:
        return None
    A = torch.cat([layer.lora_A[a] for a in here], dim=0)  # (Σ r, k)
    # (d, Σ r)
    B = torch.cat(
        [weights[a] * layer.scaling[a] * layer.lora_B[a] for a in here], dim=1
    )
    return A, B


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is its plain base; afterwards the same adapters are active
    again.
    """
    _refuse_merged(model)
    before = {layer: layer.active for layer in _layers(model)}
    for layer in before:
        layer.active = ()
    try:
        yield
    finally:
        for layer, active in before.items():
            layer.active = active


@contextmanager
def by_row(model: nn.Module, rows: Sequence[str | None]) -> Iterator[None]:
    """Inside, row i of each batch goes through adapter rows[i], or through the plain
    base where that is None.

    Raises:
        ValueError: an adapter that is not there, adapters are merged, or later a batch
            of another size.
    """
    _known(model, [a for a in rows if a is not None])
    _refuse_merged(model)
    layers = _layers(model)
    for layer in layers:
        layer.rows = list(rows)
    try:
        yield
    finally:
        for layer in layers:
            layer.rows = None


def _to_peft(config: LoRAConfig) -> dict:
    """The settings under `peft`'s names."""
    targets = config.target_modules
    return {
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "use_rslora": config.rslora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
        **{
            name: value
            for name, value in PLAIN.items()
            if name in ("bias", "fan_in_fan_out", "use_dora")
        },
    }


def _from_peft(settings: dict) -> LoRAConfig:
    for name, plain in PLAIN.items():
        if settings.get(name) not in (plain, None, False, {}, []):
            raise ValueError(
                f"{name}={settings[name]!r} is not supported: only {plain!r} is plain"
                " LoRA"
            )
    targets = settings["target_modules"]
    return LoRAConfig(
        r=settings["r"],
        alpha=settings["lora_alpha"],
        dropout=settings.get("lora_dropout", 0.0),
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
        rslora=settings.get("use_rslora", False),
        rank_pattern=settings.get("rank_pattern") or {},
        alpha_pattern=settings.get("alpha_pattern") or {},
    )
