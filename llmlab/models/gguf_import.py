"""A llama.cpp GGUF file, dequantised into a Hugging Face folder.

GGUF stores a Llama under other names, its linears in blocks of few bits, and the rows
of W_q and W_k in another order: llama.cpp turns neighbouring channels (2i, 2i + 1) by
one RoPE angle, Hugging Face turns channels (i, i + D/2).

    n  heads        D  head_dim        d  hidden_size
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from llmlab.models import checkpoint
from llmlab.models.llama import Llama, LlamaConfig

NAMES = {  # GGUF → Hugging Face, inside one block
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
CONTROL = 3  # GGUF's token type of a special token


def convert(
    file: str | Path, folder: str | Path, progress=lambda done, total: None
) -> Path:
    """Write config.json, fp32 model.safetensors and the tokenizer's files of a Llama
    GGUF into `folder`.

    `progress(done, total)` is called after each tensor.

    Raises:
        ValueError: the file is no Llama, or its tokenizer is not the byte-level BPE
            that this reader knows.
    """
    from gguf import GGUFReader

    reader = GGUFReader(str(file))
    config = read_config(reader)
    with torch.device("meta"):
        model = Llama(config)
    checkpoint.save(checkpoint.fill(model, _state(reader, config, progress)), folder)
    write_tokenizer(reader, Path(folder))
    return Path(folder)


def read_config(reader) -> LlamaConfig:
    """The shape that a GGUF's header states."""
    if (kind := _value(reader, "general.architecture")) != "llama":
        raise ValueError(
            f"general.architecture={kind!r} is not supported: only 'llama'"
        )
    shape = {
        "vocab_size": "vocab_size",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "max_position_embeddings": "context_length",
    }
    return LlamaConfig(
        **{
            ours: int(_value(reader, f"llama.{theirs}"))
            for ours, theirs in shape.items()
        },
        rms_norm_eps=float(
            str(np.float32(_value(reader, "llama.attention.layer_norm_rms_epsilon")))
        ),
        rope_theta=float(_value(reader, "llama.rope.freq_base")),
        tie_word_embeddings=all(t.name != "output.weight" for t in reader.tensors),
    )


def _value(reader, key: str):
    if key not in reader.fields:
        raise ValueError(f"the GGUF file lacks {key!r}")
    return reader.fields[key].contents()


def _state(reader, config: LlamaConfig, progress) -> dict[str, torch.Tensor]:
    """All tensors as fp32 under Hugging Face's names."""
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for i, tensor in enumerate(reader.tensors):
        *block, part, kind = tensor.name.split(".")  # blk.3.attn_q.weight
        weight = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if part in heads:
            weight = half_split(weight, heads[part])
        name = f"model.layers.{block[1]}.{NAMES[part]}" if block else OUTSIDE[part]
        state[f"{name}.{kind}"] = torch.from_numpy(np.ascontiguousarray(weight))
        progress(i + 1, len(reader.tensors))
    return state


def half_split(weight: np.ndarray, n: int) -> np.ndarray:
    """Rows of W_q or W_k from RoPE's neighbour layout to its half-split layout: (n·D,
    d) → (n·D, d).

    In each head, row 2i + j (j = 0, 1) becomes row i + j·D/2.
    """
    rows, d = weight.shape
    pairs = weight.reshape(n, rows // n // 2, 2, d)  # (n, D/2, 2, d)
    return pairs.swapaxes(1, 2).reshape(rows, d)  # (n, 2, D/2, d) → (n·D, d)


def write_tokenizer(reader, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json (with the chat template), as
    transformers and tokenizers read them.
    """
    scheme = (
        _value(reader, "tokenizer.ggml.model"),
        _value(reader, "tokenizer.ggml.pre"),
    )
    if scheme != ("gpt2", "smollm"):
        raise ValueError(
            f"tokenizer {scheme} is not supported: only byte-level BPE with single"
            " digits, ('gpt2', 'smollm')"
        )
    tokens, types = (
        _value(reader, "tokenizer.ggml.tokens"),
        _value(reader, "tokenizer.ggml.token_type"),
    )
    special = [
        token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL
    ]
    _tokenizer(tokens, _value(reader, "tokenizer.ggml.merges"), special).save(
        str(folder / "tokenizer.json")
    )
    named = {
        name: tokens[_value(reader, f"tokenizer.ggml.{key}_token_id")]
        for name, key in _SPECIAL.items()
    }
    settings = {
        **named,
        "additional_special_tokens": special[1:3],
        "chat_template": _value(reader, "tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(_value(reader, "llama.context_length")),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )
    ids = {
        f"{key}_token_id": _value(reader, f"tokenizer.ggml.{gguf}_token_id")
        for key, gguf in _IDS.items()
    }
    (folder / "generation_config.json").write_text(
        json.dumps(ids, indent=2) + "\n", encoding="utf-8"
    )


_SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
_IDS = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _tokenizer(tokens: list[str], merges: list[str], special: list[str]):
    """Byte-level BPE whose numbers are split into single digits first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    return tokenizer
