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
same bits. Simplified: linears only (no embeddings or convolutions). Biases and whole
modules that train beside A and B are in `copies.py`; saving, mixing and serving
adapters is in `files.py`.

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
from llmlab.peft.lora import copies, starts


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
    # endings of the names of modules that train whole, as ("lm_head",)
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"  # which biases train: "none", "lora_only" or "all"

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
        if self.bias not in copies.BIASES:
            raise ValueError(
                f"bias={self.bias!r} is not one of {', '.join(copies.BIASES)}"
            )
        if isinstance(self.modules_to_save, str):
            raise ValueError(
                f"modules_to_save={self.modules_to_save!r} must be a list of names"
            )

    def targets(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers of `model` that get an adapter, by name.

        What trains whole gets none, nor do its parts.

        Raises:
            ValueError: as `walk.find`, or nothing is left, or a target is in a module
                that another adapter has copied whole.
        """
        found = walk.find(
            model,
            self.target_modules,
            exclude=self.exclude_modules,
            blocks=self.layers_to_transform,
        )
        whole = self.whole_modules(model)
        left = {}
        for name, layer in found.items():
            if any(f"{name}.".startswith(f"{each}.") for each in whole):
                self._check_left_out(name)
                continue
            if isinstance(layer, copies.WholeModule):
                raise ValueError(
                    f"target_modules: {name!r} trains whole in another adapter"
                )
            left[name] = layer
        for name in copies.hidden(model):
            if self.target_modules != walk.ALL_LINEAR and walk.matches(
                name, self.target_modules
            ):
                raise ValueError(
                    f"target_modules: {name!r} is a part of what trains whole in"
                    " another adapter"
                )
        if not left:
            raise ValueError(
                f"modules_to_save={self.modules_to_save!r} leaves no layer of"
                f" target_modules={self.target_modules!r}"
            )
        return left

    def _check_left_out(self, name: str) -> None:
        """Raises: ValueError: `peft` would not see that this target trains whole.

        It trains modules whose names end with one of `modules_to_save`, but leaves
        targets out by their words: "proj" trains q_proj whole, and leaves no "q_proj"
        out.
        """
        for each in self.modules_to_save:
            if re.match(rf"(^|.*\.){re.escape(each)}($|\..*)", name):
                return
        raise ValueError(
            f"modules_to_save={self.modules_to_save!r} and target_modules="
            f"{self.target_modules!r} both mean {name!r}: write its last name in full"
        )

    def whole_modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules of `model` that train whole, by name."""
        return copies.whole_modules(model, self.modules_to_save)

    def biased(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers of `model` whose biases train, by name."""
        if self.bias == "none":
            return {}
        if self.bias == "lora_only":
            layers = self.targets(model)
            return {n: layer for n, layer in layers.items() if copies.has_bias(layer)}
        whole = self.whole_modules(model)
        found = {}
        for name, layer in copies.biased(model).items():
            if any(f"{name}.".startswith(f"{each}.") for each in whole):
                continue  # they train in the copy
            if isinstance(layer, copies.WholeModule):
                raise ValueError(
                    f"bias='all': {name!r}, which has one, trains whole in another"
                    " adapter"
                )
            found[name] = layer
        return found

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


class LoRALinear(copies.Adapted):
    """A frozen linear and the low-rank changes that may be added to it, by adapter."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        # A₀ and B₀ where B A is not 0 at the start, and m of DoRA
        self.start_A = nn.ParameterDict()
        self.start_B = nn.ParameterDict()
        self.magnitude = nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        # (W₀, b, W) while merged. In a tuple, they are no parameters of this module.
        self.saved_weight: tuple[nn.Parameter | None, ...] = ()

    @property
    def merged(self) -> bool:
        """Whether the active changes are in the weight."""
        return bool(self.saved_weight)

    @property
    def weight(self) -> Float[Tensor, "d k"]:
        """W₀ + Σ ΔW of the active adapters, in the dtype of W₀; without dropout.

        Raises:
            ValueError: each row of the batch has its own.
        """
        W = walk.weight_of(self.base)
        if self.rows is not None:
            raise ValueError(
                "by_row: a module reads the weight of one of its linears instead of"
                " calling it, so its rows cannot go through different adapters"
            )
        return W if self.merged else self.changed(W, self.active).to(W.dtype)

    @property
    def bias(self) -> Float[Tensor, " d"] | None:
        """The bias in use: the base's, or the active adapters' copy of it."""
        own = None if self.merged else self.bias_with(self.active)
        return self.base.bias if own is None else own

    @property
    def adds(self) -> bool:
        """DoRA does more: its factor depends on the weight."""
        return self.merged or not any(a in self.magnitude for a in self.active)

    def with_factors(self, adapters: Sequence[str]) -> list[str]:
        """Those of these adapters that have A and B here, and not a bias alone."""
        return [a for a in adapters if a in self.lora_A]

    def held(self) -> list:
        """By adapter: the parameters that train."""
        return [self.lora_A, self.lora_B, self.magnitude, *super().held()]

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

    def discard(self, adapters: Sequence[str]) -> None:
        """Forget these adapters."""
        super().discard(adapters)
        for of_adapter in (self.start_A, self.start_B, self.scaling):
            for adapter in adapters:
                if adapter in of_adapter:
                    del of_adapter[adapter]

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
        if self.merged:
            return self.base(x)
        if self.rows is None:
            return self.forward_with(self.active, x)
        if len(self.biases):
            return self.by_rows(self.forward_with, x)
        return self.by_rows(self.with_changes, x, self.base(x))

    def forward_with(self, adapters: Sequence[str], x: Tensor) -> Tensor:
        """W₀ x + Σ ΔW x over these adapters, with their bias."""
        return self.with_changes(adapters, x, self.base_with(adapters, x))

    def with_changes(self, adapters: Sequence[str], x: Tensor, out: Tensor) -> Tensor:
        """What the base gives, and Σ ΔW x over these adapters."""
        h = out
        for adapter in self.with_factors(adapters):
            # in fp32 where the base is in half precision, then rounded once
            h = h + self.change(x, adapter)
        return h.to(out.dtype)

    def changed(self, W: Tensor, adapters: Sequence[str]) -> Float[Tensor, "d k"]:
        """W + Σ ΔW of these adapters, in fp32 or better; with DoRA, stretched."""
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        for adapter in self.with_factors(adapters):
            stretch = 1.0
            if adapter in self.magnitude:  # then it is the only one
                stretch = self.stretch(W, adapter)[:, None]  # (d, 1)
            W = stretch * (W + self.delta(adapter))
        return W

    @torch.no_grad()
    def merge(self) -> None:
        """W₀ + Σ ΔW of the active adapters becomes the weight, rounded once.

        A weight that was tied to another layer's is untied.
        """
        linear = walk.mergeable(self)
        W, b = linear.weight, linear.bias
        bias = self.bias_with(self.active)
        merged = self.changed(W, self.active).to(W.dtype)
        linear.weight = nn.Parameter(merged, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
        self.saved_weight = (W, b, linear.weight)

    def unmerge(self) -> None:
        """Put the very same W₀ and b back."""
        if not self.merged:
            return
        linear = walk.base_of(self)
        W, b, merged = self.saved_weight
        if linear.weight is not merged:
            raise ValueError(
                "unmerge: the weight has changed since: take off first what was merged"
                " on top"
            )
        linear.weight = W
        linear.bias = b
        self.saved_weight = ()

    def unwrapped(self) -> nn.Module:
        """What stands here without a wrapper, once merged or without adapters."""
        return self.base


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
        walk.check_drops_nothing(model, name, config.dropout)
    whole = config.whole_modules(model)
    biased = config.biased(model)
    model.requires_grad_(False)
    for name in found:
        _place(model, name, LoRALinear).add(adapter, config, name, generator)
    for name in biased:
        kind = LoRALinear if name in found else copies.BiasCopies
        _place(model, name, kind).add_bias(adapter, config)
    for name in whole:
        _place(model, name, copies.WholeModule).add_copy(adapter, config)
    set_adapter(model, adapter)
    return model


def _place(model: nn.Module, name: str, kind: type[copies.Adapted]) -> copies.Adapted:
    """The wrapper at `name`, which is put there if there is none.

    One of a bias makes place for one of a low-rank change, which can hold biases, too.
    """
    layer = model.get_submodule(name)
    if isinstance(layer, copies.Adapted) and kind is copies.BiasCopies:
        return layer
    if isinstance(layer, kind):
        return layer
    wrapper = kind(layer)
    if isinstance(layer, copies.BiasCopies):
        wrapper = kind(layer.base)
        wrapper.biases = layer.biases
        wrapper.configs = layer.configs
    walk.replace(model, name, wrapper)
    return wrapper


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
        if len(names) > 1 and any(a in layer.magnitude for a in names):
            raise ValueError(
                f"adapters {names} cannot be active together: DoRA sets the lengths of"
                " W₀ + ΔW, which holds for one change only"
            )
    for name, layer in walk.installed(model, copies.WholeModule).items():
        if sum(a in layer.copies for a in names) > 1:
            raise ValueError(
                f"adapters {names} cannot be active together: each has a copy of"
                f" {name!r} (modules_to_save)"
            )
    for layer in walk.installed(model, copies.Adapted).values():
        layer.activate(names)


def merge(model: nn.Module) -> None:
    """Fold the active adapters into the weights: W = W₀ + Σ ΔW.

    Inference then costs what the base costs.
    """
    check_unmerged(model)
    layers = layers_of(model)
    for layer in layers:
        if isinstance(layer, LoRALinear):
            walk.mergeable(layer)  # before anything changes, since it may raise
    for layer in layers:
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: the weights are again the very tensors that they were."""
    for layer in layers_of(model):
        layer.unmerge()


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merge the active adapters for good: plain linears are left, and W₀ is freed."""
    if not any(layer.merged for layer in layers_of(model)):
        merge(model)
    for name, layer in walk.installed(model, copies.Adapted).items():
        walk.replace(model, name, layer.unwrapped())
    return model


def remove(model: nn.Module, adapter: str | None = None) -> nn.Module:
    """Take one adapter off, or all of them.

    Without adapters `model` is the base again, bit for bit (still frozen).
    """
    names = adapters(model) if adapter is None else [adapter]
    check_known(model, names)
    check_unmerged(model)
    for name, layer in walk.installed(model, copies.Adapted).items():
        layer.discard(names)
        if not layer.configs:
            walk.replace(model, name, layer.base)
    return model


def num_parameters(model: nn.Module, config: LoRAConfig) -> int:
    """What `apply` would train: Σ r (k + d) over the target layers (+ d with DoRA).

    With `bias` their numbers are added, with `modules_to_save` those of the copies.
    """
    total = 0
    for name, layer in config.targets(model).items():
        linear = walk.base_of(layer)
        total += config.rank(name) * (linear.in_features + linear.out_features)
        total += linear.out_features if config.dora else 0
    for layer in config.biased(model).values():
        total += walk.base_of(layer).bias.numel()
    for module in config.whole_modules(model).values():
        total += sum(p.numel() for p in walk.base_of(module).parameters())
    return total


def layers_of(model: nn.Module) -> list[copies.Adapted]:
    """The layers that an adapter changes.

    Raises:
        ValueError: there are none.
    """
    layers = walk.installed(model, copies.Adapted)
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
    if any(layer.merged for layer in walk.installed(model, copies.Adapted).values()):
        raise ValueError("adapters are merged into the weights: unmerge(model) first")
