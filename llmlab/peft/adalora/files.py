"""AdaLoRA adapters as files of the `peft` library, so that either side opens what the
other wrote.

The file holds the triplets that are left, layer by layer, and `rank_pattern` says which
of the r₀ they were:

    adapter_config.json          {"peft_type": "ADALORA", "init_r": 12, "rank_pattern":
                                 {"….q_proj.lora_E": [true, …]}, …}
    adapter_model.safetensors    base_model.model.<layer>.lora_A (r, k), .lora_E (r, 1),
                                 .lora_B (d, r)
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from llmlab.peft import checkpoint, walk
from llmlab.peft.adalora.adalora import AdaLoRAConfig, apply, layers_of

# ours: peft's, where they differ
NAMES = {"alpha": "lora_alpha", "dropout": "lora_dropout", "delta_t": "deltaT"}
SAME = (
    "total_step",
    "target_r",
    "init_r",
    "tinit",
    "tfinal",
    "beta1",
    "beta2",
    "orth_reg_weight",
)
PLAIN = {
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "layers_to_transform": None,
}


def save(
    model: nn.Module, folder: str | Path, kept: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the adapter as `peft` does: `PeftModel.from_pretrained(base, folder)` opens
    it.

    Args:
        kept: masks of the triplets to keep, as `RankAllocator.kept` has them; by
            default those with λ ≠ 0, or all before the first step, when every λ is 0.
    """
    layers, tensors, pattern = layers_of(model), {}, {}
    fresh = not any(layer.rank for layer in layers.values())
    for name, layer in layers.items():
        mask = (layer.lora_E != 0).flatten() | fresh if kept is None else kept[name]
        tensors |= {
            f"{name}.lora_A": layer.lora_A[mask],
            f"{name}.lora_E": layer.lora_E[mask],
        }
        tensors[f"{name}.lora_B"] = layer.lora_B[:, mask]
        pattern[f"{name}.lora_E"] = mask.tolist() + [False] * (
            layer.config.init_r - len(mask)
        )
    config = next(iter(layers.values())).config
    targets = config.target_modules
    settings = {
        theirs: getattr(config, ours)
        for ours, theirs in (*NAMES.items(), *zip(SAME, SAME, strict=True))
    }
    settings |= {
        "peft_type": "ADALORA",
        "task_type": "CAUSAL_LM",
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "rank_pattern": pattern,
        "inference_mode": True,
        "base_model_name_or_path": checkpoint.base_name(model),
        **{name: PLAIN[name] for name in ("bias", "fan_in_fan_out")},
    }
    checkpoint.write(folder, settings, tensors)


def load(model: nn.Module, folder: str | Path, adapter: str = "default") -> nn.Module:
    """Put an adapter from a folder, ours or `peft`'s, on `model`. Layers have the ranks
    that they ended with.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another method's adapter, a setting that is not plain AdaLoRA, a
            layer that the model lacks, or a tensor of the wrong shape (named). The
            model is then as it was.
    """
    settings, tensors = checkpoint.read(folder, "ADALORA")
    for name, plain in PLAIN.items():
        if settings.get(name) not in (plain, None, False, {}, []):
            raise ValueError(
                f"{name}={settings[name]!r} is not supported: only {plain!r} is plain"
                " AdaLoRA"
            )
    targets = settings["target_modules"]
    config = AdaLoRAConfig(
        **{
            ours: settings[theirs]
            for ours, theirs in (*NAMES.items(), *zip(SAME, SAME, strict=True))
        },
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
    )
    pattern, wanted = settings.get("rank_pattern") or {}, {}
    for name, layer in walk.find(model, config.target_modules).items():
        linear, r = (
            walk.base_of(layer),
            sum(pattern.get(f"{name}.lora_E", [True] * config.init_r)),
        )
        wanted |= {f"{name}.lora_A": (r, linear.in_features), f"{name}.lora_E": (r, 1)}
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
