"""One trained vector a layer: what BitFit (a vector that is added) and (IA)³ (a vector
that multiplies) have in common.

A subclass of `VectorLayer` says what its vector does to the layer's output, and what
weights the layer must have for the vector to be needless (`folded`). Here is the rest:
several adapters on one base, which of them are active, merging, and taking them off
again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
        # while merged, the base's own weights
        self.kept: dict[str, nn.Parameter | None] | None = None

    def width(self) -> int:
        """How long a vector of this layer is."""
        raise NotImplementedError

    def folded(self) -> dict[str, Tensor]:
        """The base's parameters, by name, with the active vectors folded in: fp32 or
        better, not rounded yet.
        """
        raise NotImplementedError

    def add(self, adapter: str, config: object, value: float) -> None:
        """A new vector of equal numbers, in fp32 even on a half-precision base."""
        weight = walk.base_of(self.base).weight
        dtype = (
            torch.promote_types(weight.dtype, torch.float32)
            if weight.is_floating_point()
            else torch.float32
        )
        self.vectors[adapter] = nn.Parameter(
            torch.full((self.width(),), value, dtype=dtype, device=weight.device)
        )
        self.configs[adapter] = config

    def activate(self, adapters: Sequence[str]) -> None:
        """Use these adapters' vectors from now on, and train these alone."""
        self.active = tuple(a for a in adapters if a in self.vectors)
        for adapter, vector in self.vectors.items():
            vector.requires_grad_(adapter in self.active)

    def active_vectors(self) -> list[Float[Tensor, "width"]]:
        """The vectors in use; none while they are merged into the weights."""
        return [] if self.kept is not None else [self.vectors[a] for a in self.active]

    def merge(self) -> None:
        """Fold the active vectors into new weights; the old ones are kept, so that
        unmerging gives the same bits.
        """
        W = getattr(self.base, "weight", None)
        if (
            isinstance(self.base, walk.Wrapper)
            or W is None
            or not W.is_floating_point()
        ):
            what = (
                type(self.base).__name__
                if W is None
                else f"{type(self.base).__name__} in {W.dtype}"
            )
            raise ValueError(
                f"merge: the layer under {self.method} is a {what}; only a plain float"
                " layer can take it in"
            )
        new = self.folded() if self.active else {}
        self.kept = {name: getattr(self.base, name) for name in new}
        for name, value in new.items():
            setattr(
                self.base,
                name,
                nn.Parameter(value.detach().to(W.dtype), requires_grad=False),
            )

    def unmerge(self) -> None:
        """Put the very same weights back."""
        for name, parameter in (self.kept or {}).items():
            setattr(self.base, name, parameter)
        self.kept = None


V = TypeVar("V", bound=VectorLayer)


def apply(
    model: nn.Module,
    found: dict[str, nn.Module],
    kind: type[V],
    adapter: str,
    config: object,
    value: float,
    make: Callable[[str, nn.Module], V],
) -> nn.Module:
    """Freeze `model` and give the layers `found` a new vector each, all numbers
    `value`; `make` wraps a layer by name.

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
    refuse_merged(model, kind)
    model.requires_grad_(False)
    for name, layer in found.items():
        if not isinstance(layer, kind):
            layer = make(name, layer)
            walk.replace(model, name, layer)
        layer.add(adapter, config, value)
    set_adapter(model, adapter, kind)
    return model


def adapters(model: nn.Module, kind: type[V]) -> list[str]:
    """The names of the adapters on `model`, in the order they came."""
    return list(
        dict.fromkeys(
            a for layer in walk.installed(model, kind).values() for a in layer.vectors
        )
    )


def of(model: nn.Module, kind: type[V], adapter: str) -> dict[str, V]:
    """The layers that carry one adapter, by name."""
    known(model, [adapter], kind)
    return {
        name: layer
        for name, layer in walk.installed(model, kind).items()
        if adapter in layer.vectors
    }


def set_adapter(model: nn.Module, names: str | Sequence[str], kind: type[V]) -> None:
    """Make these adapters the active ones, which alone train. `[]`: the plain base."""
    names = [names] if isinstance(names, str) else list(names)
    known(model, names, kind)
    refuse_merged(model, kind)
    for layer in walk.installed(model, kind).values():
        layer.activate(names)


def merge(model: nn.Module, kind: type[V]) -> None:
    """Fold the active vectors into the weights. Inference then costs what the base
    costs.
    """
    refuse_merged(model, kind)
    done = []
    try:
        for layer in layers(model, kind):
            layer.merge()
            done.append(layer)
    except ValueError:
        for layer in done:
            layer.unmerge()
        raise


def unmerge(model: nn.Module, kind: type[V]) -> None:
    """Undo `merge`: the weights are again the very tensors that they were."""
    for layer in layers(model, kind):
        layer.unmerge()


def merge_and_unload(model: nn.Module, kind: type[V]) -> nn.Module:
    """Merge the active vectors for good: `model` is left with plain layers, and the old
    weights are let go.
    """
    if all(layer.kept is None for layer in layers(model, kind)):
        merge(model, kind)
    for name, layer in walk.installed(model, kind).items():
        walk.replace(model, name, layer.base)
    return model


def remove(model: nn.Module, adapter: str | None, kind: type[V]) -> nn.Module:
    """Take one adapter off, or all (None). With the last one gone, `model` is the base
    again, bit for bit, and frozen.
    """
    names = adapters(model, kind) if adapter is None else [adapter]
    known(model, names, kind)
    refuse_merged(model, kind)
    for name, layer in walk.installed(model, kind).items():
        for one in [a for a in names if a in layer.vectors]:
            del layer.vectors[one], layer.configs[one]
        layer.active = tuple(a for a in layer.active if a in layer.vectors)
        if not len(layer.vectors):
            walk.replace(model, name, layer.base)
    return model


def layers(model: nn.Module, kind: type[V]) -> list[V]:
    """Every layer of the method, of which there must be one."""
    if not (found := walk.installed(model, kind)):
        raise ValueError(
            f"the model has no {kind.method} adapter: apply(model, config) puts one on"
        )
    return list(found.values())


def known(model: nn.Module, names: Sequence[str], kind: type[V]) -> None:
    """Raise ValueError for an adapter that is not there."""
    for name in names:
        if name not in adapters(model, kind):
            raise ValueError(
                f"adapter={name!r} is not on the model; it has"
                f" {adapters(model, kind) or 'none'}"
            )


def refuse_merged(model: nn.Module, kind: type[V]) -> None:
    """Raise ValueError while adapters are merged."""
    if any(layer.kept is not None for layer in walk.installed(model, kind).values()):
        raise ValueError("adapters are merged into the weights: unmerge(model) first")


def own_tensors(
    model: nn.Module, tensors: dict[str, Tensor], wanted: Iterable[str]
) -> dict[str, Tensor]:
    """`tensors` without copies of the model's own weights, which `peft` adds to a file
    when the head is a target.
    """
    return {
        name: t
        for name, t in tensors.items()
        if name in wanted or not _is_base_weight(model, name, t)
    }


def _is_base_weight(model: nn.Module, name: str, tensor: Tensor) -> bool:
    place, _, what = name.replace(".base_layer.", ".").rpartition(".")
    own = getattr(walk.base_of(dict(walk.places(model)).get(place)), what, None)
    return (
        own is not None
        and own.shape == tensor.shape
        and torch.equal(own.detach(), tensor.to(own))
    )
