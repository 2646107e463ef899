"""Hugging Face checkpoint folders, read and written with no name map.

A folder is `config.json` beside `model.safetensors` (or shards with
`model.safetensors.index.json`). Our parameters have the names of Hugging Face. So
loading is: read the shape, read the tensors, check that both sides agree.

    raw      a config.json as a dict
    state    name → tensor
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmlab.models.llama import Llama, LlamaConfig, rope_frequencies

# What transformers assumes when a config.json leaves a key out.
DEFAULTS = {
    "llama": {},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
# The fields of `LlamaConfig` that config.json has under the same name.
SAME_NAME = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "initializer_range",
]
ROPE_EXTRAS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
LONGROPE = ("short_factor", "long_factor", "attention_factor")
NEEDED_BY_ROPE = {"linear": ROPE_EXTRAS[:1], "llama3": ROPE_EXTRAS}


def config_from_hf(raw: dict) -> LlamaConfig:
    """Our shape from a `config.json` of model type llama or mistral.

    Both spellings of RoPE are read: `rope_theta` with `rope_scaling`, and
    `rope_parameters` of transformers 5.

    Raises:
        ValueError: the architecture is another, or uses what `Llama` does not have,
            such as a sliding window; every such thing is listed.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"a config is an object with keys, not a {type(raw).__name__}")
    kind = raw.get("model_type")
    if kind not in DEFAULTS:
        raise ValueError(
            f"model_type={kind!r} is not supported: use one of {', '.join(DEFAULTS)}"
        )
    raw = DEFAULTS[kind] | raw
    raw = {key: value for key, value in raw.items() if value is not None}
    rope = _rope(raw)
    problems = _unsupported(raw, rope)
    if problems:
        raise ValueError(
            "this checkpoint needs what Llama does not have: " + "; ".join(problems)
        )
    scaling = {}
    if rope["rope_type"] != "default":
        keys = ("rope_type", *ROPE_EXTRAS, *LONGROPE)
        scaling = {key: rope[key] for key in keys if key in rope}
    shape = {name: raw[name] for name in SAME_NAME if name in raw}
    return LlamaConfig(
        **shape, rope_theta=float(rope["rope_theta"]), rope_scaling=scaling
    )


def _rope(raw: dict) -> dict:
    """`rope_parameters`, or the same from the older `rope_theta` and `rope_scaling`.

    An older name of `rope_type` is `type`. Where both are there, the older one counts,
    as in transformers 5.23.
    """
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    if rope["rope_type"] == "llama3":
        # As in transformers: by default, the old context is the whole context.
        context = raw.get("max_position_embeddings", 2048)
        rope.setdefault("original_max_position_embeddings", context)
    return rope


def _unsupported(raw: dict, rope: dict) -> list[str]:
    """What the checkpoint asks for and `Llama` does not do.

    Returns:
        One string per problem: 'key=value (what is supported)'.
    """
    problems = []
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):  # two names of one function
        problems.append(f"hidden_act={activation!r} (only 'silu')")
    window = raw.get("sliding_window")
    if window is not None and raw["model_type"] != "llama":  # which ignores it
        problems.append(f"sliding_window={window} (only null)")
    if "quantization_config" in raw:
        problems.append("quantization_config (only float weights: dequantize first)")
    rope_type = rope["rope_type"]
    if rope_type not in ("default", "linear", "llama3", "longrope"):
        problems.append(
            f"rope_type={rope_type!r} (only default, linear, llama3, longrope)"
        )
    for key in NEEDED_BY_ROPE.get(rope_type, ()):
        if not isinstance(rope.get(key), int | float):
            problems.append(f"rope_type={rope_type!r} without a number for {key!r}")
    partial = raw.get("partial_rotary_factor", 1.0)
    if rope.get("partial_rotary_factor", partial) != 1.0:
        problems.append("partial_rotary_factor (only 1)")
    return problems


