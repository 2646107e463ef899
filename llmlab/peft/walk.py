"""The walk over a model that all PEFT methods share: find layers, wrap them, put back.

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

from torch import Tensor, nn

ALL_LINEAR = "all-linear"
Targets = str | Sequence[str]


class Wrapper(nn.Module):
    """Stands where `base` stood; holds it unchanged, beside what a method adds.

    Some modules do not call a linear but read it: T5 asks `wo.weight` for its dtype,
    `nn.MultiheadAttention` multiplies with `out_proj.weight` itself. So a wrapper's
    `weight` and `bias` are those of the linear that computes the same, made anew at
    each reading; its gradient reaches what the method trains. What else is read, as the
    `eps` of a norm, is the base's.
    """

    # by this, code that looks into models knows a wrapper without importing it
    is_wrapper = True

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def __getattr__(self, name: str):
        """What a wrapper lacks is that of the layer that it stands for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base" not in self._modules:
                raise
            return getattr(self.stands_for(), name)

    def stands_for(self) -> nn.Module:
        """The layer in whose place it stands."""
        return base_of(self)

    @property
    def weight(self) -> Tensor:
        """That of the layer which computes the same; here the base's, as floats."""
        return weight_of(self.base)

    @property
    def bias(self) -> Tensor | None:
        """That of the layer which computes the same; here the base's."""
        return self.base.bias

    @property
    def adds(self) -> bool:
        """Whether it only adds to what the base gives, whatever the base's weight is.

        Then a method above it can merge into the weight below it.
        """
        return False


WrapperType = TypeVar("WrapperType", bound=Wrapper)


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
    return any(name == ending or name.endswith(f".{ending}") for ending in targets)


def find(
    model: nn.Module,
    targets: Targets,
    kind: type[nn.Module] = nn.Linear,
    exclude: Targets = (),
    blocks: Sequence[int] | None = None,
) -> dict[str, nn.Module]:
    """The layers of type `kind` that `targets` means (see `matches`), by name.

    Wrapped layers count as well. The order is the model's.

    Args:
        exclude: layers that are left out, written as `targets`.
        blocks: numbers of the blocks to look in; None: everywhere.

    Raises:
        ValueError: a target that no layer answers to, or one that is not a `kind`.
    """
    if not targets:
        raise ValueError(
            f"target_modules={targets!r} names no layer: give names such as ('q_proj',"
            " 'v_proj')"
        )
    found = {}
    left_out = []
    for name, module in places(model):
        if not matches(name, targets):
            continue
        elsewhere = blocks is not None and block_of(name) not in blocks
        if elsewhere or (exclude and matches(name, exclude)):
            left_out.append(name)
            continue
        if isinstance(base_of(module), kind):
            found[name] = module
        elif targets != ALL_LINEAR:  # which passes over all that is no linear
            raise ValueError(
                f"target_modules={targets!r} means {name!r}, a {type(module).__name__}:"
                f" only {kind.__name__} is allowed"
            )
    # a string is one target; of a list each entry must mean a layer
    each = [targets] if isinstance(targets, str) else [[target] for target in targets]
    for target in each:
        if not any(matches(name, target) for name in (*found, *left_out)):
            called = target if isinstance(target, str) else target[0]
            raise ValueError(
                f"target_modules: no layer is called {called!r}; this model has"
                f" {_endings(model, kind)}"
            )
    if not found:
        raise ValueError(
            f"exclude_modules={exclude!r} and layers_to_transform={blocks!r} leave no"
            f" layer of target_modules={targets!r}"
        )
    return found


def block_of(name: str) -> int | None:
    """The number of the block that a layer is in: 3 for 'model.layers.3.mlp.up_proj'.

    It is the first number in the name, as in `peft`; None where there is none.
    """
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else None


def base_of(module: nn.Module) -> nn.Module:
    """The layer under all wrappers."""
    while isinstance(module, Wrapper):
        module = module.base
    return module


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer or wrapper; of our 4-bit linears what the codes stand for.

    It has the layer's dtype.
    """
    if not isinstance(layer, Wrapper) and hasattr(layer, "dequantized"):
        return layer.dequantized().weight
    return layer.weight


def mergeable(wrapper: Wrapper) -> nn.Module:
    """The plain layer under `wrapper`, whose weight can take in a change.

    Raises:
        ValueError: a wrapper in between does more than to add, or the weight is no
            float parameter.
    """
    layer = wrapper.base
    while isinstance(layer, Wrapper) and layer.adds:
        layer = layer.base
    W = layer._parameters.get("weight")
    if isinstance(layer, Wrapper) or W is None:
        raise ValueError(
            f"merge: the layer under a {type(wrapper).__name__} is a"
            f" {type(layer).__name__}; only a plain float layer can take it in"
        )
    if not W.is_floating_point():
        raise ValueError(f"merge: the weights are {W.dtype}; dequantise the base first")
    return layer


def check_drops_nothing(model: nn.Module, name: str, dropout: float) -> None:
    """Raises: ValueError: dropout on a layer that is read and never called."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if dropout and isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"dropout={dropout}: {name!r} is in an nn.MultiheadAttention, which reads"
            " its weight and never calls it, so that nothing would be dropped"
        )


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at `name`, in the training mode of the one that stood there."""
    parent, _, child = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), child, module)


def installed(model: nn.Module, kind: type[WrapperType]) -> dict[str, WrapperType]:
    """The wrappers of type `kind` in `model`, by the names of the layers they wrap."""
    return {name: module for name, module in places(model) if isinstance(module, kind)}


def trainable(model: nn.Module) -> tuple[int, int]:
    """(parameters that train, all parameters); a tied one counts once."""
    total = sum(p.numel() for p in model.parameters())
    training = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return training, total


def unhook(module: nn.Module, owner: object) -> None:
    """Take off the forward (pre-)hooks of `module` that are methods of `owner`."""
    # torch keeps in a second table which hooks want keyword arguments
    tables = (
        (module._forward_hooks, module._forward_hooks_with_kwargs),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    )
    for hooks, with_kwargs in tables:
        for key, hook in list(hooks.items()):
            if getattr(hook, "__self__", None) is owner:
                del hooks[key]
                with_kwargs.pop(key, None)


def _endings(model: nn.Module, kind: type[nn.Module]) -> str:
    """'q_proj, k_proj, …': what a target could have been."""
    endings = []
    for name, module in places(model):
        ending = name.rpartition(".")[2]
        if isinstance(base_of(module), kind) and ending not in endings:
            endings.append(ending)
    return ", ".join(endings)
