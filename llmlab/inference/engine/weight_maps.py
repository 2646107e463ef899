"""A model family as data: which tensor of its checkpoint becomes which of our Llama's.

Many decoders *are* Llamas: their files differ in names, in what is packed into one
matrix, and in a bias or a factor here and there. A weight map says so, a row a tensor:

    Row(source, targets, how, factor)

    source   a name in the checkpoint, `{}` for the number of a layer; "" for none
    targets  the names that it becomes in our Llama
    how      which of the functions in HOW makes them
    factor   what the result is multiplied by

A family is such a map, and a function that says its `config.json` in Llama's words.
Both see the raw configuration, on which biases and factors depend. Nothing is guessed:
a tensor that no row reads, a row whose tensor is not there, a target that is written
twice or not at all, a shape that does not fit are refused by name, before anything is
made.

Two layouts of packed queries, keys and values, with H query heads over K key/value
heads of D channels, and G = H / K:

    stacked   q₁ … q_H  k₁ … k_K  v₁ … v_K           Baichuan, Phi-3
    grouped   (q₁ … q_G  k₁  v₁)  (…)  K times       InternLM2; GPT-NeoX with G = 1

    d  hidden_size        f  intermediate_size
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llmlab.models import checkpoint
from llmlab.models.llama import Llama, LlamaConfig

LAYOUTS = ("stacked", "grouped")
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
LAYER = "model.layers.{}."
ATTENTION = tuple(f"{LAYER}self_attn.{x}_proj" for x in "qkvo")
MLP = tuple(f"{LAYER}mlp.{x}_proj" for x in ("gate", "up", "down"))
NORMS = (f"{LAYER}input_layernorm.weight", f"{LAYER}post_attention_layernorm.weight")


@dataclass(frozen=True)
class Row:
    """One line of a weight map."""

    source: str
    targets: tuple[str, ...]
    how: str = "copy"
    factor: float = 1.0


# What can be done to a tensor ---------------------------------------------------------


def split_qkv(
    packed: Float[Tensor, "packed ..."], heads: int, kv_heads: int, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights (or biases) of q, k and v from one that packs them by output.

    Args:
        packed: ((H + 2K)·D, …).
        layout: "stacked" or "grouped".
    Raises:
        ValueError: another layout, or a size that the heads do not divide.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be one of {LAYOUTS}")
    if heads % kv_heads:
        raise ValueError(f"heads={heads} must be a multiple of kv_heads={kv_heads}")
    H, K = heads, kv_heads
    D, rest = divmod(len(packed), H + 2 * K)
    if rest or D == 0:
        raise ValueError(
            f"packed has {len(packed)} rows: {H} + 2 · {K} heads do not divide them"
        )
    if layout == "stacked":
        q, k, v = packed.split([H * D, K * D, K * D])
        return q, k, v
    G = H // K
    groups = packed.unflatten(0, (K, G + 2, D))  # (K·(G + 2)·D, …) → (K, G + 2, D, …)
    q = groups[:, :G].flatten(0, 2)  # (K, G, D, …) → (H·D, …)
    k = groups[:, G].flatten(0, 1)  # (K, D, …) → (K·D, …)
    v = groups[:, G + 1].flatten(0, 1)
    return q, k, v


def copied(tensor: Tensor, config: LlamaConfig) -> tuple[Tensor, ...]:
    """As it is."""
    return (tensor,)


def transposed(tensor: Tensor, config: LlamaConfig) -> tuple[Tensor, ...]:
    """(in, out) → (out, in): GPT-2's Conv1D."""
    return (tensor.T,)


def stacked(tensor: Tensor, config: LlamaConfig) -> tuple[Tensor, ...]:
    """q, k, v of the layout "stacked"."""
    H, K = config.num_attention_heads, config.num_key_value_heads
    return split_qkv(tensor, H, K, "stacked")


def grouped(tensor: Tensor, config: LlamaConfig) -> tuple[Tensor, ...]:
    """q, k, v of the layout "grouped"."""
    H, K = config.num_attention_heads, config.num_key_value_heads
    return split_qkv(tensor, H, K, "grouped")


def halves(tensor: Tensor, config: LlamaConfig) -> tuple[Tensor, ...]:
    """The first half of the rows and the second: gate and up."""
    return tuple(tensor.chunk(2))


def unit_rows(tensor: Tensor, config: LlamaConfig) -> tuple[Tensor, ...]:
    """Each row over its length: Baichuan 2 does so to its head in every pass."""
    return (F.normalize(tensor),)