def config_to_hf(config: LlamaConfig) -> dict:
    """The `config.json` of a `LlamaForCausalLM`.

    It can be read by transformers 4 (`rope_scaling`) and by transformers 5
    (`rope_parameters`).
    """
    scaling = dict(config.rope_scaling)
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
    }
    for name in SAME_NAME:
        raw[name] = getattr(config, name)
    raw["rope_theta"] = config.rope_theta
    raw["rope_scaling"] = scaling or None
    raw["rope_parameters"] = {
        "rope_theta": config.rope_theta,
        "rope_type": "default",
        **scaling,
    }
    return raw


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> Llama:
    """The model in a Hugging Face checkpoint folder, in eval mode.

    Args:
        dtype: what the weights are cast to.
    Raises:
        FileNotFoundError: no config.json, no safetensors, or a shard is missing; the
            message says what to do.
        ValueError: unsupported architecture, a file that cannot be read, or tensors
            that are missing, left over or of the wrong shape.
    """
    folder = Path(folder)
    config = read_config(folder)
    state = read_state(folder)
    if config.tie_word_embeddings and not tie(state):
        # two matrices were stored, so they are two, as in transformers 5
        config = replace(config, tie_word_embeddings=False)
    with torch.device("meta"):  # no memory, and no time for an initialisation
        model = Llama(config)
    check(model, state)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    return fill(model, state).eval()


