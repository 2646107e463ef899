"""Small Llamas as llama.cpp stores them, written with the `gguf` package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize

from llmlab.models.gguf_import import NAMES, OUTSIDE
from llmlab.models.llama import Llama

TOKENS = ["<|end|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "1", "2"]
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if"
    " add_generation_prompt %}ab{% endif %}"
)
OURS = {ours: theirs for theirs, ours in (NAMES | OUTSIDE).items()}


def header(model: Llama) -> dict:
    """The keys that every converter writes, and what they say."""
    c = model.config
    return {
        "llama.vocab_size": c.vocab_size,
        "llama.embedding_length": c.hidden_size,
        "llama.feed_forward_length": c.intermediate_size,
        "llama.block_count": c.num_hidden_layers,
        "llama.attention.head_count": c.num_attention_heads,
        "llama.attention.head_count_kv": c.num_key_value_heads,
        "llama.context_length": c.max_position_embeddings,
        "llama.attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "llama.rope.freq_base": c.rope_theta,
        "llama.rope.dimension_count": c.head_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * 5,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def neighbours(weight: np.ndarray, n: int) -> np.ndarray:
    """The rows of W_q or W_k (or their biases) in llama.cpp's order, as
    convert_hf_to_gguf permutes them.
    """
    halves = weight.reshape(n, 2, weight.shape[0] // n // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def tensors(model: Llama) -> dict[str, np.ndarray]:
    """The weights under GGUF's names."""
    c = model.config
    heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}
    stored = {}
    for name, p in model.named_parameters():
        place, _, kind = name.rpartition(".")
        block = place.split(".")[2] if ".layers." in place else None
        part = OURS[".".join(place.split(".")[3:]) if block else place]
        weight = p.detach().float().numpy()
        if part in heads:
            weight = neighbours(weight, heads[part])
        stored[f"blk.{block}.{part}.{kind}" if block else f"{part}.{kind}"] = weight
    return stored


def write(
    model: Llama,
    file: Path,
    keys: Mapping | None = None,
    more: Mapping[str, np.ndarray | None] | None = None,
    kind: GGMLQuantizationType | None = None,
    arch: str = "llama",
) -> Path:
    """A GGUF file of this model.

    Args:
        keys: other values of the header's keys; None leaves a key out.
        more: additional tensors; None leaves one out.
        kind: how matrices are stored; None: fp32.
    """
    writer = GGUFWriter(str(file), arch)
    for key, value in (header(model) | dict(keys or {})).items():
        if value is not None:
            _add(writer, key, value)
    for name, weight in (tensors(model) | dict(more or {})).items():
        if weight is None:
            continue
        if kind is not None and weight.ndim == 2:
            writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: GGUFWriter, key: str, value) -> None:
    match value:
        case str():
            writer.add_string(key, value)
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case _:
            writer.add_array(key, value)
