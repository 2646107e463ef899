"""UniPELT: LoRA, a prefix and an adapter in every layer, each behind a learned gate.

Mao et al. 2022, https://arxiv.org/abs/2110.07577, section 3:

    g = mean over tokens of σ(w · x + b)

    W x  ←  W₀ x + g_L (α/r) B A x             LoRA
    K, V ←  [g_P P_K; K], [g_P P_V; V]         prefix
    h    ←  h + g_A A(h)                       adapter

    x  (B, T, d)  what the method reads; for the prefix, what attention reads
    g  (B, 1, 1)  one number for each sequence, layer and method

The mean looks at the whole sequence, later tokens too: right for the paper's encoders,
not for a decoder that is to predict these tokens. `gate_tokens=n` takes the mean over
the first n tokens only; padding never counts. Decoding with a cache keeps the gates of
the prompt. In the `adapters` library the gate stands in the place of α/r: there α = r.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

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
        # each of the three raises where its settings are wrong
        for part in ("prefix", "adapter", "lora"):
            getattr(self, part)
        tokens = self.gate_tokens
        if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
            raise ValueError(
                f"gate_tokens must be None or an integer of at least 1, not {tokens!r}"
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
    """What one model's UniPELT adapters share: their settings, and what gates know."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.call = Call()
        self.configs: dict[str, UniPELTConfig] = {}
        self.active: str | None = None

    def before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Pre-hook of the model: tell the gates what they must know of this call."""
        call = virtual_tokens.as_keywords(model, args, kwargs)
        T = virtual_tokens.new_tokens(call).shape[1]
        mask = call.get("attention_mask")
        self.call.mask = None if mask is None else mask[:, -T:]
        p = self.configs[self.active].num_virtual_tokens if self.active else 0
        # the prefix alone is no prompt
        self.call.continues = virtual_tokens.stored_tokens(model, call) > p


def apply(
    model: nn.Module,
    config: UniPELTConfig,
    adapter: str = "default",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Freeze `model` and give it all three methods, each behind a gate.

    `model` is our Llama or transformers'. The new adapter is active from now on.

    Raises:
        ValueError: the name is taken or bad, a target names no linear, or `model` has
            plain LoRA adapters.
    """
    virtual_tokens.check_new(model, adapter)
    bottleneck.check_new(model, adapter)
    layers = walk.find(model, config.target_modules)
    for layer in layers.values():
        has_lora = isinstance(layer, lora.LoRALinear)
        if has_lora and not isinstance(layer, GatedLoRALinear):
            raise ValueError(
                "model has plain LoRA adapters on the same layers: remove them first"
            )
    if not hasattr(model, "unipelt"):
        model.unipelt = UniPELT()
        model.register_forward_pre_hook(model.unipelt.before, with_kwargs=True)
    model.unipelt.configs[adapter] = config
    like = walk.base_of(bottleneck.blocks(model)[0].mlp.down_proj).weight

    def new_gate(d: int) -> Gate:
        return Gate(d, like, model.unipelt.call, config.gate_tokens, generator)

    # the adapter and the prefix
    bottlenecks.apply(model, config.adapter, adapter, generator)
    prefix_tuning.apply(model, config.prefix, adapter, generator)
    # LoRA with its gates
    for name, layer in layers.items():
        if not isinstance(layer, GatedLoRALinear):
            layer = GatedLoRALinear(layer)
            walk.replace(model, name, layer)
        layer.add(adapter, config.lora, name, generator)
        layer.gates[adapter] = new_gate(walk.base_of(layer).in_features)
    # the gates of the prefix and of the adapter
    d = model.config.hidden_size
    for i, block in enumerate(bottleneck.blocks(model)):
        if not hasattr(block, "prefix_gates"):
            block.prefix_gates = PrefixGates(i)
            block.self_attn.register_forward_pre_hook(
                block.prefix_gates.before, with_kwargs=True
            )
        block.prefix_gates.gates[adapter] = new_gate(d)
        block.after_block.nets[adapter].gate = new_gate(d)
    set_adapter(model, adapter)
    return model


def adapters(model: nn.Module) -> list[str]:
    """The names of the UniPELT adapters on `model`, in the order they came."""
    return list(model.unipelt.configs) if hasattr(model, "unipelt") else []


def set_adapter(model: nn.Module, adapter: str | None) -> None:
    """Make this adapter the active one, which alone trains. None: the plain base."""
    if adapter is not None:
        check_known(model, adapter)
    model.unipelt.active = adapter
    bottleneck.set_active(model, adapter)
    virtual_tokens.set_adapter(model, adapter)
    lora.set_adapter(model, [] if adapter is None else adapter)
    prefix_gates = walk.installed(model, PrefixGates)
    gated = walk.installed(model, GatedLoRALinear) | prefix_gates
    for place in gated.values():
        for name, gate in place.gates.items():
            gate.requires_grad_(name == adapter)
    for place in prefix_gates.values():
        place.active = adapter


