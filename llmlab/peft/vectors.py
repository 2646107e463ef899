"""One trained vector per layer: what BitFit and (IA)³ have in common.

BitFit adds its vector, (IA)³ multiplies by it.
A subclass of `VectorLayer` says what its vector does to the layer's output, and what
weights the layer must have for the vector to be needless (`folded`). Here is the rest:
several adapters on one base, which of them are active, merging, and taking them off
again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmlab.peft import walk


class VectorLayer(walk.Wrapper):
    """A frozen layer and its vectors, by adapter. The active ones act together."""

    method = "vector"  # how messages call the method

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.vectors = nn.ParameterDict()
        self.configs: dict[str, object] = {}
        self.active: tuple[str, ...] = ()
        # the base's own weights, while merged
        self.saved_weights: dict[str, nn.Parameter | None] | None = None

    def width(self) -> int:
        """How long a vector of this layer is."""
        raise NotImplementedError

    def folded(self) -> dict[str, Tensor]:
        """The base's parameters, by name, with the active vectors folded in.

        They are in fp32 or better, not rounded yet.
        """
        raise NotImplementedError

    def add(self, adapter: str, config: object, value: float) -> None:
        """A new vector of equal numbers, in fp32 even on a half-precision base."""
        weight = walk.base_of(self.base).weight
        dtype = torch.float32
        if weight.is_floating_point():
            dtype = torch.promote_types(weight.dtype, torch.float32)
        vector = torch.full((self.width(),), value, dtype=dtype, device=weight.device)
        self.vectors[adapter] = nn.Parameter(vector)
        self.configs[adapter] = config

    def activate(self, adapters: Sequence[str]) -> None:
        """Use these adapters' vectors from now on, and train these alone."""
        self.active = tuple(a for a in adapters if a in self.vectors)
        for adapter, vector in self.vectors.items():
            vector.requires_grad_(adapter in self.active)

    def active_vectors(self) -> list[Float[Tensor, "width"]]:
        """The vectors in use; none while they are merged into the weights."""
        if self.merged:
            return []
        return [self.vectors[adapter] for adapter in self.active]

    @property
    def merged(self) -> bool:
        """Whether the active vectors are in the base's weights."""
        return self.saved_weights is not None

    def merge(self) -> None:
        """Fold the active vectors into new weights.

        The old ones are saved, so that unmerging gives the same bits.
        """
        W = getattr(self.base, "weight", None)
        is_own = "weight" in self.base._parameters  # and not made of codes, or derived
        if not is_own or not W.is_floating_point():
            what = type(self.base).__name__
            if W is not None:
                what = f"{what} in {W.dtype}"
            raise ValueError(
                f"merge: the layer under {self.method} is a {what}; only a plain float"
                " layer can take it in"
            )
        new = self.folded() if self.active else {}
        self.saved_weights = {name: getattr(self.base, name) for name in new}
        for name, value in new.items():
            folded = nn.Parameter(value.detach().to(W.dtype), requires_grad=False)
            setattr(self.base, name, folded)

    def unmerge(self) -> None:
        """Put the very same weights back."""
        if self.merged:
            for name, parameter in self.saved_weights.items():
                setattr(self.base, name, parameter)
        self.saved_weights = None


Layer = TypeVar("Layer", bound=VectorLayer)


def apply(
    model: nn.Module,
    found: dict[str, nn.Module],
    kind: type[Layer],
    adapter: str,
    config: object,
    value: float,
    make: Callable[[str, nn.Module], Layer],
) -> nn.Module:
    """Freeze `model` and give each of the layers `found` a new vector.

    Args:
        value: all numbers of the vectors at the start.
        make: wraps a layer, given its name and itself.

    Raises:
        ValueError: the adapter exists or has a bad name, or adapters are merged.
    """
    if not adapter or "." in adapter or hasattr(nn.ParameterDict, adapter):
        raise ValueError(
            f"adapter={adapter!r} must be a name without dots that torch does not use"
            " itself (as 'type')"
        )
    if adapter in adapters(model, kind):
        raise ValueError(
            f"adapter={adapter!r} exists already: remove it first, or take another name"
        )
    check_unmerged(model, kind)
    model.requires_grad_(False)
    for name, layer in found.items():
        if not isinstance(layer, kind):
            layer = make(name, layer)
            walk.replace(model, name, layer)
        layer.add(adapter, config, value)
    set_adapter(model, adapter, kind)
    return model


