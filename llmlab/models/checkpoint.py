"""Hugging Face checkpoint folders, read and written with no name map.

A folder is `config.json` beside `model.safetensors` (or shards with
`model.safetensors.index.json`). Since our parameters bear Hugging Face's names, loading
is: read the shape, read the tensors, check that both sides agree.

    raw     a config.json as a dict          state   name → tensor
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

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
# fmt: off
SAME_NAME = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias",
    "initializer_range",
]
# fmt: on
ROPE_EXTRAS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def config_from_hf(raw: dict) -> LlamaConfig:
    """Our shape from a `config.json` of model type llama, or mistral without a sliding
    window.

    Both spellings of RoPE are read: `rope_theta` with `rope_scaling`, and transformers
        5's `rope_parameters`.

    Raises:
        ValueError: the architecture is another, or uses what `Llama` lacks; every such
            thing is listed.
    """
    kind = raw.get("model_type")
    if kind not in DEFAULTS:
        raise ValueError(
            f"model_type={kind!r} is not supported: use one of {', '.join(DEFAULTS)}"
        )
    raw = DEFAULTS[kind] | raw
    rope = _rope(raw)
    if problems := _unsupported(raw, rope):
        raise ValueError(
            "this checkpoint needs what Llama does not have: " + "; ".join(problems)
        )
    scaling = (
        {}
        if rope["rope_type"] == "default"
        else {k: rope[k] for k in ("rope_type", *ROPE_EXTRAS) if k in rope}
    )
    shape = {name: raw[name] for name in SAME_NAME if name in raw}
    return LlamaConfig(
        **shape, rope_theta=float(rope["rope_theta"]), rope_scaling=scaling
    )


def _rope(raw: dict) -> dict:
    """`rope_parameters`, or the same made of the older `rope_theta` and `rope_scaling`
    (its `type` is `rope_type`).
    """
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    # as transformers: the old context defaults to the whole
    if rope["rope_type"] == "llama3":
        rope.setdefault(
            "original_max_position_embeddings", raw.get("max_position_embeddings", 2048)
        )
    return rope


def _unsupported(raw: dict, rope: dict) -> list[str]:
    """What the checkpoint asks for and `Llama` does not do, each as 'key=value (what is
    supported)'.
    """
    rules = [  # (holds, what to say)
        (
            raw.get("hidden_act", "silu") == "silu",
            f"hidden_act={raw.get('hidden_act')!r} (only 'silu')",
        ),
        (
            raw.get("sliding_window") is None,
            f"sliding_window={raw.get('sliding_window')} (only null)",
        ),
        (
            "quantization_config" not in raw,
            "quantization_config (only float weights: dequantize first)",
        ),
        (
            rope["rope_type"] in ("default", "linear", "llama3"),
            f"rope_type={rope['rope_type']!r} (only default, linear, llama3)",
        ),
        (
            rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
            == 1.0,
            "partial_rotary_factor (only 1)",
        ),
    ]
    return [say for holds, say in rules if not holds]


def config_to_hf(config: LlamaConfig) -> dict:
    """The `config.json` of a `LlamaForCausalLM`, in the words of transformers 4 and of
    transformers 5 at once.
    """
    scaling = dict(config.rope_scaling)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **{name: getattr(config, name) for name in SAME_NAME},
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling or None,
        "rope_parameters": {
            "rope_theta": config.rope_theta,
            "rope_type": "default",
            **scaling,
        },
    }


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> Llama:
    """The model in a Hugging Face checkpoint folder, in eval mode, its weights cast to
    `dtype`.

    Raises:
        FileNotFoundError: no config.json, no safetensors, or a shard is missing; the
            message says what to do.
        ValueError: unsupported architecture, or tensors that are missing, left over or
            of the wrong shape.
    """
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = Llama(config)
    state = _state(folder, config.tie_word_embeddings)
    _check(model, state)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    return fill(model, state).eval()


def fill(model: Llama, state: dict[str, Tensor]) -> Llama:
    """A model built on the meta device gets its tensors (not copied), its tie and its
    RoPE table.
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
    return config_from_hf(json.loads(file.read_text(encoding="utf-8")))


def _state(folder: Path, tied: bool) -> dict[str, Tensor]:
    """All tensors of a folder, without what needs no loading: RoPE's old buffers, and
    the twin of a tied embedding.
    """
    from safetensors.torch import load_file

    state = {
        name: t for file in _weight_files(folder) for name, t in load_file(file).items()
    }
    skip = {"lm_head.weight"} if tied else set()
    return {
        name: t
        for name, t in state.items()
        if name not in skip and not name.endswith("rotary_emb.inv_freq")
    }


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names."""
    single, index = (
        folder / "model.safetensors",
        folder / "model.safetensors.index.json",
    )
    if single.is_file():
        return [single]
    if not index.is_file():
        others = sorted(
            f.name
            for f in folder.iterdir()
            if f.suffix in (".bin", ".pth", ".pt", ".gguf", ".safetensors")
        )
        raise FileNotFoundError(
            f"{folder} holds no model.safetensors (only:"
            f" {', '.join(others) or 'no weights'}). Convert it with transformers:"
            " AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    shards = [
        folder / name
        for name in sorted(
            set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        )
    ]
    if missing := [f.name for f in shards if not f.is_file()]:
        raise FileNotFoundError(
            f"{folder} lacks the shards {_some(missing)}: download them again"
        )
    return shards


def _check(model: Llama, state: dict[str, Tensor]) -> None:
    """Every parameter has its tensor, of its shape and of a float type, and none is
    left over.
    """
    # a tied weight is listed once
    want = {name: p.shape for name, p in model.named_parameters()}
    problems = []
    if missing := sorted(want.keys() - state.keys()):
        problems.append(f"missing: {_some(missing)}")
    if extra := sorted(state.keys() - want.keys()):
        problems.append(f"not part of this model: {_some(extra)}")
    both = sorted(want.keys() & state.keys())
    if wrong := [
        f"{n} is {tuple(state[n].shape)}, not {tuple(want[n])}"
        for n in both
        if state[n].shape != want[n]
    ]:
        problems.append(f"wrong shape: {_some(wrong)}")
    if coded := [
        f"{n} ({state[n].dtype})" for n in both if not state[n].is_floating_point()
    ]:
        problems.append(f"not floating point: {_some(coded)}")
    if problems:
        raise ValueError("the tensors do not fit config.json; " + "; ".join(problems))


def _some(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )


def save(model: Llama, folder: str | Path) -> Path:
    """Write `config.json` and `model.safetensors` so that transformers and `load` open
    them; returns the folder.

    A tied embedding is written once. Each file is replaced whole: a crash leaves the
    old one, never half a new one.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: p.detach().cpu().contiguous() for name, p in model.named_parameters()
    }
    raw = config_to_hf(model.config) | {
        "dtype": str(model.lm_head.weight.dtype).removeprefix("torch.")
    }
    (folder / "config.json.tmp").write_text(
        json.dumps(raw, indent=2) + "\n", encoding="utf-8"
    )
    save_file(state, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    # safetensors makes it private
    shutil.copymode(folder / "config.json.tmp", folder / "model.safetensors.tmp")
    for name in ("config.json", "model.safetensors"):
        os.replace(folder / f"{name}.tmp", folder / name)
    return folder
