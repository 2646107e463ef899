"""Files of bottleneck adapters: settings as JSON beside tensors as safetensors.

They are called `adapter_config.json` and `adapter_model.safetensors`, as for all
methods here.
The `peft` library has no adapters, so the names are ours: `<block>.<seam>.<down or
up>.<weight or bias>`. Where there are mixtures or gates, their tensors follow the same
rule. `of` in the settings says which seams there are.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from llmlab.peft import checkpoint
from llmlab.peft.adapters import bottleneck


def tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The parameters of one adapter or mixture, by `<site>.<what>`.

    Raises:
        ValueError: it is not on the model.
    """
    found = {}
    for path, site in bottleneck.sites(model).items():
        for kind in (site.nets, site.mixers):
            if adapter in kind:
                found |= {
                    f"{path}.{name}": t
                    for name, t in kind[adapter].state_dict().items()
                }
    if not found:
        raise ValueError(
            f"adapter={adapter!r} is not on the model; it has"
            f" {bottleneck.names(model) or 'none'}"
        )
    return found


def config_of(model: nn.Module, adapter: str) -> object:
    """The settings that `adapter` was made with."""
    return next(
        s.configs[adapter]
        for s in bottleneck.sites(model).values()
        if adapter in s.configs
    )


def save(model: nn.Module, folder: str | Path, adapter: str, peft_type: str) -> None:
    """Write one adapter or mixture: its settings and its tensors."""
    data = tensors(model, adapter)
    settings = {**dataclasses.asdict(config_of(model, adapter)), "peft_type": peft_type}
    checkpoint.write(
        folder,
        settings | {"base_model_name_or_path": checkpoint.base_name(model)},
        data,
    )


def settings_of(config_type: type, settings: dict) -> object:
    """A config of `config_type` from the settings of a file.

    Lists are tuples again, nested configs as they were.
    """
    values = {f.name: settings[f.name] for f in dataclasses.fields(config_type)}
    return config_type(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    )


def fill(model: nn.Module, adapter: str, found: dict[str, Tensor], undo) -> nn.Module:
    """Put the tensors of a file into an adapter that was just made.

    Where they do not fit, `undo()` and say so.

    Raises:
        ValueError: a tensor that is missing, unexpected or of the wrong shape (named).
    """
    mine = tensors(model, adapter)
    try:
        checkpoint.check_tensors(
            found, {name: tuple(t.shape) for name, t in mine.items()}
        )
    except ValueError:
        undo()
        raise
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(found[name])
    return model
