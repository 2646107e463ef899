"""BitFit: fine-tune the biases and nothing else.

Ben Zaken et al. 2021, https://arxiv.org/abs/2106.10199, section 3. Every linear and
every LayerNorm of BERT computes

    h = W x + b        b is trained, W is frozen

Llama has no biases: its linears are products and its RMSNorms only scale. There one
adds them, at 0, so that nothing changes at the start. Here both cases are one: the
layer's own bias b, if it has one, stays frozen, and what is trained is the change

    h = W x + b + β    β = 0 at the start        ∂L/∂β = ∂L/∂b

    W (out, in)  frozen weight        b (out)  frozen bias, or none     β (out)  trained

The base is never written to, so it comes back bit for bit, and an adapter is a file of
changes. Weight decay, if there is any, pulls towards the pretrained bias and not
towards 0. `peft` calls biases that are added BEFT (Huang et al. 2025,
https://arxiv.org/abs/2509.15974) and cannot merge them into a layer without a bias; we
write and read its format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmlab.peft import checkpoint, vectors, walk


@dataclass(frozen=True)
class BitFitConfig:
    """Which biases train."""

    # None: those that the model has, as published. Names: of linears or norms, which
    # get one if they have none.
    target_modules: walk.Targets | None = None


class BiasLayer(vectors.VectorLayer):
    """A frozen layer and the changes of bias that may be added to its output."""

    method = "BitFit"

    def width(self) -> int:
        """How long a vector of this layer is."""
        return bias_width(self.base)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """W x + b + Σ β, added in β's precision and rounded once."""
        out = self.base(x)
        active = self.active_vectors()
        if not active:
            return out
        change = sum(active[1:], start=active[0])  # (out)
        return (out + change).to(out.dtype)

    @property
    def bias(self) -> Float[Tensor, "out"] | None:
        """b + Σ β, in the dtype of the weight; Σ β where there is no b."""
        active = self.active_vectors()
        b = getattr(self.base, "bias", None)
        if not active:
            return b
        change = sum(active[1:], start=active[0])
        return (change if b is None else b + change).to(self.weight.dtype)

    @property
    def adds(self) -> bool:
        """β is added, whatever the weight is."""
        return True

    def folded(self) -> dict[str, Tensor]:
        """The bias b + Σ β; the weight stays."""
        if "bias" not in self.base._parameters:
            raise ValueError(
                f"merge: {type(self.base).__name__} has no place for a bias"
            )
        change = sum(self.active_vectors())
        b = self.base.bias
        if b is None:
            return {"bias": change}
        return {"bias": b.to(change.dtype) + change}


def bias_width(layer: nn.Module) -> int:
    """How many numbers a bias of `layer` has, whether or not it has one.

    Raises:
        ValueError: it is neither a linear nor a norm over the last dimension.
    """
    base = walk.base_of(layer)
    if isinstance(base, ALONG_CHANNELS):
        raise ValueError(
            f"target_modules means a {type(base).__name__}: its bias runs along the"
            " channels, and β is added along the last dimension"
        )
    bias = getattr(base, "bias", None)
    weight = getattr(base, "weight", None)
    if isinstance(bias, nn.Parameter):
        return bias.numel()
    if isinstance(base, nn.Linear):
        return base.out_features
    # RMSNorm: one scale for each channel
    if isinstance(weight, nn.Parameter) and weight.dim() == 1:
        return weight.numel()
    raise ValueError(
        f"target_modules means a {type(base).__name__}: only a linear or a norm can"
        " have a bias"
    )


# what has its channels before the last dimension
ALONG_CHANNELS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    nn.GroupNorm,
)


def has_bias(layer: nn.Module) -> bool:
    """Whether the layer under all wrappers is a linear or a norm with its own bias."""
    base = walk.base_of(layer)
    if any(True for _ in base.children()):
        return False
    bias = getattr(base, "bias", None)
    return isinstance(bias, nn.Parameter) and bias.dim() == 1