def adapters(model: nn.Module, kind: type[Layer]) -> list[str]:
    """The names of the adapters on `model`, in the order they came."""
    names: dict[str, None] = {}  # a set that remembers the order
    for layer in walk.installed(model, kind).values():
        names.update(dict.fromkeys(layer.vectors))
    return list(names)


def layers_with(model: nn.Module, kind: type[Layer], adapter: str) -> dict[str, Layer]:
    """The layers that carry one adapter, by name."""
    check_known(model, [adapter], kind)
    return {
        name: layer
        for name, layer in walk.installed(model, kind).items()
        if adapter in layer.vectors
    }


def set_adapter(
    model: nn.Module, names: str | Sequence[str], kind: type[Layer]
) -> None:
    """Make these adapters the active ones, which alone train. `[]`: the plain base."""
    names = [names] if isinstance(names, str) else list(names)
    check_known(model, names, kind)
    check_unmerged(model, kind)
    for layer in walk.installed(model, kind).values():
        layer.activate(names)


def merge(model: nn.Module, kind: type[Layer]) -> None:
    """Fold the active vectors into the weights. Inference costs what the base costs.

    It is all or nothing: where one layer cannot merge, none does.
    """
    check_unmerged(model, kind)
    done = []
    try:
        for layer in layers_of(model, kind):
            layer.merge()
            done.append(layer)
    except ValueError:
        for layer in done:
            layer.unmerge()
        raise


def unmerge(model: nn.Module, kind: type[Layer]) -> None:
    """Undo `merge`: the weights are again the very tensors that they were."""
    for layer in layers_of(model, kind):
        layer.unmerge()


def merge_and_unload(model: nn.Module, kind: type[Layer]) -> nn.Module:
    """Merge the active vectors for good: plain layers are left, and W is freed."""
    if not any(layer.merged for layer in layers_of(model, kind)):
        merge(model, kind)
    for name, layer in walk.installed(model, kind).items():
        walk.replace(model, name, layer.base)
    return model


def remove(model: nn.Module, adapter: str | None, kind: type[Layer]) -> nn.Module:
    """Take one adapter off, or all (None).

    Without adapters `model` is the base again, bit for bit, and frozen.
    """
    names = adapters(model, kind) if adapter is None else [adapter]
    check_known(model, names, kind)
    check_unmerged(model, kind)
    for name, layer in walk.installed(model, kind).items():
        for one in names:
            if one in layer.vectors:
                del layer.vectors[one]
                del layer.configs[one]
        layer.active = tuple(a for a in layer.active if a in layer.vectors)
        if not len(layer.vectors):
            walk.replace(model, name, layer.base)
    return model


def layers_of(model: nn.Module, kind: type[Layer]) -> list[Layer]:
    """Every layer of the method.

    Raises:
        ValueError: there are none.
    """
    found = walk.installed(model, kind)
    if not found:
        raise ValueError(
            f"the model has no {kind.method} adapter: apply(model, config) puts one on"
        )
    return list(found.values())


def check_known(model: nn.Module, names: Sequence[str], kind: type[Layer]) -> None:
    """Raises: ValueError: one of these adapters is not on `model`."""
    for name in names:
        if name not in adapters(model, kind):
            raise ValueError(
                f"adapter={name!r} is not on the model; it has"
                f" {adapters(model, kind) or 'none'}"
            )


def check_unmerged(model: nn.Module, kind: type[Layer]) -> None:
    """Raises: ValueError: adapters are merged into the weights."""
    if any(layer.merged for layer in walk.installed(model, kind).values()):
        raise ValueError("adapters are merged into the weights: unmerge(model) first")
