"""AdaLoRA adapters as files of the `peft` library: either side opens the other's.

The file holds the triplets that are left, layer by layer, and `rank_pattern` says which
of the r₀ they were:

    adapter_config.json
        {"peft_type": "ADALORA", "init_r": 12,
         "rank_pattern": {"….q_proj.lora_E": [true, …]}, …}
    adapter_model.safetensors
        base_model.model.<layer>.lora_A (r, k), .lora_E (r, 1), .lora_B (d, r)
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from llmlab.peft import checkpoint, walk
from llmlab.peft.adalora.adalora import AdaLoRAConfig, apply, layers_of

# our name of a setting: peft's
NAMES = {
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "delta_t": "deltaT",
    "total_step": "total_step",
    "target_r": "target_r",
    "init_r": "init_r",
    "tinit": "tinit",
    "tfinal": "tfinal",
    "beta1": "beta1",
    "beta2": "beta2",
    "orth_reg_weight": "orth_reg_weight",
}
# what peft's AdaLoraConfig inherits and AdaLoRA does not use: r, init_lora_weights
READ = (
    *NAMES.values(),
    "target_modules",
    "rank_pattern",
    "r",
    "init_lora_weights",
    "alpha_pattern",
)
# others must be empty, or as here
PLAIN = {"bias": "none", "qalora_group_size": 16}


def save(
    model: nn.Module, folder: str | Path, kept: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the adapter as `peft` does.

    `PeftModel.from_pretrained(base, folder)` opens it.

    Args:
        kept: masks of the triplets to keep, as `RankAllocator.kept` has them; by
            default those with λ ≠ 0, or all before the first step, when every λ is 0.
    """
    layers = layers_of(model)
    untrained = not any(layer.rank for layer in layers.values())
    tensors = {}
    pattern = {}
    for name, layer in layers.items():
        in_use = (layer.lora_E != 0).flatten() | untrained
        mask = in_use if kept is None else kept[name]
        tensors[f"{name}.lora_A"] = layer.lora_A[mask]
        tensors[f"{name}.lora_E"] = layer.lora_E[mask]
        tensors[f"{name}.lora_B"] = layer.lora_B[:, mask]
        dropped = layer.config.init_r - len(mask)  # before, for good
        pattern[f"{name}.lora_E"] = mask.tolist() + [False] * dropped
    config = next(iter(layers.values())).config
    settings = {theirs: getattr(config, ours) for ours, theirs in NAMES.items()}
    settings |= {
        "peft_type": "ADALORA",
        "task_type": checkpoint.task_of(model),
        "target_modules": checkpoint.targets_to_json(config.target_modules),
        "rank_pattern": pattern,
        "inference_mode": True,
        "base_model_name_or_path": checkpoint.base_name(model),
        "bias": PLAIN["bias"],
        "fan_in_fan_out": False,
    }
    checkpoint.write(folder, settings, tensors)


def load(model: nn.Module, folder: str | Path, adapter: str = "default") -> nn.Module:
    """Put an adapter from a folder, ours or `peft`'s, on `model`.

    Layers have the ranks that they ended with.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another method's adapter, a setting that is not plain AdaLoRA, a
            layer that the model lacks, or a tensor of the wrong shape (named). The
            model is then as it was.
    """
    settings, tensors = checkpoint.read(folder, "ADALORA")
    settings = checkpoint.check_settings(settings, READ, PLAIN, "AdaLoRA")
    checkpoint.needed(settings, "total_step")
    config = AdaLoRAConfig(
        **{ours: settings[name] for ours, name in NAMES.items() if name in settings},
        target_modules=checkpoint.targets_from_json(
            checkpoint.needed(settings, "target_modules")
        ),
    )
    pattern = settings.get("rank_pattern", {})
    wanted = {}
    for name, layer in walk.find(model, config.target_modules).items():
        linear = walk.base_of(layer)
        r = sum(pattern.get(f"{name}.lora_E", [True] * config.init_r))
        wanted[f"{name}.lora_A"] = (r, linear.in_features)
        wanted[f"{name}.lora_E"] = (r, 1)
        wanted[f"{name}.lora_B"] = (linear.out_features, r)
    checkpoint.check_tensors(tensors, wanted)
    apply(model, config, adapter)
    with torch.no_grad():
        for name, layer in layers_of(model).items():
            r = wanted[f"{name}.lora_E"][0]
            layer.keep_only(torch.arange(config.init_r) < r)
            for factor in ("lora_A", "lora_E", "lora_B"):
                getattr(layer, factor).copy_(tensors[f"{name}.{factor}"])
    return model