HOW: dict[str, Callable[[Tensor, LlamaConfig], tuple[Tensor, ...]]] = {
    "copy": copied,
    "transpose": transposed,
    "stacked": stacked,
    "grouped": grouped,
    "halves": halves,
    "unit rows": unit_rows,
}
ZEROS = "zeros"  # has no source: a bias that Llama has and the family has not


# The maps -----------------------------------------------------------------------------


def same(*names: str) -> list[Row]:
    """Rows for tensors that keep their names."""
    return [Row(name, (name,)) for name in names]


def llama_map(raw: Mapping) -> list[Row]:
    """Llama and Mistral: every name is ours already."""
    rows = same(EMBEDDING, *NORMS)
    rows += same(*(f"{linear}.weight" for linear in (*ATTENTION, *MLP)))
    if raw.get("attention_bias"):
        rows += same(*(f"{linear}.bias" for linear in ATTENTION))
    if raw.get("mlp_bias"):
        rows += same(*(f"{linear}.bias" for linear in MLP))
    return rows + same(NORM, HEAD)


def qwen2_map(raw: Mapping) -> list[Row]:
    """Qwen2 and 2.5: Llama with biases on q, k and v, and none on o."""
    *qkv, o = ATTENTION
    rows = llama_map({})
    rows += same(*(f"{linear}.bias" for linear in qkv))
    return [*rows, Row("", (f"{o}.bias",), ZEROS)]


def phi3_map(raw: Mapping) -> list[Row]:
    """Phi-3 and Phi-4: q, k, v in one matrix, gate and up in another."""
    q, k, v, o = (f"{linear}.weight" for linear in ATTENTION)
    gate, up, down = (f"{linear}.weight" for linear in MLP)
    return [
        *same(EMBEDDING, *NORMS, o, down, NORM, HEAD),
        Row(f"{LAYER}self_attn.qkv_proj.weight", (q, k, v), "stacked"),
        Row(f"{LAYER}mlp.gate_up_proj.weight", (gate, up), "halves"),
    ]


def baichuan_map(raw: Mapping) -> list[Row]:
    """Baichuan 7B and Baichuan 2 7B: a packed W; the second one's head has unit rows.

    The two have the same `model_type`; what tells them apart is the vocabulary.
    """
    q, k, v, o = (f"{linear}.weight" for linear in ATTENTION)
    head = "unit rows" if raw.get("vocab_size") == 125696 else "copy"
    return [
        *same(EMBEDDING, *NORMS, o, *(f"{linear}.weight" for linear in MLP), NORM),
        Row(f"{LAYER}self_attn.W_pack.weight", (q, k, v), "stacked"),
        Row(HEAD, (HEAD,), head),
    ]


def internlm2_map(raw: Mapping) -> list[Row]:
    """InternLM2: names of its own, and wqkv in groups of a key/value head."""
    kinds = ["weight", "bias"] if raw.get("bias") else ["weight"]
    gate, up, down = (f"{linear}.weight" for linear in MLP)
    rows = [
        Row("model.tok_embeddings.weight", (EMBEDDING,)),
        Row(f"{LAYER}attention_norm.weight", NORMS[:1]),
        Row(f"{LAYER}ffn_norm.weight", NORMS[1:]),
        Row(f"{LAYER}feed_forward.w1.weight", (gate,)),
        Row(f"{LAYER}feed_forward.w3.weight", (up,)),
        Row(f"{LAYER}feed_forward.w2.weight", (down,)),
        Row(NORM, (NORM,)),
        Row("output.weight", (HEAD,)),
    ]
    for kind in kinds:
        q, k, v, o = (f"{linear}.{kind}" for linear in ATTENTION)
        rows.append(Row(f"{LAYER}attention.wqkv.{kind}", (q, k, v), "grouped"))
        rows.append(Row(f"{LAYER}attention.wo.{kind}", (o,)))
    return rows


def granite_map(raw: Mapping) -> list[Row]:
    """Granite 3: a Llama with four factors, all of which fit into its weights.

    Scores are q·k times `attention_multiplier`, ours q·k / √D: q gets both.
    """
    D = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    residual = raw.get("residual_multiplier", 1.0)
    factors = {
        EMBEDDING: raw.get("embedding_multiplier", 1.0),
        "q": raw.get("attention_multiplier", 1.0) * D**0.5,
        "o": residual,
        "down": residual,
        HEAD: 1 / raw.get("logits_scaling", 1.0),
    }
    rows = []
    for row in llama_map(raw):
        (name,) = row.targets
        key = name if name in factors else name.split(".")[-2].removesuffix("_proj")
        # tied, yet with two factors: embedding and head become two matrices
        tied = name == HEAD and raw.get("tie_word_embeddings")
        source = EMBEDDING if tied else name
        rows.append(Row(source, row.targets, "copy", factors.get(key, 1.0)))
    return rows


