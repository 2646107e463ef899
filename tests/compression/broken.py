"""Small models that no method of compression can take, or that are on its edge."""

from __future__ import annotations

import torch
from torch import nn

from llmlab.models.llama import Llama
from tests.models.hugging_face import theirs


def with_adapter(model: Llama) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(theirs(model), LoraConfig(target_modules=["q_proj"]))


def not_finite(model: Llama) -> Llama:
    model.model.layers[1].mlp.down_proj.weight.data[0, 3] = torch.nan
    return model


def zeros(model: Llama) -> Llama:
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    return model


def no_input(model: Llama) -> Llama:
    model.model.layers[1].post_attention_layernorm.weight.data.zero_()
    return model