def fill(model: Llama, state: dict[str, Tensor]) -> Llama:
    """Give a model that was built on the meta device its tensors, which are not copied.

    What no file holds is made anew: the tie of the embeddings, and the table of RoPE.
    """
    model.load_state_dict(state, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.theta = rope_frequencies(model.config)
    return model


def read_config(folder: str | Path) -> LlamaConfig:
    """The shape written in a folder's config.json; raises as `load` does."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: {folder} is not a Hugging Face checkpoint folder"
        )
    raw = read_json(file)
    try:
        return config_from_hf(raw)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None


def read_json(file: Path) -> Any:
    """What a JSON file holds. Raises: ValueError: it is not JSON; names the file."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None


def tie(state: dict[str, Tensor]) -> bool:
    """Leaves one matrix for embedding and head, unless two different ones are stored.

    It stands under the embedding's name; a file may hold it under either, or both.
    """
    head = state.get(HEAD)
    if head is None:
        return True
    embedding = state.setdefault(EMBEDDING, head)
    same = embedding.shape == head.shape and torch.equal(embedding, head)
    if same:
        del state[HEAD]
    return same


def read_state(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder that need loading."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = {}
    for file in _weight_files(folder):
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise ValueError(
                f"{file} is not a safetensors file, or only a part of one: {error}"
            ) from None
        for name, tensor in tensors.items():
            if name.endswith("rotary_emb.inv_freq"):
                continue  # a buffer that old files hold, and that we compute
            state[name] = tensor
    return state


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names."""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        suffixes = (".bin", ".pth", ".pt", ".gguf", ".safetensors")
        others = sorted(f.name for f in folder.iterdir() if f.suffix in suffixes)
        raise FileNotFoundError(
            f"{folder} holds no model.safetensors (only:"
            f" {', '.join(others) or 'no weights'}). Convert it with transformers:"
            " AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    found = read_json(index)
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no 'weight_map' that names the shards")
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in shards if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks the shards {_some(missing)}: download them again"
        )
    return shards


def check(model: Llama, state: dict[str, Tensor], against: str = "config.json") -> None:
    """Each parameter must have one tensor, of its shape and of a float type.

    Args:
        against: what told the shape, for the message.
    Raises:
        ValueError: names what is missing, left over or wrong.
    """
    # A tied weight is listed once.
    wanted = {name: p.shape for name, p in model.named_parameters()}
    wrong_shape = []
    not_float = []
    for name in sorted(wanted.keys() & state.keys()):
        tensor = state[name]
        if tensor.shape != wanted[name]:
            shape = tuple(wanted[name])
            wrong_shape.append(f"{name} is {tuple(tensor.shape)}, not {shape}")
        if not tensor.is_floating_point():
            not_float.append(f"{name} ({tensor.dtype})")
    found = {
        "missing": sorted(wanted.keys() - state.keys()),
        "not part of this model": sorted(state.keys() - wanted.keys()),
        "wrong shape": wrong_shape,
        "not floating point": not_float,
    }
    problems = [f"{what}: {_some(names)}" for what, names in found.items() if names]
    if problems:
        raise ValueError(f"the tensors do not fit {against}; " + "; ".join(problems))


def _some(names: list[str], most: int = 6) -> str:
    """The first few names, and how many there are more."""
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


def save(model: Llama, folder: str | Path, *, any_shape: bool = False) -> Path:
    """Write `config.json` and `model.safetensors`, for `load` and for transformers.

    A tied embedding is written once; one that merging has untied is written as two.
    Biases that merging has added are written, too, with zeros beside them where the
    format wants more. Each file is replaced whole: a crash leaves the old one, never
    half of a new one.

    Args:
        any_shape: tensors may have other shapes than the config says, for a loader that
            knows them; `load` refuses such a folder.
    Returns:
        The folder.

    Raises:
        ValueError: the model holds what no Llama's folder can (adapters, 4-bit weights,
            biases of norms, layers of unequal width); nothing is written.
    """
    from safetensors.torch import save_file

    config, state = _to_store(model, any_shape)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    new_config = folder / "config.json.tmp"
    new_weights = folder / "model.safetensors.tmp"

    raw = config_to_hf(config)
    raw["dtype"] = str(state[EMBEDDING].dtype).removeprefix("torch.")
    new_config.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")

    save_file(state, new_weights, metadata={"format": "pt"})
    # safetensors makes its files readable by the owner alone.
    shutil.copymode(new_config, new_weights)

    os.replace(new_config, folder / "config.json")
    os.replace(new_weights, folder / "model.safetensors")
    return folder


def copy_tokenizer(source: str | Path | None, folder: Path) -> None:
    """What there is of the files that turn text into tokens and back."""
    for name in TOKENIZER:
        if source is not None and (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)


def _to_store(model: Llama, any_shape: bool) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """The shape and the tensors that a folder of this model holds; raises as `save`."""
    state = {}
    for name, parameter in model.named_parameters():
        state[name] = parameter.detach().cpu().contiguous()
    biased = {name.split(".")[-2] for name in state if name.endswith("_proj.bias")}
    config = replace(
        model.config,
        # merging an adapter of the head unties it
        tie_word_embeddings=model.config.tie_word_embeddings and HEAD not in state,
        attention_bias=bool(biased & {*ATTENTION}),
        mlp_bias=bool(biased & {*MLP}),
    )
    with torch.device("meta"):
        wanted = {name: p.shape for name, p in Llama(config).named_parameters()}
    for name in wanted.keys() - state.keys():
        if name.endswith("_proj.bias"):
            state[name] = torch.zeros(wanted[name], dtype=state[EMBEDDING].dtype)
    coded = [name for name, t in state.items() if not t.is_floating_point()]
    foreign = sorted(state.keys() - wanted.keys()) or coded
    if foreign or wanted.keys() - state.keys():
        raise ValueError(
            f"the model holds what no Llama's folder can: {_some(foreign)}. Merge"
            " adapters for good, or save them by their own method; dequantise 4-bit"
            " weights"
        )
    odd = [name for name, t in state.items() if t.shape != wanted[name]]
    if odd and not any_shape:
        raise ValueError(
            f"the model's config says other shapes than it has: {_some(odd)}. Layers of"
            " unequal width, as after pruning, need a folder of their own:"
            " llmlab.compression.llm_pruner.save"
        )
    return config, state
