"""Adapter folders in the format of the `peft` library: one file of settings, one of
tensors.

    adapter_config.json          {"peft_type": "LORA", "r": 8, "target_modules":
                                 ["q_proj", "v_proj"], …}
    adapter_model.safetensors    base_model.model.<layer's name>.<what>, as in
                                 …self_attn.q_proj.lora_A.weight

Here layers go by their names in the model; the prefix exists in the file only.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def write(
    folder: str | Path, settings: dict, tensors: dict[str, Tensor], prefix: str = PREFIX
) -> None:
    """Save an adapter. `settings` must have "peft_type"; `tensors` go by `<layer's
    name>.<what>`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        f"{prefix}{name}": tensor.detach().contiguous()
        for name, tensor in tensors.items()
    }
    save_file(data, folder / TENSORS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(
        json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def read(
    folder: str | Path, peft_type: str, prefix: str = PREFIX
) -> tuple[dict, dict[str, Tensor]]:
    """(settings, tensors) of a folder written by `write` or by `peft`'s
    `save_pretrained`.

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
    return settings, {
        name.removeprefix(prefix): tensor for name, tensor in tensors.items()
    }


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
    if extra := sorted(found.keys() - wanted.keys()):
        raise ValueError(
            f"the adapter's file has {extra[0]!r}, which this model has no place for"
        )


def base_name(model: nn.Module) -> str | None:
    """What the model was loaded from, if it says so as transformers' models do."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None
