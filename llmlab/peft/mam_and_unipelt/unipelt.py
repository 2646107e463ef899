"""UniPELT: LoRA, a prefix and an adapter in every layer, each behind a gate that its
input opens.

Mao et al. 2022, https://arxiv.org/abs/2110.07577, section 3:

    g = mean over tokens of σ(w · x + b)  one number for each sequence, layer and method

    W x ← W₀ x + g_L (α/r) B A x       K, V ← [g_P P_K; K], [g_P P_V; V]       h ← h +
                                       g_A A(h)

    x  what the method reads: for the prefix what attention reads      (B, T, d) → g (B, 1, 1)

The mean looks at the whole sequence, later tokens too: right for the paper's encoders,
not for a decoder that is to predict these tokens. `gate_tokens=n` takes the mean over
the first n tokens only; padding never counts. Decoding with a cache keeps the gates of
the prompt. In the `adapters` library the gate stands in the place of α/r: there α = r.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llmlab.models.llama import Llama
from llmlab.peft import checkpoint, lora, walk
from llmlab.peft.adapters import AdapterConfig, bottleneck, files
from llmlab.peft.adapters import adapters as bottlenecks
from llmlab.peft.lora import LoRAConfig
from llmlab.peft.mam_and_unipelt.gates import Call, Gate, GatedLoRALinear, PrefixGates
from llmlab.peft.prompt_and_prefix_tuning import (
    PrefixTuningConfig,
    prefix_tuning,
    virtual_tokens,
)

PEFT_TYPE = "UNIPELT"
PREFIX = "virtual_tokens.prompt_embeddings"


@dataclass(frozen=True)
class UniPELTConfig:
    """The three methods' sizes; those of the paper for a width of 768."""

    num_virtual_tokens: int = 10
    projection: bool = True
    hidden: int | None = 512
    bottleneck: int = 48
    activation: str = "relu"
    init: str = "normal"
    r: int = 8
    alpha: float = 8
    target_modules: walk.Targets = ("q_proj", "v_proj")
    gate_tokens: int | None = None  # None: all tokens, as published
    dropout: float = 0.0  # on LoRA's input and on what the adapter adds

    def __post_init__(self) -> None:
        _ = self.prefix, self.adapter, self.lora  # each says what is wrong
        if self.gate_tokens is not None and (
            not isinstance(self.gate_tokens, int) or self.gate_tokens < 1
        ):
            raise ValueError(
                "gate_tokens must be None or an integer of at least 1, not"
                f" {self.gate_tokens!r}"
            )

    @property
    def prefix(self) -> PrefixTuningConfig:
        """The prefix's settings."""
        return PrefixTuningConfig(self.num_virtual_tokens, self.projection, self.hidden)

    @property
    def adapter(self) -> AdapterConfig:
        """The adapter's settings: Pfeiffer's place."""
        return AdapterConfig(
            "pfeiffer", self.bottleneck, self.activation, self.init, self.dropout
        )

    @property
    def lora(self) -> LoRAConfig:
        """LoRA's settings."""
        return LoRAConfig(self.r, self.alpha, self.dropout, self.target_modules)


