"""What a Llama costs: parameters, FLOPs and bytes, counted exactly from its shape.

    B  batch          d  hidden_size           H  query heads
    T  new tokens     f  intermediate_size     K  key/value heads
    S  keys seen,     L  layers                D  head_dim
       cached, new    V  vocabulary            N  parameters

A matrix product of (m × k) by (k × n) is 2·m·k·n FLOPs, a multiplication and an
addition each. Norms, RoPE, softmax and activations are left out, as in Kaplan et al.
2020 (https://arxiv.org/abs/2001.08361) and in PyTorch's FlopCounterMode.
"""

from __future__ import annotations

import torch

from llmlab.models.llama import LlamaConfig

# Bytes a parameter takes in mixed-precision training with Adam: fp16 weight and
# gradient, fp32 weight, momentum and variance (ZeRO, Rajbhandari et al. 2020,
# https://arxiv.org/abs/1910.02054, section 3.1).
ADAM_BYTES = {
    "weights": 2,
    "gradients": 2,
    "master weights": 4,
    "momentum": 4,
    "variance": 4,
}


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of the seven linears of one block."""
    d, f, D = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * D, config.num_key_value_heads * D
    return {
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }


def parameters_by_part(config: LlamaConfig) -> dict[str, int]:
    """Parameters of each part.

    A tied `lm_head` counts 0, its weight being the embedding's.
    """
    V, d, L = config.vocab_size, config.hidden_size, config.num_hidden_layers
    shapes = linear_shapes(config)
    weights = {
        part: sum(m * n for name, (m, n) in shapes.items() if part in name)
        for part in ("self_attn", "mlp")
    }
    biases = {
        part: sum(m for name, (m, _) in shapes.items() if part in name)
        for part in weights
    }
    return {
        "embedding": V * d,
        "attention": (
            L * (weights["self_attn"] + config.attention_bias * biases["self_attn"])
        ),
        "mlp": L * (weights["mlp"] + config.mlp_bias * biases["mlp"]),
        "norms": (2 * L + 1) * d,
        "lm_head": 0 if config.tie_word_embeddings else V * d,
    }


def parameters(config: LlamaConfig) -> int:
    """All parameters, each counted once."""
    return sum(parameters_by_part(config).values())


def forward_flops_by_part(
    config: LlamaConfig, batch: int, seq: int, past: int = 0, logits: int | None = None
) -> dict[str, int]:
    """FLOPs of one forward pass over `seq` new tokens with `past` in the cache.

    Attention counts all S = past + seq keys for every query, masked ones too: a kernel
    that skips the upper triangle does about half of that part. `logits` is the number
    of positions that go through `lm_head` (None: all).
    """
    tokens, S = batch * seq, past + seq
    shapes = linear_shapes(config)
    linear = {
        part: sum(m * n for name, (m, n) in shapes.items() if part in name)
        for part in ("self_attn", "mlp")
    }
    # H·D·S a query
    L, scores = (
        config.num_hidden_layers,
        config.num_attention_heads * config.head_dim * S,
    )
    return {
        "attention linears": 2 * tokens * L * linear["self_attn"],
        "q kᵀ and p v": 2 * 2 * tokens * L * scores,
        "mlp": 2 * tokens * L * linear["mlp"],
        "lm_head": (
            2
            * batch
            * (seq if logits is None else logits)
            * config.vocab_size
            * config.hidden_size
        ),
    }


def forward_flops(
    config: LlamaConfig, batch: int, seq: int, past: int = 0, logits: int | None = None
) -> int:
    """The sum of `forward_flops_by_part`."""
    return sum(forward_flops_by_part(config, batch, seq, past, logits).values())


def training_flops(config: LlamaConfig, batch: int, seq: int) -> int:
    """One forward and one backward pass: each product of the forward needs two in the
    backward, so three times.
    """
    return 3 * forward_flops(config, batch, seq)


def six_n_flops(config: LlamaConfig, tokens: float, seq: int | None = None) -> float:
    """6·N FLOPs a trained token (Kaplan et al. 2020), and with `seq` PaLM's attention
    term 12·L·H·D·T as well.

    N leaves out an input embedding that is only looked up; a tied one is a matrix
    product at the output, and stays. See Chowdhery et al. 2022,
    https://arxiv.org/abs/2204.02311, appendix B.
    """
    multiplied = parameters(config) - (
        0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    )
    heads = config.num_attention_heads * config.head_dim
    attention = 12 * config.num_hidden_layers * heads * seq if seq is not None else 0
    return (6 * multiplied + attention) * tokens


def kv_cache_bytes(
    config: LlamaConfig, batch: int, tokens: int, dtype: torch.dtype = torch.float16
) -> int:
    """Keys and values of `tokens` tokens in every layer: 2·L·K·D numbers per token."""
    numbers = (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    )
    return numbers * batch * tokens * dtype.itemsize


def weight_bytes(config: LlamaConfig, dtype: torch.dtype = torch.float16) -> int:
    """All weights in one dtype."""
    return parameters(config) * dtype.itemsize


def adam_bytes(config: LlamaConfig) -> dict[str, int]:
    """Training state in mixed precision with Adam, by kind: 16 bytes per parameter,
    activations not counted.
    """
    return {kind: each * parameters(config) for kind, each in ADAM_BYTES.items()}
