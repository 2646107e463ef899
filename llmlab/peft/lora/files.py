"""Trained LoRA adapters: save, load, mix, and serve many of them on one base.

The files are those of the `peft` library, so that either side opens what the other
wrote. Serving gives each row of a batch its own adapter (the case that section 4.2 of
Hu et al. 2021 calls not straightforward once weights are merged).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from llmlab.peft import checkpoint, walk
from llmlab.peft.lora import copies, starts
from llmlab.peft.lora.lora import (
    LoRAConfig,
    LoRALinear,
    apply,
    check_known,
    check_unmerged,
    layers_of,
)

# The settings of peft's LoraConfig that `_from_peft` reads.
READ = (
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
)
# Others must be empty, or as here.
PLAIN = {"qalora_group_size": 16}
# what peft calls the layer under a low-rank change
BASE_LAYER = "base_layer"
# peft's starts that leave the base as it is: the files hold all that is needed.
HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva")


# Save and load ------------------------------------------------------------------------


def save(model: nn.Module, folder: str | Path, adapter: str = "default") -> None:
    """Write one adapter as `peft` does.

    `PeftModel.from_pretrained(base, folder)` opens it. One that started as PiSSA or
    OLoRA is written as plain LoRA of twice the rank, B A − B₀ A₀, so that nobody has to
    compute the start again.
    """
    check_known(model, [adapter])
    tensors = {}
    config = None
    for name, layer in walk.installed(model, copies.Adapted).items():
        if isinstance(layer, LoRALinear) and adapter in layer.lora_A:
            A, B = layer.lora_A[adapter], layer.lora_B[adapter]
            if adapter in layer.start_A:
                A = torch.cat([A, layer.start_A[adapter]], dim=0)  # (2r, k)
                B = torch.cat([B, -layer.start_B[adapter]], dim=1)  # (d, 2r)
            tensors[f"{name}.lora_A.weight"] = A
            tensors[f"{name}.lora_B.weight"] = B
            if adapter in layer.magnitude:
                m = layer.magnitude[adapter]
                tensors[f"{name}.lora_magnitude_vector"] = m
            config = layer.configs[adapter]  # the same for all its layers
        if adapter in layer.biases:
            low_rank = f"{name}.lora_A.weight" in tensors
            place = f"{name}.{BASE_LAYER}" if low_rank else name
            tensors[f"{place}.bias"] = layer.biases[adapter]
        if isinstance(layer, copies.WholeModule) and adapter in layer.copies:
            for part, tensor in layer.copies[adapter].state_dict().items():
                tensors[f"{name}.{part}"] = tensor
    settings = _to_peft(_twice_the_rank(config))
    settings["task_type"] = checkpoint.task_of(model, bool(config.modules_to_save))
    settings["base_model_name_or_path"] = checkpoint.base_name(model)
    checkpoint.write(folder, settings, tensors)


def load(model: nn.Module, folder: str | Path, adapter: str = "default") -> nn.Module:
    """Put an adapter from a folder, ours or `peft`'s, on `model` and make it active.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another method's adapter, a setting that this file cannot do, a
            layer that the model lacks, or a tensor of the wrong shape (each named). The
            model is then as it was.
    """
    settings, tensors = checkpoint.read(folder, "LORA")
    config = _without_absent(model, _from_peft(settings), tensors)
    tensors = _biases_by_layer(config, tensors)
    wanted = _wanted(model, config)
    tensors = checkpoint.without_base_weights(model, tensors, wanted)
    checkpoint.check_tensors(tensors, {n: tuple(s) for n, s in wanted.items()})

    apply(model, config, adapter)
    places = {}
    for name, layer in walk.installed(model, copies.Adapted).items():
        places |= _parameters(name, layer, adapter)
    with torch.no_grad():
        for name, tensor in tensors.items():
            places[name].copy_(tensor)
    return model


def _biases_by_layer(
    config: LoRAConfig, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Each bias under its layer's own name, where older versions of `peft` put it.

    With bias="all" `peft` writes the bias of a module that trains whole three times.
    """
    if config.bias == "none":
        return tensors
    found = {}
    for name, tensor in tensors.items():
        place = name.removesuffix(".bias")
        if not place.endswith((".modules_to_save", ".original_module")):
            found[name.replace(f".{BASE_LAYER}.bias", ".bias")] = tensor
    return found