class UniPELT(walk.Wrapper):
    """What one model's UniPELT adapters share: their settings, and the eyes of their
    gates.
    """

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.call, self.configs = Call(), {}
        self.active: str | None = None

    def before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Pre-hook of the model: which tokens are real, and whether the cache holds a
        prompt already.
        """
        given = (
            dict(zip(inspect.signature(model.forward).parameters, args, strict=False))
            | kwargs
        )
        new = (
            given["inputs_embeds"]
            if given.get("input_ids") is None
            else given["input_ids"]
        )
        mask = given.get("attention_mask")
        self.call.mask = None if mask is None else mask[:, -new.shape[1] :]
        cache = given.get("cache" if isinstance(model, Llama) else "past_key_values")
        stored = (
            0
            if cache is None
            else cache.length
            if isinstance(model, Llama)
            else cache.get_seq_length()
        )
        p = self.configs[self.active].num_virtual_tokens if self.active else 0
        self.call.continues = stored > p  # the prefix alone is no prompt


def apply(
    model: nn.Module,
    config: UniPELTConfig,
    adapter: str = "default",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Freeze `model` (ours or transformers' Llama) and give it all three methods,
    gated, the active ones from now on.

    Raises:
        ValueError: the name is taken or bad, a target names no linear, or `model` has
            plain LoRA adapters.
    """
    virtual_tokens.check_new(model, adapter)
    bottleneck.check_new(model, adapter)
    layers = walk.find(model, config.target_modules)
    if any(
        isinstance(layer, lora.LoRALinear) and not isinstance(layer, GatedLoRALinear)
        for layer in layers.values()
    ):
        raise ValueError(
            "model has plain LoRA adapters on the same layers: remove them first"
        )
    if not hasattr(model, "unipelt"):
        model.unipelt = UniPELT()
        model.register_forward_pre_hook(model.unipelt.before, with_kwargs=True)
    model.unipelt.configs[adapter] = config
    bottlenecks.apply(model, config.adapter, adapter, generator)
    prefix_tuning.apply(model, config.prefix, adapter, generator)
    for name, layer in layers.items():
        if not isinstance(layer, GatedLoRALinear):
            layer = GatedLoRALinear(layer)
            walk.replace(model, name, layer)
        layer.add(adapter, config.lora, name, generator)
        layer.gates[adapter] = _gate(
            model, config, walk.base_of(layer).in_features, generator
        )
    for i, block in enumerate(bottleneck.blocks(model)):
        if not hasattr(block, "prefix_gates"):
            block.prefix_gates = PrefixGates(i)
            block.self_attn.register_forward_pre_hook(
                block.prefix_gates.before, with_kwargs=True
            )
        block.prefix_gates.gates[adapter] = _gate(
            model, config, model.config.hidden_size, generator
        )
        block.after_block.nets[adapter].gate = _gate(
            model, config, model.config.hidden_size, generator
        )
    set_adapter(model, adapter)
    return model


def _gate(
    model: nn.Module, config: UniPELTConfig, d: int, generator: torch.Generator | None
) -> Gate:
    like = walk.base_of(bottleneck.blocks(model)[0].mlp.down_proj).weight
    return Gate(d, like, model.unipelt.call, config.gate_tokens, generator)


def adapters(model: nn.Module) -> list[str]:
    """The names of the UniPELT adapters on `model`, in the order they came."""
    return list(model.unipelt.configs) if hasattr(model, "unipelt") else []


def set_adapter(model: nn.Module, adapter: str | None) -> None:
    """Make this adapter the active one, which alone trains. None: the plain base."""
    if adapter is not None:
        _known(model, adapter)
    model.unipelt.active = adapter
    bottleneck.set_active(model, adapter)
    virtual_tokens.set_adapter(model, adapter)
    lora.set_adapter(model, [] if adapter is None else adapter)
    gated = walk.installed(model, GatedLoRALinear) | walk.installed(model, PrefixGates)
    for place in gated.values():
        for name, gate in place.gates.items():
            gate.requires_grad_(name == adapter)
    for place in walk.installed(model, PrefixGates).values():
        place.active = adapter


def remove(model: nn.Module, adapter: str | None = None) -> nn.Module:
    """Take one adapter off, or all. With the last one gone, `model` is the base again,
    bit for bit (still frozen).
    """
    for name in adapters(model) if adapter is None else [adapter]:
        _known(model, name)
        if model.unipelt.active == name:
            set_adapter(model, None)
        bottleneck.discard(model, [name])
        virtual_tokens.remove(model, name)
        lora.remove(model, name)
        del model.unipelt.configs[name]
        for block in bottleneck.blocks(model):
            del block.prefix_gates.gates[name]
    if hasattr(model, "unipelt") and not adapters(model):
        for block in bottleneck.blocks(model):
            bottleneck.unhook(block.self_attn, block.prefix_gates)
            del block.prefix_gates
        bottleneck.unhook(model, model.unipelt)
        del model.unipelt
    return model


