"""Adapter folders in the format of the `peft` library: settings and tensors.

    adapter_config.json
        {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"], …}
    adapter_model.safetensors, or adapter_model.bin as peft wrote in 2023
        base_model.model.<layer's name>.<what>, as in …self_attn.q_proj.lora_A.weight

In memory, layers go by their names in the model; the prefix exists in the file only.
Settings are read by a list of what is known: one that is not on it, and asks for
something, is refused by its name.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmlab.peft import walk

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
OLD_TENSORS = "adapter_model.bin"
PREFIX = "base_model.model."
# Settings of peft that say where an adapter comes from and how it is used, not what it
# computes.
RECORDS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}

# tasks with a head of their own, by the ending of the name of transformers' class
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


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
        ValueError: a file that cannot be read (named), another method's adapter, or a
            tensor without the prefix.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} is not an adapter's folder: it has no {CONFIG}"
        )
    settings = read_settings(folder / CONFIG)
    if settings.get("peft_type") != peft_type:
        raise ValueError(
            f"{folder} holds a {settings.get('peft_type')} adapter, not {peft_type}"
        )
    file, tensors = read_tensors(folder)
    for name in tensors:
        if not name.startswith(prefix):
            raise ValueError(
                f"{file}: the name {name!r} does not start with {prefix!r}"
            )
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return settings, named


def read_settings(file: Path) -> dict[str, Any]:
    """The settings in an adapter_config.json.

    Raises:
        ValueError: it is not JSON, or no object.
    """
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        kind = type(settings).__name__
        raise ValueError(f"{file} holds a {kind}, not an object of settings")
    return settings


def read_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """(the file, name → tensor) of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, or holds anything but tensors.
    """
    file = folder / TENSORS
    if file.is_file():
        try:
            return file, load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a safetensors file: {error}") from None
    file = folder / OLD_TENSORS
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} is not an adapter's folder: it has no {TENSORS}"
        )
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} cannot be read: {first}") from None
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ValueError(f"{file} holds other things than tensors")
    return file, tensors


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


def check_settings(
    settings: Mapping[str, Any],
    read: Iterable[str],
    plain: Mapping[str, Any],
    method: str,
) -> dict[str, Any]:
    """The settings that say something: each is one that we read, or asks for nothing.

    A null is as good as absent.

    Args:
        read: the names that the caller reads.
        plain: name → the value, other than an empty one, that leaves `method` plain.

    Raises:
        ValueError: names the first setting that asks for something else.
    """
    known = {*read, *RECORDS}
    for name, value in settings.items():
        asks_for_nothing = value in (None, False, {}, [], plain.get(name))
        if name not in known and not asks_for_nothing:
            only = f": only {plain[name]!r} is plain {method}" if name in plain else ""
            raise ValueError(
                f"{CONFIG}: {name}={value!r} is not supported{only or ' for ' + method}"
            )
    return {name: value for name, value in settings.items() if value is not None}


def needed(settings: Mapping[str, Any], name: str) -> Any:
    """A setting that has no default.

    Raises:
        ValueError: it is missing.
    """
    if name not in settings:
        raise ValueError(f"{CONFIG} has no {name!r}, which has no default")
    return settings[name]


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


def task_of(model: nn.Module, head_in_file: bool = False) -> str | None:
    """What `peft` calls the task of a model: by it, it chooses how to open a folder.

    None: nothing in particular. For a classifier it would want a head in the folder.
    """
    kind = type(model).__name__
    for ending, task in TASKS.items():
        if kind.endswith(ending):
            return task if head_in_file else None
    return "SEQ_2_SEQ_LM" if kind.endswith("ForConditionalGeneration") else "CAUSAL_LM"
