"""Prefix Tuning: train the keys and values that every layer sees before the input.

Li & Liang 2021, https://arxiv.org/abs/2101.00190, equation 3: at a position i of the
prefix the activation is

    h_i = P_θ[i, :]        and later tokens attend to it in each of the L layers

Trained directly, P is unstable; section 4.3 trains P_θ[i, :] = MLP_θ(P'_θ[i, :]) and
keeps only P in the end.

    p  virtual tokens    K  key/value heads    P   (p, 2·L·K·D)
    L  layers            D  head_dim           P'  (p, K·D)

P' is K·D wide, as in `peft`. Without the network P starts as the activations of a text
("text", section 7.4), as noise N(0, 1) as in `peft`, or at zero, which is not neutral:
a key of 0 still takes its share of the attention. "text" is exact: the model then
answers as if the text stood before the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llmlab.peft.prompt_and_prefix_tuning import files, prefixes, virtual_tokens
from llmlab.peft.prompt_and_prefix_tuning.virtual_tokens import (
    adapters,
    embedding_of,
    fold,
    remove,
    set_adapter,
    shape_of,
)

__all__ = [
    "PrefixTuningConfig",
    "adapters",
    "apply",
    "fold",
    "load",
    "num_parameters",
    "remove",
    "save",
    "set_adapter",
]
STARTS = ("random", "text", "zero")


@dataclass(frozen=True)
class PrefixTuningConfig:
    """How long the prefix is, and how it is made."""

    num_virtual_tokens: int = 20
    projection: bool = True  # train P through a network; False: train P itself
    hidden: int | None = None  # the network's width; None: that of P', K·D
    init: str = "random"  # "text" and "zero" need projection=False
    init_tokens: tuple[int, ...] = ()  # for "text": num_virtual_tokens token ids

    def __post_init__(self) -> None:
        for name in ("num_virtual_tokens", "hidden"):
            value = getattr(self, name)
            if name == "hidden" and value is None:
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"{name} must be an integer of at least 1, not {value!r}"
                )
        if self.init not in STARTS:
            raise ValueError(
                f"init={self.init!r} must be one of {', '.join(map(repr, STARTS))}"
            )
        if self.projection and self.init != "random":
            raise ValueError(
                f"init={self.init!r} needs projection=False: it says what P is, not"
                " what P' is"
            )
        if self.init == "text" and len(self.init_tokens) != self.num_virtual_tokens:
            raise ValueError(
                f"init='text' has {len(self.init_tokens)} init_tokens for"
                f" num_virtual_tokens={self.num_virtual_tokens}"
            )


def make_encoder(
    model: nn.Module,
    config: PrefixTuningConfig,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """What makes P (p, 2·L·K·D) for `model`: a network or a table."""
    shape = shape_of(model)
    p = config.num_virtual_tokens
    width = shape.deep_width  # 2·L·K·D
    d = shape.heads * shape.head_dim
    if config.projection:
        encoder = prefixes.PrefixMLP(p, d, config.hidden or d, width, generator)
    elif config.init == "text":
        prefix = virtual_tokens.of_text(model, config.init_tokens)
        encoder = virtual_tokens.Table(prefix, deep=True)
    else:
        scale = 0.0 if config.init == "zero" else 1.0
        prefix = scale * torch.randn(p, width, generator=generator)
        encoder = virtual_tokens.Table(prefix, deep=True)
    return encoder.to(embedding_of(model).weight.device)


def apply(
    model: nn.Module,
    config: PrefixTuningConfig,
    adapter: str = "default",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Freeze `model` and put a prefix before every layer's keys and values.

    `model` is our Llama or transformers'.

    Raises:
        ValueError: the adapter exists or has a bad name, or `model` is no Llama.
    """
    virtual_tokens.check_new(model, adapter)
    encoder = make_encoder(model, config, generator)
    return virtual_tokens.install(model, encoder, config, adapter)


def num_parameters(model: nn.Module, config: PrefixTuningConfig) -> int:
    """What `apply` would train: p · 2·L·K·D, or P' and the network's two linears."""
    shape = shape_of(model)
    p = config.num_virtual_tokens
    d = shape.heads * shape.head_dim
    width = shape.deep_width
    if not config.projection:
        return p * width
    hidden = config.hidden or d
    return p * d + (d + 1) * hidden + (hidden + 1) * width


def save(model: nn.Module, folder: str | Path, adapter: str = "default") -> None:
    """Write one prefix as `peft` does, P alone: `PeftModel.from_pretrained(base,
    folder)` opens it.
    """
    _, config = virtual_tokens.get(model, adapter)
    settings = {
        "prefix_projection": config.projection,
        "encoder_hidden_size": config.hidden,
    }
    files.save(model, folder, adapter, "PREFIX_TUNING", settings)


def load(model: nn.Module, folder: str | Path, adapter: str = "default") -> nn.Module:
    """Put a prefix from a folder, ours or `peft`'s, on `model`. A file holds P, so no
    network comes back.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another method's adapter, or one of a model of another shape. The
            model is then as it was.
    """
    settings, table = files.read(model, folder, "PREFIX_TUNING")
    if files.labels_of(table)[0]:
        raise ValueError(f"{folder} has a label head: p_tuning_v2.load opens it")
    config = PrefixTuningConfig(settings["num_virtual_tokens"], projection=False)
    return virtual_tokens.install(model, table, config, adapter)
