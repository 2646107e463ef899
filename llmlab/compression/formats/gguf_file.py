"""A model as one GGUF file, for llama.cpp and all that is built on it.

The `gguf` package quantises: Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 have a scale (and, in
those with 1, a minimum) for each 32 weights of a row. The codes are the package's own,
so a model that was quantised here with other scales is rounded once more. Names, and
the order of the rows of W_q and W_k, are those of llama.cpp (`models.gguf_import` reads
them).

    n  heads        D  head_dim
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from llmlab.models import gguf_import
from llmlab.models.llama import Llama

TYPES = ("F32", "F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
BLOCK = 32  # weights that share a scale
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def save_gguf(
    model: Llama,
    file: str | Path,
    kind: str = "Q4_0",
    tokenizer_from: str | Path | None = None,
    embedding: str = "Q8_0",
) -> Path:
    """Write a model as GGUF. The file is replaced whole.

    Args:
        kind: how linears are stored, one of TYPES; norms and biases are floats.
        tokenizer_from: a folder whose tokenizer is written along; llama.cpp wants one.
        embedding: how embedding and head are stored.
    Raises:
        ValueError: an unknown type, rows that are no multiple of 32, or RoPE that is
            slowed down in a way that GGUF does not hold; nothing is written.
    """
    import gguf

    for name, value in (("kind", kind), ("embedding", embedding)):
        if value not in TYPES:
            raise ValueError(f"{name}={value!r} must be one of {TYPES}")
    tensors = named_tensors(model)
    for name, array in tensors.items():
        if array.ndim == 2 and kind[0] == "Q" and array.shape[1] % BLOCK:
            raise ValueError(
                f"{name} has rows of {array.shape[1]} weights; {kind} needs a multiple"
                f" of {BLOCK}"
            )
    header = header_of(model.config)
    file = Path(file)
    scratch = file.with_name(file.name + ".tmp")
    writer = gguf.GGUFWriter(scratch, "llama")
    for key, (add, value) in header.items():
        getattr(writer, add)(key, value)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"] if kind != "F32" else 0)
    if tokenizer_from is not None:
        add_tokenizer(writer, Path(tokenizer_from))
    for name, array in tensors.items():
        matrix = embedding if name.startswith(("token_embd", "output.")) else kind
        stored_as = gguf.GGMLQuantizationType[matrix if array.ndim == 2 else "F32"]
        data = gguf.quantize(array, stored_as)
        writer.add_tensor(name, data, raw_dtype=stored_as)
    file.parent.mkdir(parents=True, exist_ok=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(scratch, file)
    return file


def header_of(config) -> dict[str, tuple[str, object]]:
    """The shape, as (the writer's method, the value) for each key of the header.

    Raises:
        ValueError: RoPE is slowed down in a way that is not written.
    """
    numbers = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    header = {f"llama.{key}": ("add_uint32", value) for key, value in numbers.items()}
    header["llama.attention.layer_norm_rms_epsilon"] = (
        "add_float32",
        config.rms_norm_eps,
    )
    header["llama.rope.freq_base"] = ("add_float32", config.rope_theta)
    kind = config.rope_scaling.get("rope_type", "default")
    if kind == "linear":
        header["llama.rope.scaling.type"] = ("add_string", "linear")
        header["llama.rope.scaling.factor"] = (
            "add_float32",
            config.rope_scaling["factor"],
        )
    elif kind != "default":
        raise ValueError(f"rope_type={kind!r} is not written to GGUF: default, linear")
    return header


def named_tensors(model: Llama) -> dict[str, np.ndarray]:
    """All tensors as fp32 under GGUF's names; a tied head is left out.

    Codes of a `QuantLinear` are decoded first.
    """
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    inside = {ours: theirs for theirs, ours in gguf_import.NAMES.items()}
    outside = {ours: theirs for theirs, ours in gguf_import.OUTSIDE.items()}
    found = {}
    for name, module in model.named_modules():
        tied = name == "lm_head" and config.tie_word_embeddings
        if tied or not hasattr(module, "weight"):
            continue
        if name in outside:
            place = outside[name]
        else:
            _, _, layer, rest = name.split(".", 3)
            place = f"blk.{layer}.{inside[rest]}"
        n = heads.get(name.rpartition(".")[2])
        for part in ("weight", "bias"):
            tensor = getattr(module, part, None)
            if tensor is None:
                continue
            array = tensor.detach().float().cpu().numpy()
            found[f"{place}.{part}"] = array if n is None else neighbours(array, n)
    return found


def neighbours(weight: np.ndarray, n: int) -> np.ndarray:
    """Rows of W_q or W_k from RoPE's half-split layout to its neighbour layout: the
    inverse of `gguf_import.half_split`.

    In each head, row i + j·D/2 (j = 0, 1) becomes row 2i + j.
    """
    rows, *rest = weight.shape
    halves = weight.reshape(n, 2, rows // n // 2, *rest)  # (n, 2, D/2, d)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, *rest))


def split_of(steps: dict) -> str:
    """GGUF's name of the way in which text is split before BPE.

    Raises:
        ValueError: the tokenizer splits in another way than those of `SPLITS` in
            `models.gguf_import`.
    """
    kinds = [step["type"] for step in steps.get("pretokenizers", [steps]) if step]
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        return "llama-bpe"
    raise ValueError(
        f"the tokenizer splits text by {kinds}: only those of SmolLM and of Llama 3"
        " have a name in GGUF here"
    )


def add_tokenizer(writer, folder: Path) -> None:
    """Vocabulary, merges, special tokens and chat template of a folder.

    Raises:
        ValueError: the tokenizer is not byte-level BPE.
    """
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads(
        (folder / "tokenizer_config.json").read_text(encoding="utf-8")
    )
    if raw["model"].get("type") != "BPE":
        raise ValueError(
            f"{folder / 'tokenizer.json'} holds a {raw['model'].get('type')} tokenizer:"
            " only byte-level BPE is written to GGUF"
        )
    ids = dict(raw["model"]["vocab"])
    kinds = dict.fromkeys(ids, NORMAL)
    for token in raw.get("added_tokens", []):
        ids[token["content"]] = token["id"]
        kinds[token["content"]] = CONTROL if token["special"] else USER_DEFINED
    tokens = sorted(ids, key=ids.get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_of(raw.get("pre_tokenizer") or {}))
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[token] for token in tokens])
    writer.add_token_merges(merges)
    for kind in ("bos", "eos", "unk", "pad"):
        token = settings.get(f"{kind}_token")
        if token in ids:
            getattr(writer, f"add_{kind}_token_id")(ids[token])
    template = folder / "chat_template.jinja"
    text = settings.get("chat_template")
    if template.is_file():
        text = template.read_text(encoding="utf-8")
    if text:
        writer.add_chat_template(text)
