"""(IA)³: fine-tune by scaling what flows through the model, three vectors per layer.

Liu et al. 2022, https://arxiv.org/abs/2205.05638, section 3.3 ("Infused Adapter by
Inhibiting and Amplifying Inner Activations"), with ⊙ the product element by element:

    softmax(Q (l_k ⊙ Kᵀ) / √d_k) (l_v ⊙ V)
    (l_ff ⊙ γ(W_1 x)) W_2

    l_k, l_v     one number for each channel of keys and values
    l_ff         one for each hidden channel of the feed-forward network
    l            any of these vectors: trained, ones at the start
    W (out, in)  frozen weight of a linear
    b (out)      its frozen bias

So l_k and l_v scale the *output* of `k_proj` and `v_proj`, its bias included, while
l_ff scales the *input* of `down_proj` (`feedforward_modules`, in the words of `peft`).
Under grouped-query attention l_k and l_v are as narrow as the shared keys and values.
Merged, the scales are in the weight: rows of W and b times l, or for l_ff columns of W.
Unmerging puts the old weight back; dividing by l would round, and fails where training
has set a scale to 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmlab.peft import checkpoint, vectors, walk

# The settings of peft's IA3Config that `load` reads; others must be empty.
READ = ("target_modules", "feedforward_modules", "init_ia3_weights")


@dataclass(frozen=True)
class IA3Config:
    """Which linears are scaled, and which of these at their input."""

    target_modules: walk.Targets = ("k_proj", "v_proj", "down_proj")
    # a subset: scaled at the input; () for none
    feedforward_modules: walk.Targets = ("down_proj",)

    def is_feedforward(self, name: str) -> bool:
        """Whether the layer called `name` is scaled at its input."""
        return bool(self.feedforward_modules) and walk.matches(
            name, self.feedforward_modules
        )


def scale_output(
    W: Float[Tensor, "out in"],
    b: Float[Tensor, "out"] | None,
    scale: Float[Tensor, "out"],
) -> dict[str, Tensor]:
    """The linear whose output is l ⊙ (W x + b): rows and bias are scaled."""
    scaled = {"weight": scale[:, None] * W}
    if b is not None:
        scaled["bias"] = scale * b
    return scaled


def scale_input(
    W: Float[Tensor, "out in"], scale: Float[Tensor, "in"]
) -> dict[str, Tensor]:
    """The linear whose output is W (l ⊙ x) + b: columns are scaled, the bias is not."""
    return {"weight": W * scale}


class IA3Linear(vectors.VectorLayer):
    """A frozen linear and the vectors that may scale its output.

    With `feedforward` they scale its input.
    """

    method = "(IA)³"

    def __init__(self, base: nn.Module, feedforward: bool) -> None:
        super().__init__(base)
        self.feedforward = feedforward

    def width(self) -> int:
        """How long a vector of this layer is."""
        linear = walk.base_of(self.base)
        return linear.in_features if self.feedforward else linear.out_features

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """l ⊙ (W x + b), or W (l ⊙ x) + b.

        It is scaled in the vector's precision and rounded once.
        """
        active = self.active_vectors()
        if not active:
            return self.base(x)
        scale = prod(active[1:], start=active[0])  # (out), or (in)
        if self.feedforward:
            return self.base((x * scale).to(x.dtype))
        out = self.base(x)
        return (out * scale).to(out.dtype)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """Its rows times l, or its columns, in the dtype of W."""
        W = walk.weight_of(self.base)
        return self.folded()["weight"].to(W.dtype) if self.active_vectors() else W

    @property
    def bias(self) -> Float[Tensor, "out"] | None:
        """l ⊙ b; b itself where the input is scaled."""
        b = self.base.bias
        if b is None or self.feedforward or not self.active_vectors():
            return b
        return self.folded()["bias"].to(b.dtype)

    def folded(self) -> dict[str, Tensor]:
        """The base's parameters with the active vectors folded in."""
        scale = prod(self.active_vectors())
        W = walk.weight_of(self.base).to(scale.dtype)
        if self.feedforward:
            return scale_input(W, scale)
        b = self.base.bias
        if b is not None:
            b = b.to(scale.dtype)
        return scale_output(W, b, scale)


def apply(model: nn.Module, config: IA3Config, adapter: str = "default") -> nn.Module:
    """Freeze `model` and give it scales of 1, which are active from now on.

    Changes any `model` of `nn.Linear`s in place.

    Raises:
        ValueError: a target names no linear, a feed-forward module is no target, a
            layer that another adapter scales at its other side, the adapter exists or
            has a bad name, or adapters are merged.
    """
    found = _targets(model, config)
    for name, layer in found.items():
        if not isinstance(layer, IA3Linear):
            continue
        if layer.feedforward != config.is_feedforward(name):
            side = "input" if layer.feedforward else "output"
            raise ValueError(
                f"feedforward_modules: another adapter scales {name!r} at its {side};"
                " one side per layer"
            )

    def make(name: str, layer: nn.Module) -> IA3Linear:
        return IA3Linear(layer, config.is_feedforward(name))

    return vectors.apply(model, found, IA3Linear, adapter, config, 1.0, make)


