"""A pruned model on the disk: a Hugging Face folder, and the width of each layer.

A `config.json` has one `intermediate_size` and one number of heads for all layers. A
pruned model has several, so they stand beside it, layer by layer, under `layer_widths`:

    {"intermediate_size": 1152, "num_attention_heads": 6, "num_key_value_heads": 2}

Where all layers are alike, the folder is a usual one, which `transformers` opens too.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from llmlab.compression import walk
from llmlab.models import checkpoint
from llmlab.models.llama import Llama

KEY = "layer_widths"
FIELDS = ("intermediate_size", "num_attention_heads", "num_key_value_heads")


def layer_widths(model: Llama) -> list[dict[str, int]]:
    """What each layer's weights say: FIELDS."""
    D = model.config.head_dim
    found = []
    for block in model.model.layers:
        attention = block.self_attn
        widths = (
            len(block.mlp.gate_proj.weight),
            len(attention.q_proj.weight) // D,
            len(attention.k_proj.weight) // D,
        )
        found.append(dict(zip(FIELDS, widths, strict=True)))
    return found


def save(model: Llama, folder: str | Path) -> Path:
    """Write `config.json` and `model.safetensors`, for `load`.

    Raises:
        ValueError: the model is no `Llama`, carries adapters, or is quantised.
    """
    if not isinstance(model, Llama):
        raise ValueError(f"model={type(model).__name__} must be a Llama of llmlab")
    walk.linears(model, skip=())
    folder = checkpoint.save(model, folder, any_shape=True)
    file = folder / "config.json"
    raw = checkpoint.read_json(file)
    widths = layer_widths(model)
    if any(layer != widths[0] for layer in widths):
        raw[KEY] = widths
        # no other program should take it for a Llama of one width
        raw["architectures"] = ["PrunedLlama"]
        file.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    return folder


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> Llama:
    """The model in a folder that `save` wrote, or any Llama's, in eval mode.

    Raises:
        FileNotFoundError: as `checkpoint.load`.
        ValueError: as `checkpoint.load`; or `layer_widths` does not fit.
    """
    folder = Path(folder)
    config = checkpoint.read_config(folder)
    widths = checkpoint.read_json(folder / "config.json").get(KEY)
    if widths is None:
        return checkpoint.load(folder, dtype)
    check_widths(widths, config.num_hidden_layers)
    state = checkpoint.read_state(folder)
    if config.tie_word_embeddings and not checkpoint.tie(state):
        config = replace(config, tie_word_embeddings=False)
    with torch.device("meta"):  # no memory, and no time for an initialisation
        model = Llama(config)
        for i, its in enumerate(widths):
            narrow = Llama(replace(config, num_hidden_layers=1, **its))
            layer = narrow.model.layers[0]
            layer.self_attn.layer = i
            model.model.layers[i] = layer
    checkpoint.check(model, state, against=KEY)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    return checkpoint.fill(model, state).eval()


def check_widths(widths: object, layers: int) -> None:
    """Raises: ValueError: they are not FIELDS for each layer."""
    good = isinstance(widths, list) and len(widths) == layers
    if not good or any(set(layer) != set(FIELDS) for layer in widths):
        raise ValueError(
            f"{KEY} must hold {', '.join(FIELDS)} for each of {layers} layers"
        )
