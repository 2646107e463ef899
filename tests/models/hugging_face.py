"""The same model twice: ours, and transformers' with the same weights."""

from __future__ import annotations

import torch

from llmlab.models.checkpoint import config_to_hf
from llmlab.models.llama import Llama, LlamaConfig

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VARIANTS = {
    "plain": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 12, "num_key_value_heads": 2},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "a factor for each frequency": {
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.5, 3.0, 8.0],
            "long_factor": [1.0, 1.5, 3.0, 8.0],
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": 2048,
        },
    },
    "llama3 rope": {
        "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}


def make(seed: int = 0, **changes) -> Llama:
    """A small random Llama whose norms and biases are not what they start as."""
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(**SMALL | {"initializer_range": 0.2} | changes)).eval()
    for name, p in model.named_parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=float("norm" in name), std=0.2)
    return model


def theirs(model: Llama):
    """transformers' model with the weights of ours."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    hf = LlamaForCausalLM(HFConfig(**config_to_hf(model.config))).eval()
    missing, extra = hf.load_state_dict(model.state_dict(), strict=False)
    assert not extra and not missing
    return hf


def named(value: object) -> str:
    """A parameter's name in a test's title: the same in every process."""
    return getattr(value, "__name__", str(value))[:24]
