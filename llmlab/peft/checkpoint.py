"""Adapter folders in the format of the `peft` library: settings and tensors.

    adapter_config.json
        {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"], …}
    adapter_model.safetensors
        base_model.model.<layer's name>.<what>, as in …self_attn.q_proj.lora_A.weight

In memory, layers go by their names in the model; the prefix exists in the file only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmlab.peft import walk

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def write(
    folder: str | Path, settings: dict, tensors: dict[str, Tensor], prefix: str = PREFIX
) -> None:
    """Save an adapter.

    Args:
        settings: with "peft_type".
        tensors: by `<layer's name>.<what>`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        f"{prefix}{name}": tensor.detach().contiguous()
        for name, tensor in tensors.items()
    }
    save_file(data, folder / TENSORS, metadata={"format": "pt"})
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def read(
    folder: str | Path, peft_type: str, prefix: str = PREFIX
) -> tuple[dict, dict[str, Tensor]]:
    """(settings, tensors) of a folder that `write` or `peft`'s `save_pretrained` wrote.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the folder holds another method's adapter, or a tensor without the
            prefix.
    """
    folder = Path(folder)
    for file in (CONFIG, TENSORS):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder} is not an adapter's folder: it has no {file}"
            )
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if settings.get("peft_type") != peft_type:
        raise ValueError(
            f"{folder} holds a {settings.get('peft_type')} adapter, not {peft_type}"
        )
    tensors = load_file(folder / TENSORS)
    for name in tensors:
        if not name.startswith(prefix):
            raise ValueError(
                f"{folder / TENSORS}: the name {name!r} does not start with {prefix!r}"
            )
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return settings, named


def check_tensors(found: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> None:
    """Compare names and shapes before anything in the model is touched.

    Raises:
        ValueError: names the first tensor that is missing, unexpected or of the wrong
            shape.
    """
    for name, shape in wanted.items():
        if name not in found:
            raise ValueError(f"the adapter's file lacks {name!r}")
        if tuple(found[name].shape) != shape:
            raise ValueError(
                f"{name!r} has shape {tuple(found[name].shape)} in the file; this model"
                f" needs {shape}"
            )
    extra = sorted(found.keys() - wanted.keys())
    if extra:
        raise ValueError(
            f"the adapter's file has {extra[0]!r}, which this model has no place for"
        )


def check_plain(settings: dict, plain: dict, method: str) -> None:
    """Compare settings that would change the maths with the values we can do.

    Args:
        plain: {setting: the value that leaves `method` plain}.

    Raises:
        ValueError: names the first setting that asks for something else.
    """
    for name, value in plain.items():
        if settings.get(name) not in (value, None, False, {}, []):
            raise ValueError(
                f"{name}={settings[name]!r} is not supported: only {value!r} is plain"
                f" {method}"
            )


def without_base_weights(
    model: nn.Module, tensors: dict[str, Tensor], wanted: Iterable[str]
) -> dict[str, Tensor]:
    """`tensors` without copies of the model's own weights.

    `peft` adds those of embedding and head to a file where one of them is a target.
    """
    kept = {}
    for name, tensor in tensors.items():
        if name in wanted or not _is_base_weight(model, name, tensor):
            kept[name] = tensor
    return kept


def _is_base_weight(model: nn.Module, name: str, tensor: Tensor) -> bool:
    place, _, what = name.replace(".base_layer.", ".").rpartition(".")
    layer = walk.base_of(dict(walk.places(model)).get(place))
    own = getattr(layer, what, None)
    if own is None or own.shape != tensor.shape:
        return False
    return torch.equal(own.detach(), tensor.to(own))


def targets_to_json(targets: walk.Targets) -> str | list[str]:
    """`target_modules` as a file holds them."""
    return targets if isinstance(targets, str) else list(targets)


def targets_from_json(targets: str | list[str]) -> walk.Targets:
    """`target_modules` of a file as a config holds them, in one fixed order."""
    return targets if isinstance(targets, str) else tuple(sorted(targets))


def base_name(model: nn.Module) -> str | None:
    """What the model was loaded from, if it says so as transformers' models do."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None