def gates(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """What the gates gave in the last forward pass, by method: (places, B). LoRA has a
    place for each target.

    Raises:
        ValueError: the adapter is not on the model, or has not run.
    """
    _known(model, adapter)
    found = {
        "lora": [
            layer.gates[adapter]
            for layer in walk.installed(model, GatedLoRALinear).values()
        ],
        "prefix": [
            block.prefix_gates.gates[adapter] for block in bottleneck.blocks(model)
        ],
        "adapter": [
            block.after_block.nets[adapter].gate for block in bottleneck.blocks(model)
        ],
    }
    if any(gate.value is None for kind in found.values() for gate in kind):
        raise ValueError(f"adapter={adapter!r} has not run yet: call the model first")
    return {
        method: torch.stack([gate.value.detach().flatten() for gate in kind])
        for method, kind in found.items()
    }


def _known(model: nn.Module, adapter: str) -> None:
    if adapter not in adapters(model):
        raise ValueError(
            f"adapter={adapter!r} is not on the model; it has"
            f" {adapters(model) or 'none'}"
        )


def num_parameters(model: nn.Module, config: UniPELTConfig) -> int:
    """What `apply` would train: the three methods, and d + 1 for each gate."""
    d, layers = model.config.hidden_size, len(bottleneck.blocks(model))
    targets = [
        walk.base_of(layer).in_features
        for layer in walk.find(model, config.target_modules).values()
    ]
    methods = bottlenecks.num_parameters(
        model, config.adapter
    ) + prefix_tuning.num_parameters(model, config.prefix)
    return (
        methods
        + lora.num_parameters(model, config.lora)
        + 2 * layers * (d + 1)
        + sum(k + 1 for k in targets)
    )


def _parts(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """All that a file holds but the prefix: the model's own tensors."""
    found = files.tensors(model, adapter)
    for name, layer in walk.installed(model, GatedLoRALinear).items():
        found |= {
            f"{name}.lora_A.weight": layer.lora_A[adapter],
            f"{name}.lora_B.weight": layer.lora_B[adapter],
        }
        found |= {
            f"{name}.gate.{what}": t
            for what, t in layer.gates[adapter].state_dict().items()
        }
    for name, place in walk.installed(model, PrefixGates).items():
        found |= {
            f"{name}.{what}": t for what, t in place.gates[adapter].state_dict().items()
        }
    return found


def save(model: nn.Module, folder: str | Path, adapter: str = "default") -> None:
    """Write all three methods and their gates to one folder (safetensors); of the
    prefix's network only what it gives.
    """
    _known(model, adapter)
    vectors = virtual_tokens.vectors_of(virtual_tokens.get(model, adapter)[0])
    settings = dataclasses.asdict(model.unipelt.configs[adapter]) | {
        "projection": False,
        "hidden": None,
    }
    settings |= {
        "peft_type": PEFT_TYPE,
        "base_model_name_or_path": checkpoint.base_name(model),
    }
    checkpoint.write(folder, settings, _parts(model, adapter) | {PREFIX: vectors})


def load(model: nn.Module, folder: str | Path, adapter: str = "default") -> nn.Module:
    """Put an adapter from a folder on `model` and make it the active one.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another method's adapter, or one of a model of another shape. The
            model is then as it was.
    """
    settings, tensors = checkpoint.read(folder, PEFT_TYPE)
    apply(model, files.settings_of(UniPELTConfig, settings), adapter)
    mine = _parts(model, adapter) | {
        PREFIX: virtual_tokens.get(model, adapter)[0].embedding
    }
    try:
        checkpoint.check_tensors(
            tensors, {name: tuple(t.shape) for name, t in mine.items()}
        )
    except ValueError:
        remove(model, adapter)
        raise
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])
    return model
