"""The walk over a model that all PEFT methods share: find layers by name, wrap them,
put them back.

A method that changes a layer subclasses `Wrapper`. The walk sees a wrapper as one place
and never looks inside it, so a second adapter, or a second method, finds the same
places under the same names as the first.

>>> model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "k_proj": nn.Linear(4, 2)})
>>> list(find(model, ["q_proj"]))
['q_proj']
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch import nn

ALL_LINEAR = "all-linear"
Targets = str | Sequence[str]


class Wrapper(nn.Module):
    """Stands where `base` stood and holds it unchanged, with what a method adds beside
    it.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base


W = TypeVar("W", bound=Wrapper)


def places(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every (name, module) below `model`, parents first, wrappers as one place."""
    for child_name, child in model.named_children():
        name = f"{prefix}{child_name}"
        yield name, child
        if not isinstance(child, Wrapper):
            yield from places(child, f"{name}.")


def matches(name: str, targets: Targets) -> bool:
    """Whether `targets` means the module called `name`, by the rules of the `peft`
    library.

    A list holds names or their endings at a dot: "q_proj" means every `….q_proj`. A
    string is a regular expression for the whole name, or "all-linear": all but the
    output head.
    """
    if targets == ALL_LINEAR:
        return name != "lm_head"
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == t or name.endswith(f".{t}") for t in targets)


def find(
    model: nn.Module, targets: Targets, kind: type[nn.Module] = nn.Linear
) -> dict[str, nn.Module]:
    """The layers of type `kind`, wrapped or not, that `targets` means (see `matches`),
    by name, in the model's order.

    Raises:
        ValueError: a target that no layer answers to, or one that is not a `kind`.
    """
    if not targets:
        raise ValueError(
            f"target_modules={targets!r} names no layer: give names such as ('q_proj',"
            " 'v_proj')"
        )
    named = {name: module for name, module in places(model) if matches(name, targets)}
    if targets == ALL_LINEAR:
        named = {
            name: module
            for name, module in named.items()
            if isinstance(base_of(module), kind)
        }
    for name, module in named.items():
        if not isinstance(base_of(module), kind):
            raise ValueError(
                f"target_modules={targets!r} means {name!r}, a {type(module).__name__}:"
                f" only {kind.__name__} is allowed"
            )
    for target in [targets] if isinstance(targets, str) else targets:
        wanted = target if isinstance(targets, str) else [target]
        if not any(matches(name, wanted) for name in named):
            raise ValueError(
                f"target_modules: no layer is called {target!r}; this model has"
                f" {_endings(model, kind)}"
            )
    return named


def base_of(module: nn.Module) -> nn.Module:
    """The layer under all wrappers."""
    while isinstance(module, Wrapper):
        module = module.base
    return module


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at `name`, in the training mode of the one that stood there."""
    parent, _, child = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), child, module)


def installed(model: nn.Module, kind: type[W]) -> dict[str, W]:
    """The wrappers of type `kind` that stand in `model`, by the names of the layers
    that they stand for.
    """
    return {name: module for name, module in places(model) if isinstance(module, kind)}


def trainable(model: nn.Module) -> tuple[int, int]:
    """(parameters that train, all parameters); a tied one counts once."""
    sizes = [(p.requires_grad, p.numel()) for p in model.parameters()]
    return sum(n for grad, n in sizes if grad), sum(n for _, n in sizes)


def _endings(model: nn.Module, kind: type[nn.Module]) -> str:
    """'q_proj, k_proj, …': what a target could have been."""
    return ", ".join(
        dict.fromkeys(
            n.rpartition(".")[2]
            for n, m in places(model)
            if isinstance(base_of(m), kind)
        )
    )