def remove(model: nn.Module, adapter: str | None = None) -> nn.Module:
    """Take one adapter off, or all of them.

    Without adapters `model` is the base again, bit for bit (still frozen).
    """
    names = adapters(model) if adapter is None else [adapter]
    for name in names:
        check_known(model, name)
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
            walk.unhook(block.self_attn, block.prefix_gates)
            del block.prefix_gates
        walk.unhook(model, model.unipelt)
        del model.unipelt
    return model


def gates(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """What the gates gave in the last forward pass, by method: (places, B).

    LoRA has a place for each target.

    Raises:
        ValueError: the adapter is not on the model, or has not run.
    """
    check_known(model, adapter)
    blocks = bottleneck.blocks(model)
    gated_loras = walk.installed(model, GatedLoRALinear).values()
    by_method = {
        "lora": [layer.gates[adapter] for layer in gated_loras],
        "prefix": [block.prefix_gates.gates[adapter] for block in blocks],
        "adapter": [block.after_block.nets[adapter].gate for block in blocks],
    }
    values = {}
    for method, its_gates in by_method.items():
        if any(gate.value is None for gate in its_gates):
            raise ValueError(
                f"adapter={adapter!r} has not run yet: call the model first"
            )
        # each value is (B, 1, 1)
        values[method] = torch.stack([g.value.detach().flatten() for g in its_gates])
    return values


def check_known(model: nn.Module, adapter: str) -> None:
    """Raises: ValueError: `adapter` is not on `model`."""
    if adapter not in adapters(model):
        raise ValueError(
            f"adapter={adapter!r} is not on the model; it has"
            f" {adapters(model) or 'none'}"
        )


def num_parameters(model: nn.Module, config: UniPELTConfig) -> int:
    """What `apply` would train: the three methods, and d + 1 for each gate."""
    d = model.config.hidden_size
    total = bottlenecks.num_parameters(model, config.adapter)
    total += prefix_tuning.num_parameters(model, config.prefix)
    total += lora.num_parameters(model, config.lora)
    # gates: per block one for the prefix and one for the adapter, per target one more
    total += 2 * len(bottleneck.blocks(model)) * (d + 1)
    for layer in walk.find(model, config.target_modules).values():
        total += walk.base_of(layer).in_features + 1
    return total


def tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """All that a file holds except the prefix: the model's own tensors, by name."""
    found = files.tensors(model, adapter)
    for name, layer in walk.installed(model, GatedLoRALinear).items():
        found[f"{name}.lora_A.weight"] = layer.lora_A[adapter]
        found[f"{name}.lora_B.weight"] = layer.lora_B[adapter]
        for what, tensor in layer.gates[adapter].state_dict().items():
            found[f"{name}.gate.{what}"] = tensor
    for name, place in walk.installed(model, PrefixGates).items():
        for what, tensor in place.gates[adapter].state_dict().items():
            found[f"{name}.{what}"] = tensor
    return found


def save(model: nn.Module, folder: str | Path, adapter: str = "default") -> None:
    """Write all three methods and their gates to one folder (safetensors).

    Of the prefix's network only the prefix that it makes is written.
    """
    check_known(model, adapter)
    encoder, _ = virtual_tokens.get(model, adapter)
    found = tensors(model, adapter)
    found[PREFIX] = virtual_tokens.vectors_of(encoder)
    settings = dataclasses.asdict(model.unipelt.configs[adapter])
    settings |= {
        "projection": False,
        "hidden": None,
        "peft_type": PEFT_TYPE,
        "base_model_name_or_path": checkpoint.base_name(model),
    }
    checkpoint.write(folder, settings, found)


def load(model: nn.Module, folder: str | Path, adapter: str = "default") -> nn.Module:
    """Put an adapter from a folder on `model` and make it the active one.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another method's adapter, or one of a model of another shape. The
            model is then as it was.
    """
    settings, found = checkpoint.read(folder, PEFT_TYPE)
    apply(model, files.settings_of(UniPELTConfig, settings), adapter)
    encoder, _ = virtual_tokens.get(model, adapter)
    own = tensors(model, adapter)
    own[PREFIX] = encoder.embedding
    try:
        wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
        checkpoint.check_tensors(found, wanted)
    except ValueError:
        remove(model, adapter)
        raise
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[name])
    return model