def _wanted(model: nn.Module, config: LoRAConfig) -> dict[str, Sequence[int]]:
    """The shape of each tensor that a folder with these settings holds, by name."""
    wanted = {}
    for name, layer in config.targets(model).items():
        linear = walk.base_of(layer)
        r = config.rank(name)
        wanted[f"{name}.lora_A.weight"] = (r, linear.in_features)
        wanted[f"{name}.lora_B.weight"] = (linear.out_features, r)
        if config.dora:
            wanted[f"{name}.lora_magnitude_vector"] = (linear.out_features,)
    for name, layer in config.biased(model).items():
        wanted[f"{name}.bias"] = walk.base_of(layer).bias.shape
    for name, module in config.whole_modules(model).items():
        for part, tensor in walk.base_of(module).state_dict().items():
            wanted[f"{name}.{part}"] = tensor.shape
    return wanted


def _parameters(
    name: str, layer: copies.Adapted, adapter: str
) -> dict[str, nn.Parameter | Tensor]:
    """What one adapter trains at a layer, by the names of `_wanted`."""
    found = {}
    if isinstance(layer, LoRALinear) and adapter in layer.lora_A:
        found[f"{name}.lora_A.weight"] = layer.lora_A[adapter]
        found[f"{name}.lora_B.weight"] = layer.lora_B[adapter]
        if adapter in layer.magnitude:
            found[f"{name}.lora_magnitude_vector"] = layer.magnitude[adapter]
    if adapter in layer.biases:
        found[f"{name}.bias"] = layer.biases[adapter]
    if isinstance(layer, copies.WholeModule) and adapter in layer.copies:
        for part, tensor in layer.copies[adapter].state_dict().items():
            found[f"{name}.{part}"] = tensor
    return found


def _without_absent(
    model: nn.Module, config: LoRAConfig, tensors: dict[str, Tensor]
) -> LoRAConfig:
    """The settings without `modules_to_save` that neither model nor file has.

    For a classifier `peft` writes both "classifier" and "score", of which a model has
    one.
    """
    places = [name for name, _ in walk.places(model)]
    for name in tensors:
        places.append(name.rpartition(".")[0])
    kept = []
    for ending in config.modules_to_save:
        if any(place.endswith(ending) for place in places):
            kept.append(ending)
    return replace(config, modules_to_save=tuple(kept))


def _twice_the_rank(config: LoRAConfig) -> LoRAConfig:
    """The same scales with twice the rank, where an adapter is written with its start.

    Any other config comes back as it is.
    """
    if config.init not in starts.MOVED:
        return config
    more = math.sqrt(2) if config.rslora else 2  # so that α/√r, or α/r, stays
    return replace(
        config,
        init="default",
        r=2 * config.r,
        alpha=more * config.alpha,
        rank_pattern={name: 2 * r for name, r in config.rank_pattern.items()},
        alpha_pattern={name: more * a for name, a in config.alpha_pattern.items()},
    )


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
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "exclude_modules": checkpoint.targets_to_json(config.exclude_modules) or None,
        "layers_to_transform": config.layers_to_transform,
        "bias": config.bias,
        "modules_to_save": list(config.modules_to_save) or None,
        "fan_in_fan_out": False,
        "use_dora": config.dora,
    }


