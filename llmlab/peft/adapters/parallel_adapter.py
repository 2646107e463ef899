"""The parallel adapter: a bottleneck beside the MLP, from its input to its output.

He et al. 2022, https://arxiv.org/abs/2110.04366, table 1:

    out ← MLP(x) + s · (W_up f(W_down x + b) + b')

    x       (…, d)  the MLP's input
    W_down  (m, d)  trained
    W_up    (d, m)  trained, 0 at the start
    s               scale, 4 in the paper

LoRA on W_down or W_up of the MLP is its relative without f. In a post-norm model, as
the paper's BART, the MLP reads the stream itself; in a pre-norm one as Llama it reads
the normed stream, which is the default here. The `adapters` library takes the stream
before the norm: reads="residual" does the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llmlab.peft import checkpoint
from llmlab.peft.adapters import bottleneck, files
from llmlab.peft.adapters.bottleneck import names as adapters

PEFT_TYPE = "PARALLEL_ADAPTER"
READS = {"normed": "beside_mlp", "residual": "beside_mlp_residual"}


@dataclass(frozen=True)
class ParallelAdapterConfig:
    """How wide, how strong, and what it reads."""

    bottleneck: int = 512
    scale: float = 4.0
    activation: str = "relu"
    reads: str = "normed"  # or "residual"
    init: str = "zero"  # as LoRA: W_up = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.reads not in READS:
            raise ValueError(
                f"reads={self.reads!r} must be one of {', '.join(map(repr, READS))}"
            )
        bottleneck.check(self)


def apply(
    model: nn.Module,
    config: ParallelAdapterConfig,
    adapter: str = "default",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Freeze `model` and put an adapter beside every MLP, active from now on.

    `model` is our Llama or transformers'.

    Raises:
        ValueError: the adapter exists or has a bad name, or `model` is no Llama.
    """
    bottleneck.blocks(model)  # raises where there are none
    d = model.config.hidden_size
    shape = bottleneck.Shape(
        d,
        config.bottleneck,
        config.activation,
        config.scale,
        config.init,
        config.dropout,
    )
    return bottleneck.install(
        model, [READS[config.reads]], shape, config, adapter, generator
    )


def set_adapter(model: nn.Module, adapter: str | None) -> None:
    """Make this adapter the active one, which alone trains. None: the plain base."""
    bottleneck.set_active(model, adapter)


def remove(model: nn.Module, adapter: str = "default") -> nn.Module:
    """Take one adapter off.

    Without adapters `model` is the base again, bit for bit (still frozen).
    """
    if adapter not in adapters(model):
        raise ValueError(
            f"adapter={adapter!r} is not on the model; it has"
            f" {adapters(model) or 'none'}"
        )
    return bottleneck.discard(model, [adapter])


def num_parameters(model: nn.Module, config: ParallelAdapterConfig) -> int:
    """What `apply` would train: 2·m·d + d + m per block."""
    each = bottleneck.count(model.config.hidden_size, config.bottleneck)
    return len(bottleneck.blocks(model)) * each


def save(model: nn.Module, folder: str | Path, adapter: str = "default") -> None:
    """Write one adapter (safetensors)."""
    files.save(model, folder, adapter, PEFT_TYPE)


def load(model: nn.Module, folder: str | Path, adapter: str = "default") -> nn.Module:
    """Put an adapter from a folder on `model` and make it the active one.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another method's adapter, or one of a model of another shape. The
            model is then as it was.
    """
    settings, tensors = checkpoint.read(folder, PEFT_TYPE)
    apply(model, files.settings_of(ParallelAdapterConfig, settings), adapter)
    return files.fill(model, adapter, tensors, undo=lambda: remove(model, adapter))
