"""MAM, "mix and match": a short prefix for attention, a wide adapter beside the MLP.

He et al. 2022, https://arxiv.org/abs/2110.04366, section 4.6: soft prompts work well in
attention with few parameters, the MLP makes better use of many, so give each what suits
it:

    K ← [P_K; K],  V ← [P_V; V]      in every layer, p = 30
    m ← MLP(x) + s · A(x)            with a bottleneck of 512, s = 4

    P  the prefix           A  the bottleneck      x  what the MLP reads
    p  virtual tokens       s  its scale           m  what the MLP gives

It is a combination: `prefix_tuning.py` makes the prefix, `parallel_adapter.py` the
adapter; both go by one name.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llmlab.peft import checkpoint
from llmlab.peft.adapters import (
    ParallelAdapterConfig,
    bottleneck,
    files,
    parallel_adapter,
)
from llmlab.peft.prompt_and_prefix_tuning import (
    PrefixTuningConfig,
    prefix_tuning,
    virtual_tokens,
)

PEFT_TYPE = "MAM"
PREFIX = "virtual_tokens.prompt_embeddings"


@dataclass(frozen=True)
class MAMConfig:
    """A prefix and a parallel adapter."""

    num_virtual_tokens: int = 30
    # train the prefix through a network, of which a saved file keeps only the result
    projection: bool = True
    hidden: int | None = 800
    bottleneck: int = 512
    scale: float = 4.0
    activation: str = "relu"
    # or "residual": what the adapter reads, see parallel_adapter.py
    reads: str = "normed"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        # either raises where its settings are wrong
        for part in ("prefix", "adapter"):
            getattr(self, part)

    @property
    def prefix(self) -> PrefixTuningConfig:
        """The prefix's settings."""
        return PrefixTuningConfig(self.num_virtual_tokens, self.projection, self.hidden)

    @property
    def adapter(self) -> ParallelAdapterConfig:
        """The parallel adapter's settings."""
        return ParallelAdapterConfig(
            bottleneck=self.bottleneck,
            scale=self.scale,
            activation=self.activation,
            reads=self.reads,
            dropout=self.dropout,
        )


def apply(
    model: nn.Module,
    config: MAMConfig,
    adapter: str = "default",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Freeze `model` and give it both parts, which are active from now on.

    `model` is our Llama or transformers'.

    Raises:
        ValueError: the name is taken or bad, or `model` is no Llama.
    """
    virtual_tokens.check_new(model, adapter)
    bottleneck.check_new(model, adapter)
    parallel_adapter.apply(model, config.adapter, adapter, generator)
    prefix_tuning.apply(model, config.prefix, adapter, generator)
    for site in bottleneck.sites(model).values():
        if adapter in site.configs:
            site.configs[adapter] = config
    set_adapter(model, adapter)
    return model


def adapters(model: nn.Module) -> list[str]:
    """The names of the MAM adapters on `model`."""
    found: dict[str, object] = {}
    for site in bottleneck.sites(model).values():
        found.update(site.configs)
    return [name for name, config in found.items() if isinstance(config, MAMConfig)]


def set_adapter(model: nn.Module, adapter: str | None) -> None:
    """Make this adapter the active one, which alone trains. None: the plain base."""
    bottleneck.set_active(model, adapter)
    virtual_tokens.set_adapter(model, adapter)


def remove(model: nn.Module, adapter: str | None = None) -> nn.Module:
    """Take one adapter off, or all of them.

    Without adapters `model` is the base again, bit for bit (still frozen).
    """
    names = adapters(model) if adapter is None else [adapter]
    for name in names:
        virtual_tokens.get(model, name)  # raises where there is none
        bottleneck.discard(model, [name])
        virtual_tokens.remove(model, name)
    return model


def num_parameters(model: nn.Module, config: MAMConfig) -> int:
    """What `apply` would train."""
    beside_mlp = parallel_adapter.num_parameters(model, config.adapter)
    return beside_mlp + prefix_tuning.num_parameters(model, config.prefix)


def save(model: nn.Module, folder: str | Path, adapter: str = "default") -> None:
    """Write both parts of one adapter to one folder (safetensors)."""
    tensors = files.tensors(model, adapter)
    encoder, _ = virtual_tokens.get(model, adapter)
    tensors[PREFIX] = virtual_tokens.vectors_of(encoder)
    settings = dataclasses.asdict(files.config_of(model, adapter))
    settings |= {
        "projection": False,
        "hidden": None,
        "peft_type": PEFT_TYPE,
        "base_model_name_or_path": checkpoint.base_name(model),
    }
    checkpoint.write(folder, settings, tensors)


def load(model: nn.Module, folder: str | Path, adapter: str = "default") -> nn.Module:
    """Put an adapter from a folder on `model` and make it the active one.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another method's adapter, or one of a model of another shape. The
            model is then as it was.
    """
    settings, tensors = checkpoint.read(folder, PEFT_TYPE)
    config = files.settings_of(MAMConfig, settings)
    width = virtual_tokens.shape_of(model).deep_width
    prefix = {PREFIX: tensors.pop(PREFIX)} if PREFIX in tensors else {}
    checkpoint.check_tensors(prefix, {PREFIX: (config.num_virtual_tokens, width)})
    apply(model, config, adapter)
    files.fill(model, adapter, tensors, undo=lambda: remove(model, adapter))
    encoder, _ = virtual_tokens.get(model, adapter)
    with torch.no_grad():
        encoder.embedding.copy_(prefix[PREFIX])
    return model
