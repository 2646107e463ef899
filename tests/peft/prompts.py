"""The four methods that give a model virtual tokens, each beside its counterpart in
`peft`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmlab.peft.p_tuning import p_tuning, p_tuning_v2
from llmlab.peft.prompt_and_prefix_tuning import (
    prefix_tuning,
    prompt_tuning,
    virtual_tokens,
)
from tests.peft.conftest import make_hf, make_llama

# name: (module, our config, peft's class, its settings)
CASES = {
    "prompt": (
        prompt_tuning,
        prompt_tuning.PromptTuningConfig(5),
        "PromptTuningConfig",
        {"num_virtual_tokens": 5},
    ),
    "prefix": (
        prefix_tuning,
        prefix_tuning.PrefixTuningConfig(3, hidden=9),
        "PrefixTuningConfig",
        {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 9},
    ),
    "prefix without a network": (
        prefix_tuning,
        prefix_tuning.PrefixTuningConfig(4, projection=False),
        "PrefixTuningConfig",
        {"num_virtual_tokens": 4},
    ),
    "p-tuning, MLP": (
        p_tuning,
        p_tuning.PTuningConfig(5, hidden=9),
        "PromptEncoderConfig",
        {"num_virtual_tokens": 5, "encoder_hidden_size": 9},
    ),
    "p-tuning, MLP of the default width": (
        p_tuning,
        p_tuning.PTuningConfig(2),
        "PromptEncoderConfig",
        {"num_virtual_tokens": 2},
    ),
    "p-tuning, LSTM": (
        p_tuning,
        p_tuning.PTuningConfig(5, encoder="LSTM", hidden=7, lstm_layers=3),
        "PromptEncoderConfig",
        {
            "num_virtual_tokens": 5,
            "encoder_hidden_size": 7,
            "encoder_reparameterization_type": "LSTM",
            "encoder_num_layers": 3,
        },
    ),
    "p-tuning v2": (
        p_tuning_v2,
        p_tuning_v2.PTuningV2Config(6),
        "PrefixTuningConfig",
        {"num_virtual_tokens": 6},
    ),
}
MAKE = {"ours": make_llama, "transformers": make_hf}


def build(name, kind="ours", **shape):
    """(adapted model, its encoder), drawn from a fixed generator."""
    module, config, _, _ = CASES[name]
    model = MAKE[kind](**shape)
    module.apply(model, config, generator=torch.Generator().manual_seed(5))
    return model, model.virtual_tokens.encoders["default"]


def build_peft(name, encoder, base=None, **shape):
    """`peft`'s model (on `base`, or on that of `make_hf`) with the numbers of our
    encoder, and its encoder.
    """
    import peft

    _, _, cls, settings = CASES[name]
    model = peft.get_peft_model(
        base or make_hf(**shape), getattr(peft, cls)(task_type="CAUSAL_LM", **settings)
    ).eval()
    theirs = model.prompt_encoder["default"]
    theirs.load_state_dict(peft_names(encoder.state_dict()))
    return model, theirs


def peft_names(state):
    return {
        name.replace("embedding", "embedding.weight"): value
        for name, value in state.items()
    }


def logits_of(model, *args, **kwargs):
    return getattr(out := model(*args, **kwargs), "logits", out)


def loss_of(logits, tokens):
    return F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten()
    )


def real_tokens(logits, tokens):
    """`peft` gives logits for shallow virtual tokens too; ours gives those of the real
    ones.
    """
    return logits[:, -tokens.shape[1] :]


def vectors(model, adapter="default"):
    return virtual_tokens.vectors_of(model.virtual_tokens.encoders[adapter])
