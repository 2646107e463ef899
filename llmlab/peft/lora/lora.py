"""LoRA: fine-tune a low-rank change of the weights and leave the weights alone.

Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3, with the scale of section
4.1:

    h = W₀ x + ΔW x        ΔW = (α/r) B A        B = 0 at the start, so that h = W₀ x

    W₀ (d, k)  frozen weight
    A  (r, k)  trained, random at the start
    B  (d, r)  trained, zeros at the start
    r          rank, the width of the bottleneck
    α          sets the size of ΔW whatever r is
    *batch     whatever comes before the last dimension of x

A starts Kaiming-uniform with a = √5, U(−1/√k, 1/√k), as in the authors' code and in
`peft` (the paper says Gaussian). Unmerging puts the old W₀ back instead of subtracting
BA, which would not return the same bits. Simplified: linears only (no embeddings or
convolutions), and no trained biases. Saving, mixing and serving adapters is in
`files.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llmlab.peft import walk


@dataclass(frozen=True)
class LoRAConfig:
    """Where the low-rank change goes and how large it may be."""

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0  # on the input of A, while training
    # endings of names, a regular expression, or "all-linear"
    target_modules: walk.Targets = ("q_proj", "v_proj")
    # scale by α/√r, so that a large r learns as fast (Kalajdzievski 2023)
    rslora: bool = False
    # another r for some layers: {ending: r}
    rank_pattern: dict[str, int] = field(default_factory=dict)
    # another α for some layers: {ending: α}
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for r in (self.r, *self.rank_pattern.values()):
            if not isinstance(r, int) or r < 1:
                raise ValueError(f"r must be an integer of at least 1, not {r!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout must be at least 0 and below 1, not {self.dropout!r}"
            )

    def rank(self, name: str) -> int:
        """r for the layer called `name`."""
        return _by_pattern(self.rank_pattern, name, self.r)

    def scaling(self, name: str) -> float:
        """α/r, or α/√r with `rslora`, for the layer called `name`."""
        r = self.rank(name)
        alpha = _by_pattern(self.alpha_pattern, name, self.alpha)
        if self.rslora:
            return alpha / math.sqrt(r)
        return alpha / r


def _by_pattern(pattern: dict, name: str, default):
    """The value of the first key that `name` ends with; keys are regular expressions.

    The rule is that of `peft`.
    """
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


# The mathematics ----------------------------------------------------------------------


def delta_weight(
    A: Float[Tensor, "r k"], B: Float[Tensor, "d r"], scaling: float
) -> Float[Tensor, "d k"]:
    """ΔW = (α/r) B A, in fp32 or better."""
    dtype = torch.promote_types(A.dtype, torch.float32)
    return scaling * (B.to(dtype) @ A.to(dtype))


def low_rank(
    x: Float[Tensor, "*batch k"],
    A: Float[Tensor, "r k"],
    B: Float[Tensor, "d r"],
    scaling: float,
) -> Float[Tensor, "*batch d"]:
    """ΔW x without building ΔW: r(k + d) multiplications per token instead of kd."""
    narrow = F.linear(x, A) * scaling  # (*batch, r): the cheapest place for the scale
    return F.linear(narrow, B)  # (*batch, d)


# One layer ----------------------------------------------------------------------------


class LoRALinear(walk.Wrapper):
    """A frozen linear and the low-rank changes that may be added to it, by adapter."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.configs: dict[str, LoRAConfig] = {}
        self.scaling: dict[str, float] = {}
        self.active: tuple[str, ...] = ()
        # one adapter for each row of the batch
        self.rows: Sequence[str | None] | None = None
        # (W₀,) while merged. In a tuple, W₀ is no parameter of this module.
        self.saved_weight: tuple[nn.Parameter, ...] = ()

    @property
    def merged(self) -> bool:
        """Whether the active changes are in the weight."""
        return bool(self.saved_weight)

    def add(
        self,
        adapter: str,
        config: LoRAConfig,
        name: str,
        generator: torch.Generator | None,
    ) -> None:
        """A new pair A, B, in fp32 even on a half-precision base."""
        linear = walk.base_of(self.base)
        r = config.rank(name)
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        like = {"device": linear.weight.device, "dtype": dtype}
        A = torch.empty(r, linear.in_features, **like)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        B = torch.zeros(linear.out_features, r, **like)
        self.lora_A[adapter] = nn.Parameter(A)
        self.lora_B[adapter] = nn.Parameter(B)
        self.configs[adapter] = config
        self.scaling[adapter] = config.scaling(name)

    def activate(self, adapters: Sequence[str]) -> None:
        """Add these adapters' changes from now on, and train these alone."""
        self.active = tuple(a for a in adapters if a in self.lora_A)
        for adapter in self.configs:
            trains = adapter in self.active
            self.lora_A[adapter].requires_grad_(trains)
            self.lora_B[adapter].requires_grad_(trains)

    def discard(self, adapters: Sequence[str]) -> None:
        """Forget these adapters."""
        for adapter in adapters:
            if adapter in self.configs:
                del self.lora_A[adapter]
                del self.lora_B[adapter]
                del self.configs[adapter]
                del self.scaling[adapter]
        self.active = tuple(a for a in self.active if a in self.configs)

    def change(self, x: Tensor, adapter: str) -> Tensor:
        """(…, k) → (…, d): what one adapter adds to W₀ x."""
        A = self.lora_A[adapter]
        B = self.lora_B[adapter]
        dropout = self.configs[adapter].dropout
        x = x.to(A.dtype)
        if dropout and self.training:
            x = F.dropout(x, dropout)
        return low_rank(x, A, B, self.scaling[adapter])

    def forward(self, x: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch d"]:
        """W₀ x + Σ ΔW x over the active adapters; the plain W x while merged."""
        out = self.base(x)
        if self.merged:
            return out
        if self.rows is not None:
            return self._forward_rows(x, out)
        h = out
        for adapter in self.active:
            # in fp32 where the base is in half precision, then rounded once
            h = h + self.change(x, adapter)
        return h.to(out.dtype)

    def _forward_rows(self, x: Tensor, out: Tensor) -> Tensor:
        """Each row goes through its own adapter; a row of None is the base's alone.

        Rows of one adapter go through it together, so there is one product per adapter.
        """
        if len(self.rows) != len(x):
            raise ValueError(
                f"rows names {len(self.rows)} adapters for a batch of {len(x)}"
            )
        for adapter in {a for a in self.rows if a in self.lora_A}:
            its_rows = [i for i, a in enumerate(self.rows) if a == adapter]
            index = torch.tensor(its_rows, device=x.device)
            change = self.change(x[index], adapter).to(out.dtype)
            out = out.index_add(0, index, change)
        return out

    def merge(self) -> None:
        """W₀ + Σ ΔW of the active adapters, summed in fp32 or better.

        A weight that was tied to another layer's is untied.
        """
        W = self.base.weight
        if not W.is_floating_point():
            raise ValueError(
                f"merge: the weights are {W.dtype}; dequantise the base first"
            )
        merged = W.detach().to(torch.promote_types(W.dtype, torch.float32))
        for adapter in self.active:
            A = self.lora_A[adapter]
            B = self.lora_B[adapter]
            merged = merged + delta_weight(A, B, self.scaling[adapter]).detach()
        self.saved_weight = (W,)
        self.base.weight = nn.Parameter(merged.to(W.dtype), requires_grad=False)

    def unmerge(self) -> None:
        """Put the very same W₀ back."""
        if self.merged:
            self.base.weight = self.saved_weight[0]
            self.saved_weight = ()


# The whole model ----------------------------------------------------------------------


def apply(
    model: nn.Module,
    config: LoRAConfig,
    adapter: str = "default",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Freeze `model` and give it a new adapter, which is the active one from now on.

    Changes any `model` of `nn.Linear`s in place.

    Raises:
        ValueError: the adapter exists or has a bad name, adapters are merged, or a
            target names no linear.
    """
    if not adapter or "." in adapter or hasattr(nn.ParameterDict, adapter):
        raise ValueError(
            f"adapter={adapter!r} must be a name without dots that torch does not use"
            " itself (as 'type')"
        )
    if adapter in adapters(model):
        raise ValueError(
            f"adapter={adapter!r} exists already: remove it first, or take another name"
        )
    check_unmerged(model)
    # before anything changes, since it may raise
    found = walk.find(model, config.target_modules)
    model.requires_grad_(False)
    for name, layer in found.items():
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer)
            walk.replace(model, name, layer)
        layer.add(adapter, config, name, generator)
    set_adapter(model, adapter)
    return model


def adapters(model: nn.Module) -> list[str]:
    """The names of the adapters on `model`, in the order they came."""
    names: dict[str, None] = {}  # a set that remembers the order
    for layer in walk.installed(model, LoRALinear).values():
        names.update(dict.fromkeys(layer.configs))
    return list(names)


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Make these adapters the active ones: their changes add up, and they alone train.

    `[]` is the plain base.
    """
    names = [names] if isinstance(names, str) else list(names)
    check_known(model, names)
    check_unmerged(model)
    for layer in walk.installed(model, LoRALinear).values():
        layer.activate(names)


def merge(model: nn.Module) -> None:
    """Fold the active adapters into the weights: W = W₀ + Σ ΔW.

    Inference then costs what the base costs.
    """
    check_unmerged(model)
    for layer in layers_of(model):
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: the weights are again the very tensors that they were."""
    for layer in layers_of(model):
        layer.unmerge()


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merge the active adapters for good: plain linears are left, and W₀ is freed."""
    if not any(layer.merged for layer in layers_of(model)):
        merge(model)
    for name, layer in walk.installed(model, LoRALinear).items():
        walk.replace(model, name, layer.base)
    return model


def remove(model: nn.Module, adapter: str | None = None) -> nn.Module:
    """Take one adapter off, or all of them.

    Without adapters `model` is the base again, bit for bit (still frozen).
    """
    names = adapters(model) if adapter is None else [adapter]
    check_known(model, names)
    check_unmerged(model)
    for name, layer in walk.installed(model, LoRALinear).items():
        layer.discard(names)
        if not layer.configs:
            walk.replace(model, name, layer.base)
    return model


def num_parameters(model: nn.Module, config: LoRAConfig) -> int:
    """Σ r (k + d) over the target layers: what `apply` would train."""
    total = 0
    for name, layer in walk.find(model, config.target_modules).items():
        linear = walk.base_of(layer)
        total += config.rank(name) * (linear.in_features + linear.out_features)
    return total


def layers_of(model: nn.Module) -> list[LoRALinear]:
    """The layers with low-rank changes.

    Raises:
        ValueError: there are none.
    """
    layers = walk.installed(model, LoRALinear)
    if not layers:
        raise ValueError(
            "the model has no LoRA adapter: apply(model, config) puts one on"
        )
    return list(layers.values())


def check_known(model: nn.Module, names: Sequence[str]) -> None:
    """Raises: ValueError: one of these adapters is not on `model`."""
    known = adapters(model)
    for name in names:
        if name not in known:
            raise ValueError(
                f"adapter={name!r} is not on the model; it has {known or 'none'}"
            )


def check_unmerged(model: nn.Module) -> None:
    """Raises: ValueError: adapters are merged into the weights."""
    if any(layer.merged for layer in walk.installed(model, LoRALinear).values()):
        raise ValueError("adapters are merged into the weights: unmerge(model) first")
