"""What papers say their methods train or hold, counted again from the shapes.

Each function here is one rule of counting; `OURS` gives them names, for tables that are
kept as data. Sizes:

    d  width of the model
    f  width of the feed-forward network
    L  layers (a decoder layer with cross-attention counts both attentions)
    r  rank
    n  matrices per layer that get a pair
    p  virtual tokens
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmlab.models.accounting import adam_bytes, parameters
from llmlab.models.llama import Llama
from llmlab.models.presets import preset
from llmlab.peft import lora
from llmlab.peft.qlora import nf4


def low_rank(L: int, d: int, r: int, n: int, out: int | None = None) -> int:
    """LoRA: L · n pairs of (r, d) and (out, r)."""
    return L * n * r * (d + (d if out is None else out))


def low_rank_llama(name: str, r: int) -> int:
    """LoRA on q_proj and v_proj of a published Llama, counted on the model itself
    (without its weights).
    """
    with torch.device("meta"):
        return lora.num_parameters(Llama(preset(name)), lora.LoRAConfig(r=r))


def low_rank_with_heads(
    L: int, d: int, r: int, n: int, labels: int, heads: int = 1
) -> int:
    """LoRA and a label head with a bias, `heads` times."""
    return low_rank(L, d, r, n) + heads * labels * (d + 1)


def prompt(p: int, d: int) -> int:
    """Prompt Tuning: one row of the embedding for each virtual token."""
    return p * d


def prefix(L: int, p: int, d: int, labels: int = 0) -> int:
    """Prefix Tuning without a network: a key and a value in each layer, and a label
    head with a bias if there is one.
    """
    return L * 2 * p * d + labels * (d + 1)


def scales(attentions: int, d: int, layers: int, ff: int) -> int:
    """(IA)³: a vector for k and one for v in each attention, and one of width `ff` in
    each feed-forward network.
    """
    return attentions * 2 * d + layers * ff


def bert_biases(L: int, d: int, f: int) -> int:
    """BitFit on BERT: q, k, v, o, the two linears of the MLP, two LayerNorms a layer,
    one above the embedding, the pooler.
    """
    return L * (4 * d + f + d + 2 * d) + d + d


def bert_parameters(
    L: int, d: int, f: int, vocabulary: int, positions: int = 512
) -> int:
    """All of BERT without a label head."""
    # the LayerNorms' gains are the 2d and the d
    matrices = L * (4 * d * d + 2 * d * f + 2 * d) + d * d + d
    return (vocabulary + positions + 2) * d + matrices + bert_biases(L, d, f)


def bert_bias_percent(L: int, d: int, f: int, vocabulary: int) -> float:
    """What BitFit trains of BERT, in percent."""
    return 100 * bert_biases(L, d, f) / bert_parameters(L, d, f, vocabulary)


def double_quantization_bits(block: int) -> float:
    """Bits a weight that double quantisation saves."""
    return nf4.bits_per_weight(block, double=False) - nf4.bits_per_weight(
        block, double=True
    )


def double_quantization_bytes(name: str, block: int) -> float:
    """The same in bytes, for all weights of a published Llama."""
    return double_quantization_bits(block) / 8 * parameters(preset(name))


def sixteen_bit_bytes(name: str) -> int:
    """Weights, gradients (2 bytes each) and Adam's two averages (4 each) of a published
    Llama: no fp32 master copy.
    """
    kinds = adam_bytes(preset(name))
    return sum(kinds.values()) - kinds["master weights"]


OURS: dict[str, Callable[..., float]] = {
    "low_rank": low_rank,
    "low_rank_llama": low_rank_llama,
    "low_rank_with_heads": low_rank_with_heads,
    "prompt": prompt,
    "prefix": prefix,
    "scales": scales,
    "bert_bias_percent": bert_bias_percent,
    "double_quantization_bits": double_quantization_bits,
    "double_quantization_bytes": double_quantization_bytes,
    "sixteen_bit_bytes": sixteen_bit_bytes,
}