def _targets(model: nn.Module, config: IA3Config) -> dict[str, nn.Module]:
    """The layers to scale, by name; each feed-forward target must be among them."""
    found = walk.find(model, config.target_modules)
    inner = config.feedforward_modules
    each = [inner] if isinstance(inner, str) else [[name] for name in inner]
    for one in each:
        if one and not any(walk.matches(name, one) for name in found):
            raise ValueError(
                f"feedforward_modules={inner!r}: {one!r} means none of the target"
                " layers"
            )
    return found


def adapters(model: nn.Module) -> list[str]:
    """The names of the adapters on `model`, in the order they came."""
    return vectors.adapters(model, IA3Linear)


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Make these adapters the active ones: their scales multiply, and they alone train.

    `[]` is the plain base.
    """
    vectors.set_adapter(model, names, IA3Linear)


def merge(model: nn.Module) -> None:
    """Fold the active scales into the weights. Inference costs what the base costs."""
    vectors.merge(model, IA3Linear)


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: the weights are the very tensors that they were.

    This holds where a scale is 0 as well.
    """
    vectors.unmerge(model, IA3Linear)


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merge the active scales for good: plain linears are left, and W is freed."""
    return vectors.merge_and_unload(model, IA3Linear)


def remove(model: nn.Module, adapter: str | None = None) -> nn.Module:
    """Take one adapter off, or all of them.

    Without adapters `model` is the base again, bit for bit (still frozen).
    """
    return vectors.remove(model, adapter, IA3Linear)


def num_parameters(model: nn.Module, config: IA3Config) -> int:
    """What `apply` would train.

    That is Σ out over the layers scaled at the output, plus Σ in over the others.
    """
    total = 0
    for name, layer in _targets(model, config).items():
        linear = walk.base_of(layer)
        if config.is_feedforward(name):
            total += linear.in_features
        else:
            total += linear.out_features
    return total


def save(model: nn.Module, folder: str | Path, adapter: str = "default") -> None:
    """Write one adapter as `peft` does.

    `PeftModel.from_pretrained(base, folder)` opens it.
    """
    layers = vectors.layers_with(model, IA3Linear, adapter)
    tensors = {}
    for name, layer in layers.items():
        shape = (1, -1) if layer.feedforward else (-1, 1)  # (1, in) or (out, 1)
        tensors[f"{name}.ia3_l"] = layer.vectors[adapter].reshape(shape)
    config = next(iter(layers.values())).configs[adapter]
    settings = {
        "peft_type": "IA3",
        "target_modules": checkpoint.targets_to_json(config.target_modules),
        "feedforward_modules": checkpoint.targets_to_json(config.feedforward_modules),
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
        "inference_mode": True,
        "task_type": checkpoint.task_of(model),
        "base_model_name_or_path": checkpoint.base_name(model),
    }
    checkpoint.write(folder, settings, tensors)


def load(model: nn.Module, folder: str | Path, adapter: str = "default") -> nn.Module:
    """Put an adapter from a folder, ours or `peft`'s, on `model` and make it active.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another method's adapter, a setting that is not plain (IA)³, a layer
            that the model lacks, or a tensor of the wrong shape (named). The model is
            then as it was.
    """
    settings, tensors = checkpoint.read(folder, "IA3")
    settings = checkpoint.check_settings(settings, READ, {}, "(IA)³")
    config = IA3Config(
        checkpoint.targets_from_json(checkpoint.needed(settings, "target_modules")),
        checkpoint.targets_from_json(settings.get("feedforward_modules", ())),
    )
    wanted = {}
    for name, layer in _targets(model, config).items():
        linear = walk.base_of(layer)
        if config.is_feedforward(name):
            wanted[f"{name}.ia3_l"] = (1, linear.in_features)
        else:
            wanted[f"{name}.ia3_l"] = (linear.out_features, 1)
    tensors = checkpoint.without_base_weights(model, tensors, wanted)
    checkpoint.check_tensors(tensors, wanted)
    apply(model, config, adapter)
    with torch.no_grad():
        for name, layer in vectors.layers_with(model, IA3Linear, adapter).items():
            layer.vectors[adapter].copy_(tensors[f"{name}.ia3_l"].flatten())
    return model