def _from_peft(settings: dict) -> LoRAConfig:
    """The settings under our names; what is missing is as `peft` has it."""
    settings = checkpoint.check_settings(settings, READ, PLAIN, "LoRA")
    blocks = settings.get("layers_to_transform")
    if blocks is not None:
        blocks = tuple(blocks) if isinstance(blocks, list) else (blocks,)
    return LoRAConfig(
        r=settings.get("r", 8),
        alpha=settings.get("lora_alpha", 8),
        dropout=settings.get("lora_dropout", 0.0),
        target_modules=checkpoint.targets_from_json(
            checkpoint.needed(settings, "target_modules")
        ),
        rslora=settings.get("use_rslora", False),
        rank_pattern=settings.get("rank_pattern", {}),
        alpha_pattern=settings.get("alpha_pattern", {}),
        init=_start_from_peft(settings.get("init_lora_weights", True)),
        dora=settings.get("use_dora", False),
        exclude_modules=checkpoint.targets_from_json(
            settings.get("exclude_modules", [])
        ),
        layers_to_transform=blocks or None,
        modules_to_save=tuple(settings.get("modules_to_save", ())),
        bias=settings.get("bias", "none"),
    )


def _start_from_peft(start: bool | str) -> str:
    """The start under our name.

    Raises:
        ValueError: one that changed the base in a way that is not in the folder.
    """
    if start in HARMLESS_STARTS:
        return "default"
    if start in starts.MOVED:
        return start  # peft repeats it on the base when it opens the folder
    if str(start).startswith("pissa_niter_"):
        why = (
            "it was drawn at random, so that peft itself opens this folder otherwise"
            " each time"
        )
    else:
        why = "it changed the base, and how is not in the folder"
    raise ValueError(
        f"{checkpoint.CONFIG}: init_lora_weights={start!r} is not supported: {why}."
        " Save it as plain LoRA:"
        " save_pretrained(folder, path_initial_model_for_weight_conversion=…)"
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
    for name, layer in walk.installed(model, copies.Adapted).items():
        for each in weights:
            more = isinstance(layer, copies.WholeModule) or each in layer.biases
            if more and each in layer.configs:
                raise ValueError(
                    f"adapter={each!r} trains more than low-rank changes at {name!r}"
                    " (modules_to_save or bias), so it cannot be mixed"
                )
    stacked = {}
    for name, layer in walk.installed(model, LoRALinear).items():
        for each in weights:
            if each in layer.magnitude:
                raise ValueError(
                    f"adapter={each!r} trains with DoRA: its change is no sum of"
                    " products, so it cannot be mixed"
                )
        if any(a in layer.lora_A for a in weights):
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
        if adapter in layer.lora_A:
            scale = weight * layer.scaling[adapter]
            As.append(layer.lora_A[adapter])
            Bs.append(scale * layer.lora_B[adapter])
            if adapter in layer.start_A:
                As.append(layer.start_A[adapter])
                Bs.append(-scale * layer.start_B[adapter])
    A = torch.cat(As, dim=0)  # (Σ r, k)
    B = torch.cat(Bs, dim=1)  # (d, Σ r)
    return A, B


# Serve --------------------------------------------------------------------------------


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is its plain base; afterwards all is as before."""
    check_unmerged(model)
    layers = layers_of(model)
    with _put_back(layers):
        for layer in layers:
            layer.active = ()
        yield


@contextmanager
def by_row(model: nn.Module, rows: Sequence[str | None]) -> Iterator[None]:
    """Inside, row i of each batch goes through adapter rows[i], and all these train.

    Where rows[i] is None, it goes through the plain base. Afterwards all is as before,
    so `backward` belongs inside, too.

    Raises:
        ValueError: an adapter that is not there, adapters are merged, or later a batch
            of another size, or `backward` where an adapter of the rows does not train.
    """
    check_known(model, [a for a in rows if a is not None])
    check_unmerged(model)
    layers = layers_of(model)
    with _put_back(layers):
        for layer in layers:
            layer.train_only(rows)
            layer.rows = list(rows)
        yield


@contextmanager
def _put_back(layers: Sequence[copies.Adapted]) -> Iterator[None]:
    """Afterwards the layers have the rows, and activity and training, that they had."""
    before = [(layer.rows, layer.active, layer.trained()) for layer in layers]
    try:
        yield
    finally:
        for layer, (rows, active, trained) in zip(layers, before, strict=True):
            layer.rows = rows
            layer.active = tuple(a for a in active if a in layer.configs)
            layer.train_only(trained)