# The same configuration, in Llama's words ---------------------------------------------


def refuse(problems: Sequence[str]) -> None:
    """Raises a `ValueError` that names all of them, if there are any."""
    if problems:
        raise ValueError("our Llama cannot express " + "; ".join(problems))


def as_llama(raw: Mapping, **changes) -> LlamaConfig:
    """The shape; a sliding window that no text reaches is none."""
    raw = dict(raw) | changes
    window = raw.pop("sliding_window", None)
    longest = raw.get("max_position_embeddings", 2048)
    if window is not None and window < longest:
        refuse([f"sliding_window={window}, below max_position_embeddings={longest}"])
    kinds = set(raw.get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"}:
        refuse([f"layer_types={sorted(kinds)}: only full_attention"])
    return checkpoint.config_from_hf(raw | {"model_type": "llama"})


def qwen2_config(raw: Mapping) -> LlamaConfig:
    """The window counts only where `use_sliding_window` says so."""
    raw = dict(raw)
    if not raw.pop("use_sliding_window", False):
        raw.pop("sliding_window", None)
    return as_llama(raw, attention_bias=True)


def phi3_config(raw: Mapping) -> LlamaConfig:
    """Its own default of ε."""
    return as_llama({"rms_norm_eps": 1e-5} | dict(raw))


def baichuan_config(raw: Mapping) -> LlamaConfig:
    """The 13B models have no rotary positions, and say so by the field's absence."""
    if "max_position_embeddings" not in raw:
        refuse(["a Baichuan without max_position_embeddings: it uses ALiBi, not RoPE"])
    return as_llama(raw)


def mistral_config(raw: Mapping) -> LlamaConfig:
    """With what transformers assumes where a key is missing."""
    return as_llama(checkpoint.DEFAULTS["mistral"] | dict(raw))


def internlm2_config(raw: Mapping) -> LlamaConfig:
    """`bias` is that of all four projections of attention."""
    return as_llama(raw, attention_bias=bool(raw.get("bias")))


@dataclass(frozen=True)
class Family:
    """All that has to be known of one `model_type`."""

    rows: Callable[[Mapping], list[Row]]
    config: Callable[[Mapping], LlamaConfig] = as_llama


FAMILIES = {
    "llama": Family(llama_map),
    "mistral": Family(llama_map, mistral_config),
    "qwen2": Family(qwen2_map, qwen2_config),
    "phi3": Family(phi3_map, phi3_config),
    "baichuan": Family(baichuan_map, baichuan_config),
    "internlm2": Family(internlm2_map, internlm2_config),
    "granite": Family(granite_map),
}


# Through a map ------------------------------------------------------------------------


def expanded(rows: Sequence[Row], layers: int) -> list[Row]:
    """A row with `{}` becomes one for each layer."""
    out = []
    for row in rows:
        for i in range(layers if "{}" in row.source + "".join(row.targets) else 1):
            targets = tuple(name.replace("{}", str(i)) for name in row.targets)
            source = row.source.replace("{}", str(i))
            out.append(replace(row, source=source, targets=targets))
    return out


def shapes(config: LlamaConfig) -> dict[str, torch.Size]:
    """What our Llama of this shape holds; a tied head is not listed."""
    with torch.device("meta"):
        model = Llama(config)
    return {name: p.shape for name, p in model.named_parameters()}


def problems(
    rows: Sequence[Row], state: Mapping[str, Tensor], wanted: Mapping
) -> list[str]:
    """All that does not fit between expanded rows, a checkpoint and a Llama."""
    found = []
    sources = [row.source for row in rows if row.how != ZEROS]
    targets = [name for row in rows for name in row.targets]
    lists = {
        "no function is called": {row.how for row in rows} - {*HOW, ZEROS},
        "missing in the checkpoint": {*sources} - {*state},
        "in the checkpoint, but in no row": {*state} - {*sources},
        "written twice": {name for name in targets if targets.count(name) > 1},
        "not part of our Llama": {*targets} - {*wanted},
        "not written by any row": {*wanted} - {*targets},
    }
    for what, names in lists.items():
        if names:
            shown = ", ".join(sorted(names)[:4])
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            found.append(f"{what}: {shown}{more}")
    return found


def convert(
    rows: Sequence[Row], state: Mapping[str, Tensor], config: LlamaConfig
) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """The tensors of our Llama, and its shape, which may be untied now.

    Args:
        rows: with `{}` for the layers.
        state: the checkpoint's tensors; they are not changed.
    Raises:
        ValueError: whatever does not fit, all of it, by name.
    """
    rows = expanded(rows, config.num_hidden_layers)
    wanted = shapes(replace(config, tie_word_embeddings=False))
    tied = config.tie_word_embeddings
    if tied:  # what is stored once is read once
        rows = [row for row in rows if row.source in state or row.targets != (HEAD,)]
        if not any(HEAD in row.targets for row in rows):
            rows.append(Row(embedding_of(rows), (HEAD,)))
    refuse_map(problems(rows, state, wanted))
    made: dict[str, Tensor] = {}
    wrong = []
    for row in rows:
        try:
            parts = parts_of(row, state, config, wanted)
        except ValueError as error:
            wrong.append(f"{row.source}, {row.how}: {error}")
            continue
        for name, part in zip(row.targets, parts, strict=False):
            if part.shape != wanted[name]:
                size, asked = tuple(part.shape), tuple(wanted[name])
                wrong.append(f"{row.source} gives {name} {size}, not {asked}")
            made[name] = part
        if len(parts) != len(row.targets):
            wrong.append(f"{row.source}: {len(parts)} parts, {len(row.targets)} names")
    refuse_map(wrong)
    if tied and not checkpoint.tie(made):
        config = replace(config, tie_word_embeddings=False)
    return config, made


def embedding_of(rows: Sequence[Row]) -> str:
    """The name under which a checkpoint holds the embedding."""
    for row in rows:
        if EMBEDDING in row.targets:
            return row.source
    return EMBEDDING


def parts_of(
    row: Row, state: Mapping[str, Tensor], config: LlamaConfig, wanted: Mapping
) -> tuple[Tensor, ...]:
    """What a row makes, each part in memory of its own unless it is the tensor."""
    if row.how == ZEROS:
        dtype = next(iter(state.values())).dtype
        return tuple(torch.zeros(wanted[name], dtype=dtype) for name in row.targets)
    tensor = state[row.source]
    if not tensor.is_floating_point():
        raise ValueError(f"its numbers are {tensor.dtype}: only floats are read")
    parts = HOW[row.how](tensor, config)
    if row.factor != 1.0:
        parts = tuple(part * row.factor for part in parts)
    return tuple(
        part
        if part.data_ptr() == tensor.data_ptr() and part.shape == tensor.shape
        else part.contiguous().clone()
        for part in parts
    )


def refuse_map(found: Sequence[str]) -> None:
    """Raises a `ValueError` with all problems, if there are any."""
    if found:
        raise ValueError("the weight map does not fit: " + "; ".join(found))


def family_of(raw: Mapping, families: Mapping[str, Family] = FAMILIES) -> Family:
    """The family that a config.json names.

    Raises:
        ValueError: there is none; says which there are.
    """
    kind = raw.get("model_type") if isinstance(raw, Mapping) else None
    if kind not in families:
        raise ValueError(
            f"model_type={kind!r} has no weight map: there are {', '.join(families)}"
        )
    return families[kind]


def read(
    folder: str | Path, families: Mapping[str, Family] = FAMILIES
) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """A Hugging Face folder of any family as our Llama's shape and tensors.

    Raises:
        FileNotFoundError: it holds no config.json or no safetensors.
        ValueError: something does not fit; the message names the folder.
    """
    folder = Path(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: not a checkpoint folder")
    raw = checkpoint.read_json(file)
    try:
        family = family_of(raw, families)
        config = family.config(raw)
        state = checkpoint.read_state(folder)
        return convert(family.rows(raw), state, config)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: {error}") from None


def load(folder: str | Path, families: Mapping[str, Family] = FAMILIES) -> Llama:
    """A checkpoint of any family as our Llama, in eval mode; raises as `read`."""
    return as_model(*read(folder, families))


def as_model(config: LlamaConfig, state: dict[str, Tensor]) -> Llama:
    """A Llama on these tensors, which are not copied."""
    with torch.device("meta"):
        model = Llama(config)
    return checkpoint.fill(model, state).eval()


def table(rows: Sequence[Row]) -> str:
    """A map, to be read."""
    lines = []
    for row in rows:
        names = [name.removeprefix(LAYER) for name in row.targets]
        factor = "" if row.factor == 1 else f" × {row.factor:g}"
        source = row.source.removeprefix(LAYER) or "–"
        lines.append(f"{source:32} {row.how + factor:12} {', '.join(names)}")
    return "\n".join(lines)
