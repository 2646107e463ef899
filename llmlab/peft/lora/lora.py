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
`peft` (the paper says Gaussian); PiSSA's and OLoRA's starts are in `starts.py`.
Unmerging puts the old W₀ back instead of subtracting BA, which would not return the
same bits. Simplified: linears only (no embeddings or convolutions), and no trained
biases. Saving, mixing and serving adapters is in `files.py`.

DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353, equation 5) trains the length
of each row apart from its direction:

    h = m ⊙ (W₀ + ΔW) x / ‖W₀ + ΔW‖        m (d,)  starts at the lengths of W₀'s rows

The lengths ‖·‖ are those of the rows, and constant for the gradient (section 4.3).
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
from llmlab.peft.lora import starts


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
    init: str = "default"  # where A and B start: one of `starts.STARTS`
    dora: bool = False  # train the lengths of the rows, too
    exclude_modules: walk.Targets = ()  # written as target_modules, and left out
    # numbers of the blocks that get adapters; None: all
    layers_to_transform: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for r in (self.r, *self.rank_pattern.values()):
            if not isinstance(r, int) or r < 1:
                raise ValueError(f"r must be an integer of at least 1, not {r!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout must be at least 0 and below 1, not {self.dropout!r}"
            )
        if self.init not in starts.STARTS:
            raise ValueError(
                f"init={self.init!r} is not one of {', '.join(starts.STARTS)}"
            )

    def targets(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers of `model` that get an adapter, by name; raises as `walk.find`."""
        return walk.find(
            model,
            self.target_modules,
            exclude=self.exclude_modules,
            blocks=self.layers_to_transform,
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
        # A₀ and B₀ where B A is not 0 at the start, and m of DoRA
        self.start_A = nn.ParameterDict()
        self.start_B = nn.ParameterDict()
        self.magnitude = nn.ParameterDict()
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
        scaling = config.scaling(name)
        A, B = starts.start(config.init, linear, config.rank(name), scaling, generator)
        self.lora_A[adapter] = nn.Parameter(A)
        self.lora_B[adapter] = nn.Parameter(B)
        if config.init in starts.MOVED:
            self.start_A[adapter] = nn.Parameter(A.clone(), requires_grad=False)
            self.start_B[adapter] = nn.Parameter(B.clone(), requires_grad=False)
        if config.dora:
            lengths = starts.float_weight(linear).norm(dim=1)  # (d,)
            self.magnitude[adapter] = nn.Parameter(lengths)
        self.configs[adapter] = config
        self.scaling[adapter] = scaling

    def activate(self, adapters: Sequence[str]) -> None:
        """Add these adapters' changes from now on, and train these alone."""
        self.active = tuple(a for a in adapters if a in self.lora_A)
        self.train_only(self.active)

    def train_only(self, adapters: Sequence[str | None]) -> None:
        """Train the parameters of these adapters, and those of no other."""
        for held in (self.lora_A, self.lora_B, self.magnitude):
            for adapter, parameter in held.items():
                parameter.requires_grad_(adapter in adapters)

    def trained(self) -> list[str]:
        """The adapters whose parameters train."""
        return [a for a, parameter in self.lora_B.items() if parameter.requires_grad]

    def discard(self, adapters: Sequence[str]) -> None:
        """Forget these adapters."""
        held = (self.lora_A, self.lora_B, self.start_A, self.start_B, self.magnitude)
        for of_adapter in (*held, self.configs, self.scaling):
            for adapter in adapters:
                if adapter in of_adapter:
                    del of_adapter[adapter]
        self.active = tuple(a for a in self.active if a in self.configs)

    def delta(self, adapter: str) -> Float[Tensor, "d k"]:
        """ΔW of one adapter, in fp32 or better; without DoRA's lengths."""
        scaling = self.scaling[adapter]
        delta = delta_weight(self.lora_A[adapter], self.lora_B[adapter], scaling)
        if adapter in self.start_A:
            A, B = self.start_A[adapter], self.start_B[adapter]
            delta = delta - delta_weight(A, B, scaling)
        return delta

    def stretch(self, W: Float[Tensor, "d k"], adapter: str) -> Float[Tensor, " d"]:
        """m / ‖W₀ + ΔW‖ by row, DoRA's factor; the lengths are constants."""
        with torch.no_grad():
            lengths = (W + self.delta(adapter)).norm(dim=1)
        return self.magnitude[adapter] / lengths

    def change(self, x: Tensor, adapter: str) -> Tensor:
        """(…, k) → (…, d): what one adapter adds to W₀ x."""
        A = self.lora_A[adapter]
        B = self.lora_B[adapter]
        scaling = self.scaling[adapter]
        dropout = self.configs[adapter].dropout
        x = x.to(A.dtype)
        dropped = x
        if dropout and self.training:
            dropped = F.dropout(x, dropout)
        change = low_rank(dropped, A, B, scaling)
        if adapter in self.magnitude:
            W = starts.float_weight(walk.base_of(self.base))
            c = self.stretch(W, adapter)  # (d,)
            frozen = F.linear(dropped, W) - self.start(dropped, adapter)
            change = c * change + (c - 1) * frozen
        return change - self.start(x, adapter)

    def start(self, x: Tensor, adapter: str) -> Tensor | float:
        """(…, k) → (…, d): (α/r) B₀ A₀ x, which has left the base; 0.0 without one."""
        if adapter not in self.start_A:
            return 0.0
        A, B = self.start_A[adapter], self.start_B[adapter]
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
        """W₀ + Σ ΔW of the active adapters, in fp32 or better; with DoRA, stretched.

        A weight that was tied to another layer's is untied.
        """
        W = self.base.weight
        if not W.is_floating_point():
            raise ValueError(
                f"merge: the weights are {W.dtype}; dequantise the base first"
            )
        merged = W.detach().to(torch.promote_types(W.dtype, torch.float32))
        for adapter in self.active:
            stretch = 1.0
            if adapter in self.magnitude:  # then it is the only one
                stretch = self.stretch(merged, adapter).detach()[:, None]  # (d, 1)
            merged = stretch * (merged + self.delta(adapter).detach())
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
    # before anything changes, since these may raise
    found = config.targets(model)
    for name, layer in found.items():
        starts.check(config.init, walk.base_of(layer), config.rank(name))
        if config.dora:
            starts.is_float(walk.base_of(layer))
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
    layers = walk.installed(model, LoRALinear).values()
    for layer in layers:
        if len(names) > 1 and any(a in layer.magnitude for a in names):
            raise ValueError(
                f"adapters {names} cannot be active together: DoRA sets the lengths of"
                " W₀ + ΔW, which holds for one change only"
            )
    for layer in layers:
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
    """Σ r (k + d) over the target layers (+ d with DoRA): what `apply` would train."""
    total = 0
    for name, layer in config.targets(model).items():
        linear = walk.base_of(layer)
        total += config.rank(name) * (linear.in_features + linear.out_features)
        total += linear.out_features if config.dora else 0
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
