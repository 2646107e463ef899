"""The shape of a model that a command is asked about: by name, or from a config.json.

To plan a run or to count its memory takes the shape alone. So a checkpoint is read here
that `Llama` cannot load, and what stands in the way is said: positions stretched by
YaRN, a sliding window, quantised weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab.course.words import did_you_mean

if TYPE_CHECKING:
    from llmlab.models.llama import LlamaConfig

LOADED_ROPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Found:
    """The sizes of a Llama or a Mixtral.

    Attributes:
        config: the sizes; of a Mixtral, with one expert in each layer.
        experts: how many there are in a layer; 0 for a Llama.
        top_k: how many of them a token uses.
        left_out: what the checkpoint has and the sizes do not show.
    """

    config: LlamaConfig
    experts: int = 0
    top_k: int = 1
    left_out: tuple[str, ...] = ()


def config_file(model: str) -> Path | None:
    """The config.json that `model` names, a file or a folder; None when it is neither.

    Raises:
        ValueError: a folder without a config.json.
    """
    path = Path(model)
    if path.is_file():
        return path
    if path.is_dir():
        inside = path / "config.json"
        if not inside.is_file():
            raise ValueError(f"MODEL={model!r} is a folder without a config.json")
        return inside
    return None


def from_file(file: Path) -> Found:
    """What a config.json says of a Llama, a Mistral or a Mixtral.

    Raises:
        ValueError: it is another model's, or no config.json; the message names the file
            and the reason.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            kind = type(raw).__name__
            raise ValueError(f"it holds a {kind}, not settings by name")
        return _found(raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"MODEL={str(file)!r} is not the config.json of a Llama or a Mixtral:"
            f" {what}"
        ) from error


def _found(raw: dict[str, Any]) -> Found:
    from llmlab.models.checkpoint import config_from_hf

    shape, left_out = shape_alone(raw)
    if raw.get("model_type") != "mixtral":
        return Found(config_from_hf(shape), left_out=left_out)
    dense = config_from_hf(shape | {"model_type": "mistral"})
    return Found(dense, raw["num_local_experts"], raw["num_experts_per_tok"], left_out)


def shape_alone(raw: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(the settings without what `Llama` cannot load, what was left out)."""
    shape = dict(raw) | {"sliding_window": None}
    left_out = []
    if raw.get("sliding_window") is not None:
        left_out.append(f"sliding_window={raw['sliding_window']}")
    quantised = shape.pop("quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method", "of some kind")
        left_out.append(f"quantised weights ({method}): counted as 16-bit numbers")
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key) or {}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in LOADED_ROPES:
            shape[key] = None
            left_out.append(f"positions of type {kind}")
    return shape, tuple(dict.fromkeys(left_out))


def unknown(model: str, known: list[str], usage: str) -> ValueError:
    """The error for a name that is none: the near names, then all."""
    lower = {name.lower(): name for name in known}
    near = get_close_matches(model.lower(), lower, n=3)
    asks = did_you_mean([lower[x] for x in near])
    return ValueError(
        f"MODEL={model!r} is not known. {asks}Use {usage}. The names are"
        f" {', '.join(known)}"
    )
