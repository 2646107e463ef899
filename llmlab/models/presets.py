"""The shapes of published Llamas, as data.

Sizes are those of the papers' tables and of the checkpoints' `config.json`: LLaMA,
https://arxiv.org/abs/2302.13971, table 2; Llama 2, https://arxiv.org/abs/2307.09288;
Llama 3, https://arxiv.org/abs/2407.21783, table 3; Mistral 7B,
https://arxiv.org/abs/2310.06825; SmolLM2, https://arxiv.org/abs/2502.02737; TinyLlama,
https://arxiv.org/abs/2401.02385.

Columns of the table:

    name
    vocab      vocab_size
    d          hidden_size
    f          intermediate_size
    L          num_hidden_layers
    H          num_attention_heads
    K          num_key_value_heads
    context    max_position_embeddings
    θ          rope_theta
    more       further settings
"""

from __future__ import annotations

from llmlab.models.llama import LlamaConfig

_LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA32_ROPE = _LLAMA31_ROPE | {"factor": 32.0}
_EPS5 = {"rms_norm_eps": 1e-5}
_TIED = {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}
_COURSE = {"tie_word_embeddings": True}
_31 = _EPS5 | {"rope_scaling": _LLAMA31_ROPE}
_32 = _TIED | {"rope_scaling": _LLAMA32_ROPE}

# fmt: off
_ROWS = [
    # name             vocab   d      f      L   H   K   context θ    more
    # for tests: a forward pass in a millisecond
    ("tiny",           97,     32,    88,    2,  4,  2,  64,     1e4, {}),
    ("course",         2048,   128,   384,   4,  4,  2,  256,    1e4, _COURSE),
    ("smollm2-135m",   49152,  576,   1536,  30, 9,  3,  8192,   1e5, _TIED),
    ("smollm2-360m",   49152,  960,   2560,  32, 15, 5,  8192,   1e5, _TIED),
    ("smollm2-1.7b",   49152,  2048,  8192,  24, 32, 32, 8192,   130000.0, _TIED),
    ("tinyllama-1.1b", 32000,  2048,  5632,  22, 32, 4,  2048,   1e4, _EPS5),
    ("llama-7b",       32000,  4096,  11008, 32, 32, 32, 2048,   1e4, {}),
    ("llama-13b",      32000,  5120,  13824, 40, 40, 40, 2048,   1e4, {}),
    ("llama-33b",      32000,  6656,  17920, 60, 52, 52, 2048,   1e4, {}),
    ("llama-65b",      32000,  8192,  22016, 80, 64, 64, 2048,   1e4, _EPS5),
    ("llama-2-7b",     32000,  4096,  11008, 32, 32, 32, 4096,   1e4, _EPS5),
    ("llama-2-13b",    32000,  5120,  13824, 40, 40, 40, 4096,   1e4, _EPS5),
    ("llama-2-70b",    32000,  8192,  28672, 80, 64, 8,  4096,   1e4, _EPS5),
    ("llama-3-8b",     128256, 4096,  14336, 32, 32, 8,  8192,   5e5, _EPS5),
    ("llama-3-70b",    128256, 8192,  28672, 80, 64, 8,  8192,   5e5, _EPS5),
    ("llama-3.1-8b",   128256, 4096,  14336, 32, 32, 8,  131072, 5e5, _31),
    ("llama-3.1-70b",  128256, 8192,  28672, 80, 64, 8,  131072, 5e5, _31),
    ("llama-3.1-405b", 128256, 16384, 53248, 126, 128, 8, 131072, 5e5, _31),
    ("llama-3.2-1b",   128256, 2048,  8192,  16, 32, 8,  131072, 5e5, _32),
    ("mistral-7b-v0.3", 32768, 4096,  14336, 32, 32, 8,  32768,  1e6, _EPS5),
]
# fmt: on

PRESETS = {
    name: LlamaConfig(
        vocab_size=vocab,
        hidden_size=d,
        intermediate_size=f,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=K,
        max_position_embeddings=context,
        rope_theta=theta,
        **more,
    )
    for name, vocab, d, f, L, H, K, context, theta, more in _ROWS
}


def preset(name: str) -> LlamaConfig:
    """The shape of a published model by name; `PRESETS` lists them.

    Raises:
        ValueError: there is no preset of that name.
    """
    if name not in PRESETS:
        raise ValueError(
            f"name={name!r} is not a preset: use one of {', '.join(PRESETS)}"
        )
    return PRESETS[name]