def find(model: nn.Module, config: BitFitConfig) -> dict[str, nn.Module]:
    """The layers whose bias trains, by name, in the model's order.

    Raises:
        ValueError: no names are given and the model has no biases; a name that no layer
            answers to, or whose layer is neither a linear nor a norm.
    """
    targets = config.target_modules
    if targets is None:
        found = {name: layer for name, layer in walk.places(model) if has_bias(layer)}
        if not found:
            raise ValueError(
                "target_modules=None trains the biases that a model has, and this one"
                " has none (Llama leaves them out): name the layers that shall get one,"
                " as in target_modules='all-linear'"
            )
        for layer in found.values():
            bias_width(layer)  # raises where β would be added wrongly
        return found
    found = walk.find(
        model, targets, nn.Linear if targets == walk.ALL_LINEAR else nn.Module
    )
    for layer in found.values():
        bias_width(layer)  # raises where no bias can be
    return found


def apply(
    model: nn.Module, config: BitFitConfig, adapter: str = "default"
) -> nn.Module:
    """Freeze `model`, in place, and let the biases train from where they are.

    Where there was none, it starts at 0.

    Raises:
        ValueError: what `find` raises, the adapter exists or has a bad name, or
            adapters are merged.
    """

    def make(name: str, layer: nn.Module) -> BiasLayer:
        return BiasLayer(layer)

    return vectors.apply(
        model, find(model, config), BiasLayer, adapter, config, 0.0, make
    )


def adapters(model: nn.Module) -> list[str]:
    """The names of the adapters on `model`, in the order they came."""
    return vectors.adapters(model, BiasLayer)


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Make these adapters the active ones: their changes add up, and they alone train.

    `[]` is the plain base.
    """
    vectors.set_adapter(model, names, BiasLayer)


def merge(model: nn.Module) -> None:
    """Fold the changes into the layers' biases; a linear that had none gets one.

    An RMSNorm has no place for a bias, so it cannot be merged.
    """
    vectors.merge(model, BiasLayer)


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: the biases are again the very tensors that they were, or absent."""
    vectors.unmerge(model, BiasLayer)


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merge for good.

    A Llama all of whose linears got a bias is then one with `attention_bias` and
    `mlp_bias`.
    """
    return vectors.merge_and_unload(model, BiasLayer)


def remove(model: nn.Module, adapter: str | None = None) -> nn.Module:
    """Take one adapter off, or all of them.

    Without adapters `model` is the base again, bit for bit (still frozen).
    """
    return vectors.remove(model, adapter, BiasLayer)


def num_parameters(model: nn.Module, config: BitFitConfig) -> int:
    """Σ out over the target layers: what `apply` would train."""
    return sum(bias_width(layer) for layer in find(model, config).values())


def save(model: nn.Module, folder: str | Path, adapter: str = "default") -> None:
    """Write one adapter in `peft`'s BEFT format.

    `peft` opens it where all targets are linears.
    """
    layers = vectors.layers_with(model, BiasLayer, adapter)
    targets = next(iter(layers.values())).configs[adapter].target_modules
    if targets is None:
        targets = list(layers)
    settings = {
        "peft_type": "BEFT",
        "target_modules": checkpoint.targets_to_json(targets),
        "init_weights": True,
        "inference_mode": True,
        "task_type": checkpoint.task_of(model),
        "base_model_name_or_path": checkpoint.base_name(model),
    }
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.beft_bias"] = layer.vectors[adapter][None]  # (1, out)
    checkpoint.write(folder, settings, tensors)


def load(model: nn.Module, folder: str | Path, adapter: str = "default") -> nn.Module:
    """Put an adapter from a folder, ours or `peft`'s, on `model` and make it active.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another method's adapter, modules that were trained whole, a layer
            that the model lacks, or a tensor of the wrong shape (named). The model is
            then as it was.
    """
    settings, tensors = checkpoint.read(folder, "BEFT")
    settings = checkpoint.check_settings(
        settings, ("target_modules", "init_weights"), {}, "BitFit"
    )
    config = BitFitConfig(
        checkpoint.targets_from_json(checkpoint.needed(settings, "target_modules"))
    )
    wanted = {}
    for name, layer in find(model, config).items():
        wanted[f"{name}.beft_bias"] = (1, bias_width(layer))
    tensors = checkpoint.without_base_weights(model, tensors, wanted)
    checkpoint.check_tensors(tensors, wanted)
    apply(model, config, adapter)
    with torch.no_grad():
        for name, layer in vectors.layers_with(model, BiasLayer, adapter).items():
            layer.vectors[adapter].copy_(tensors[f"{name}.beft_bias"][0])
    return model
