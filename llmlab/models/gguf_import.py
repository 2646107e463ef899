"""A llama.cpp GGUF file, dequantised into a Hugging Face folder.

GGUF stores a Llama under other names, its linears in blocks of few bits, and the rows
of W_q and W_k (and their biases) in another order: llama.cpp turns neighbouring
channels (2i, 2i + 1) by one RoPE angle, Hugging Face turns channels (i, i + D/2).

Where RoPE is slowed down, GGUF has one factor for all frequencies (`rope.scaling`), or
a tensor with a factor for each (`rope_freqs`, in every Llama 3.1), or both. The angle
is position · θ_i / (factor · factor_i). Hugging Face's name for a factor for each
frequency is `longrope`, here with the same ones for short and long texts.

    n  heads        D  head_dim        d  hidden_size

What a header leaves out is what llama.cpp assumes then.
"""

from __future__ import annotations

import json
import re
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
FACTORS = "rope_freqs.weight"
COMPUTED = "attn_rot_embd"  # a table of old files that we compute
ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
MLP = ("ffn_gate", "ffn_up", "ffn_down")
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # GGUF's types of a token


def convert(
    file: str | Path, folder: str | Path, progress=lambda done, total: None
) -> Path:
    """Write config.json, fp32 model.safetensors and the tokenizer's files of a Llama
    GGUF into `folder`.

    `progress(done, total)` is called after each tensor.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no GGUF file, or only a part of one; no Llama, or one that
            needs what ours does not have; or its tokenizer is not one of `SPLITS`. The
            message has the file, and the key or the tensor. Nothing is written.
    """
    folder = Path(folder)
    reader = _open(file)
    try:
        config = read_config(reader)
        tokenizer, texts = read_tokenizer(reader)
        with torch.device("meta"):
            model = Llama(config)
        state = _state(reader, config, progress)
        for name, p in model.named_parameters():
            if name.endswith("_proj.bias"):  # a flag of config.json is for all linears
                state.setdefault(name, torch.zeros(p.shape))
        checkpoint.check(model, state, against="the header")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    checkpoint.save(checkpoint.fill(model, state), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, values in texts.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    return folder


def _open(file: str | Path):
    """The `gguf` package's reader of a file; raises as `convert`."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(file))
    except OSError:
        raise  # which names the file
    except Exception as error:  # whatever the package stumbles over
        raise ValueError(
            f"{file} is not a GGUF file, or only a part of one"
            f" ({type(error).__name__}: {error})"
        ) from None
    if reader.byte_order != "I":
        raise ValueError(f"{file}: its numbers have the other byte order (big-endian)")
    return reader


# The header ---------------------------------------------------------------------------


def _value(reader, key: str, default=None):
    """What the header has under a key.

    Raises:
        ValueError: the key is missing and has no default, or its text is not UTF-8.
    """
    if key not in reader.fields:
        if default is None:
            raise ValueError(f"the header lacks {key!r}")
        return default
    try:
        return reader.fields[key].contents()
    except (UnicodeDecodeError, IndexError) as error:
        raise ValueError(f"{key!r} cannot be read: {error}") from None


def _number(reader, key: str, default: float | None = None) -> int | float:
    """A key that must be one number."""
    value = _value(reader, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(
            f"{key}={str(value)[:40]} must be one number: layers of different shapes"
            " are not supported"
        )
    return value


def read_config(reader) -> LlamaConfig:
    """The shape that a GGUF's header states; raises as `convert`."""
    if (kind := _value(reader, "general.architecture")) != "llama":
        raise ValueError(
            f"general.architecture={kind!r} is not supported: only 'llama'"
        )
    if _number(reader, "split.count", 1) > 1:
        raise ValueError("split.count: this is one of several files; merge them first")
    heads = int(_number(reader, "llama.attention.head_count"))
    hidden_size = int(_number(reader, "llama.embedding_length"))
    if "llama.vocab_size" in reader.fields:
        vocab_size = _number(reader, "llama.vocab_size")
    else:
        vocab_size = len(_value(reader, "tokenizer.ggml.tokens"))
    context = int(_number(reader, "llama.context_length"))
    names = {tensor.name for tensor in reader.tensors}
    biased = {name.split(".")[-2] for name in names if name.endswith(".bias")}

    head_dim = _head_dim(reader, heads, hidden_size)
    eps = _number(reader, "llama.attention.layer_norm_rms_epsilon")
    return LlamaConfig(
        vocab_size=int(vocab_size),
        hidden_size=hidden_size,
        intermediate_size=int(_number(reader, "llama.feed_forward_length")),
        num_hidden_layers=int(_number(reader, "llama.block_count")),
        num_attention_heads=heads,
        num_key_value_heads=int(
            _number(reader, "llama.attention.head_count_kv", heads)
        ),
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=float(str(np.float32(eps))),
        rope_theta=float(_number(reader, "llama.rope.freq_base", 10000.0)),
        rope_scaling=_rope_scaling(reader, head_dim, context),
        tie_word_embeddings="output.weight" not in names,
        attention_bias=bool(biased & {*ATTENTION}),
        mlp_bias=bool(biased & {*MLP}),
    )


def _head_dim(reader, heads: int, hidden_size: int) -> int:
    """`key_length`, which `value_length` and the turned channels must equal."""
    usual = hidden_size // max(heads, 1)
    key = "llama.attention.key_length"
    head_dim = int(_number(reader, key, usual))
    for other in ("llama.attention.value_length", "llama.rope.dimension_count"):
        default = usual if "value" in other else head_dim
        found = int(_number(reader, other, default))
        if found != head_dim:
            raise ValueError(
                f"{other}={found} is not supported: it must be the {head_dim} of {key}"
            )
    return head_dim


def _rope_scaling(reader, head_dim: int, context: int) -> dict:
    """How RoPE is slowed down, as `config.json` has it."""
    key = "llama.rope.scaling.type"
    kind = _value(reader, key, "linear")
    older = _number(reader, "llama.rope.scale_linear", 1.0)
    factor = float(_number(reader, "llama.rope.scaling.factor", older))
    if kind not in ("none", "linear"):
        raise ValueError(f"{key}={kind!r} is not supported: only 'none' and 'linear'")
    if kind == "none":
        factor = 1.0
    factor = factor or 1.0  # llama.cpp's 0 is "not at all"
    strength = _number(reader, "llama.rope.scaling.attn_factor", 1.0)
    if strength != 1 or factor < 0:
        raise ValueError(
            f"llama.rope.scaling.attn_factor={strength} must be 1, and"
            f" llama.rope.scaling.factor={factor} above 0"
        )
    for tensor in reader.tensors:
        if tensor.name == FACTORS:
            factors = (dequantized(tensor).astype(np.float64) * factor).tolist()
            return {
                "rope_type": "longrope",
                "short_factor": factors,
                "long_factor": factors,
                "factor": 1.0,
                "attention_factor": 1.0,
                "original_max_position_embeddings": context,
            }
    return {} if factor == 1 else {"rope_type": "linear", "factor": factor}


# The tensors --------------------------------------------------------------------------


def dequantized(tensor) -> np.ndarray:
    """A tensor in fp32.

    Raises:
        ValueError: it is stored in a way that the `gguf` package does not undo.
    """
    from gguf import dequantize

    try:
        weight = dequantize(tensor.data, tensor.tensor_type)
    except Exception as error:
        raise ValueError(
            f"{tensor.name} is stored as {tensor.tensor_type.name}, which the gguf"
            f" package does not dequantise ({type(error).__name__}: {error})"
        ) from None
    return np.array(weight, dtype=np.float32)


def _state(reader, config: LlamaConfig, progress) -> dict[str, torch.Tensor]:
    """All tensors as fp32 under Hugging Face's names."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    places = {tensor.name: _place(tensor.name) for tensor in reader.tensors}
    foreign = [name for name, place in places.items() if place is None]
    if foreign:
        raise ValueError(
            f"these tensors are not part of a Llama: {', '.join(foreign[:6])}"
            + (f" and {len(foreign) - 6} more" if len(foreign) > 6 else "")
        )
    state = {}
    for i, tensor in enumerate(reader.tensors):
        if name := places[tensor.name]:
            weight = dequantized(tensor)
            if part := next((p for p in heads if f".{p}." in tensor.name), None):
                weight = half_split(weight, heads[part], tensor.name)
            state[name] = torch.from_numpy(np.ascontiguousarray(weight))
        progress(i + 1, len(reader.tensors))
    return state


def _place(name: str) -> str | None:
    """A tensor's name in Hugging Face; "" if it is not needed, None if unknown."""
    if name == FACTORS or f".{COMPUTED}." in name:
        return ""
    inside = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if inside and inside[2] in NAMES:
        return f"model.layers.{int(inside[1])}.{NAMES[inside[2]]}.{inside[3]}"
    outside = re.fullmatch(r"(\w+)\.weight", name)
    if outside and outside[1] in OUTSIDE:
        return f"{OUTSIDE[outside[1]]}.weight"
    return None


def half_split(weight: np.ndarray, n: int, name: str = "weight") -> np.ndarray:
    """Rows of W_q or W_k from RoPE's neighbour layout to its half-split layout: (n·D,
    d) → (n·D, d), or (n·D,) → (n·D,) for a bias.

    In each head, row 2i + j (j = 0, 1) becomes row i + j·D/2.

    Raises:
        ValueError: the rows are no n heads of an even size.
    """
    rows, *rest = weight.shape
    if rows % (2 * n):
        raise ValueError(f"{name} has {rows} rows, which are no {n} heads of even size")
    pairs = weight.reshape(n, rows // n // 2, 2, *rest)  # (n, D/2, 2, d)
    return pairs.swapaxes(1, 2).reshape(rows, *rest)  # (n, 2, D/2, d) → (n·D, d)


# The tokenizer ------------------------------------------------------------------------

# How text is split before BPE: (a regular expression, or None for GPT-2's; whether each
# digit stands alone; whether a word of the vocabulary is taken whole, merges or not).
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "smollm": (None, True, False),
    "llama-bpe": (LLAMA3, False, True),
    "llama3": (LLAMA3, False, True),
}
_SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
_IDS = {"bos": "bos", "eos": "eos", "pad": "padding"}


def read_tokenizer(reader):
    """The `tokenizers.Tokenizer`, and what stands in tokenizer_config.json (with the
    chat template) and in generation_config.json, by file; raises as `convert`.
    """
    model = _value(reader, "tokenizer.ggml.model")
    split = _value(reader, "tokenizer.ggml.pre", "default")
    if model != "gpt2" or split not in SPLITS:
        raise ValueError(
            f"tokenizer.ggml.model={model!r} with tokenizer.ggml.pre={split!r} is not"
            f" supported: only byte-level BPE, 'gpt2', of {', '.join(SPLITS)}"
        )
    tokens = _value(reader, "tokenizer.ggml.tokens")
    types = _value(reader, "tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)}"
            " tokens"
        )
    ids = _special_ids(reader, len(tokens))
    merges = _value(reader, "tokenizer.ggml.merges")
    tokenizer = _tokenizer(tokens, types, merges, *SPLITS[split])
    # what llama.cpp assumes for each kind of tokenizer
    begins = _value(reader, "tokenizer.ggml.add_bos_token", split != "smollm")
    if begins and "bos" in ids:
        _begin_with(tokenizer, tokens[ids["bos"]], ids["bos"])
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    settings = {
        **{name: tokens[ids[key]] for name, key in _SPECIAL.items() if key in ids},
        "additional_special_tokens": special[1:3],
        "chat_template": _value(reader, "tokenizer.chat_template", ""),
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(_number(reader, "llama.context_length")),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if not settings["chat_template"]:
        del settings["chat_template"]
    return tokenizer, {
        "tokenizer_config.json": settings,
        "generation_config.json": {
            f"{name}_token_id": ids[key] for name, key in _IDS.items() if key in ids
        },
    }


def _special_ids(reader, count: int) -> dict[str, int]:
    """The numbers of the special tokens that the header has, under GGUF's names."""
    ids = {}
    for key in _SPECIAL.values():
        name = f"tokenizer.ggml.{key}_token_id"
        if name in reader.fields:
            ids[key] = int(_number(reader, name))
            if not 0 <= ids[key] < count:
                raise ValueError(f"{name}={ids[key]}, but there are {count} tokens")
    return ids


def _tokenizer(
    tokens: list[str],
    types: list[int],
    merges: list[str],
    split: str | None,
    single_digits: bool,
    whole_words: bool,
):
    """Byte-level BPE; see `SPLITS`."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
    )

    try:
        bpe = models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
            ignore_merges=whole_words,
        )
    except Exception as error:  # tokenizers raises no kind of its own
        raise ValueError(f"tokenizer.ggml.merges cannot be used: {error}") from None
    tokenizer = Tokenizer(bpe)
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    if split is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(split), "isolated"))
    if single_digits:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    for kind, add in (
        (CONTROL, tokenizer.add_special_tokens),
        (USER_DEFINED, tokenizer.add_tokens),
    ):
        found = [t for t, of in zip(tokens, types, strict=True) if of == kind]
        add([AddedToken(t, special=kind == CONTROL, normalized=False) for t in found])
    return tokenizer


def _begin_with(tokenizer, token: str, token_id: int) -> None:
    """Every text gets this token first, unless special tokens are not wanted."""
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token}:1 $B:1",
        special_tokens=[(token, token_id)],
    )
