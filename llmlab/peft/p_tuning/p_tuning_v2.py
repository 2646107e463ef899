"""P-Tuning v2: a prompt in every layer, and a label head.

Liu et al. 2022, https://arxiv.org/abs/2110.07602, section 3: prompts only at the input
have few numbers to train and act on the output from afar. So each layer gets its own,
as prefix keys and values, and

    label scores = W h_t + b

instead of words of the vocabulary that stand for labels. No reparameterisation by
default (section 3.3: it helps on some tasks and hurts on others).

    h_t  the last layer's state of token t    L  layers
    W, b trained, drawn at random             K  key/value heads
    p    virtual tokens                       D  head_dim
    d    hidden_size                          C  labels

One score vector comes for each token; for a label of the whole text take that of the
last token, `label_head.last_token`. `peft` has this as PrefixTuningConfig on
LlamaForSequenceClassification (no bias) and LlamaForTokenClassification (bias); files
open in both directions. Simplified: no multi-task training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llmlab.peft import label_head
from llmlab.peft.prompt_and_prefix_tuning import (
    adapters,
    embedding_of,
    files,
    fold,
    prefixes,
    remove,
    set_adapter,
    shape_of,
    virtual_tokens,
)

__all__ = [
    "PTuningV2Config",
    "adapters",
    "apply",
    "fold",
    "load",
    "num_parameters",
    "remove",
    "save",
    "set_adapter",
]


@dataclass(frozen=True)
class PTuningV2Config:
    """How long the prompts are, and how many labels there are to tell apart."""

    num_virtual_tokens: int = 20
    num_labels: int | None = None  # None: no head, the model goes on predicting tokens
    # whether every token has a label (then the head has a bias, as in transformers)
    per_token: bool = False
    projection: bool = False
    hidden: int | None = None  # the network's width; None: K·D
    # start from the keys and values of these tokens, not from noise
    init_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_virtual_tokens", "num_labels", "hidden"):
            value = getattr(self, name)
            optional = name != "num_virtual_tokens" and value is None
            if not (isinstance(value, int) and value >= 1) and not optional:
                raise ValueError(
                    f"{name} must be an integer of at least 1, not {value!r}"
                )
        if self.init_tokens and (
            self.projection or len(self.init_tokens) != self.num_virtual_tokens
        ):
            raise ValueError(
                f"init_tokens has {len(self.init_tokens)} ids: it needs"
                f" num_virtual_tokens={self.num_virtual_tokens} of them, and"
                " projection=False"
            )


def make_encoder(
    model: nn.Module, config: PTuningV2Config, generator: torch.Generator | None = None
) -> nn.Module:
    """What makes the prompts (p, 2·L·K·D), with the label head as its `head`."""
    shape = shape_of(model)
    p = config.num_virtual_tokens
    width = shape.deep_width  # 2·L·K·D
    d = shape.heads * shape.head_dim
    if config.projection:
        encoder = prefixes.PrefixMLP(p, d, config.hidden or d, width, generator)
    elif config.init_tokens:
        prefix = virtual_tokens.of_text(model, config.init_tokens)
        encoder = virtual_tokens.Table(prefix, deep=True)
    else:
        prefix = torch.randn(p, width, generator=generator)
        encoder = virtual_tokens.Table(prefix, deep=True)
    if config.num_labels:
        encoder.head = label_head.make_head(
            shape.d, config.num_labels, config.per_token, generator
        )
    return encoder.to(embedding_of(model).weight.device)


def apply(
    model: nn.Module,
    config: PTuningV2Config,
    adapter: str = "default",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Freeze `model` and put prompts in every layer.

    `model` is our Llama or transformers'. With labels, it now gives (B, T, C).

    Raises:
        ValueError: the adapter exists or has a bad name, or `model` is no Llama.
    """
    virtual_tokens.check_new(model, adapter)
    encoder = make_encoder(model, config, generator)
    return virtual_tokens.install(model, encoder, config, adapter)


def num_parameters(model: nn.Module, config: PTuningV2Config) -> int:
    """What `apply` would train: the prompts, or their network, and the label head."""
    shape = shape_of(model)
    p = config.num_virtual_tokens
    width = shape.deep_width
    prompts = p * width
    if config.projection:
        d = shape.heads * shape.head_dim
        hidden = config.hidden or d
        prompts = p * d + (d + 1) * hidden + (hidden + 1) * width
    labels = config.num_labels or 0
    return prompts + labels * (shape.d + config.per_token)


def save(model: nn.Module, folder: str | Path, adapter: str = "default") -> None:
    """Write prompts and head as `peft` does for its PrefixTuningConfig."""
    _, config = virtual_tokens.get(model, adapter)
    settings = {
        "prefix_projection": config.projection,
        "encoder_hidden_size": config.hidden,
    }
    files.save(model, folder, adapter, "PREFIX_TUNING", settings)


def load(model: nn.Module, folder: str | Path, adapter: str = "default") -> nn.Module:
    """Put prompts, and a head where there is one, from a folder, ours or `peft`'s, on
    `model`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another method's adapter, or one of a model of another shape. The
            model is then as it was.
    """
    settings, encoder = files.read(model, folder, "PREFIX_TUNING")
    labels, per_token = files.labels_of(encoder)
    config = PTuningV2Config(settings["num_virtual_tokens"], labels, per_token)
    return virtual_tokens.install(model, encoder, config, adapter)
