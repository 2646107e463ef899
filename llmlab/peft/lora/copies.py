"""What an adapter trains besides A and B: biases, and modules that it copies whole.

`peft` has two settings for this. `bias="lora_only"` trains the biases of the target
layers, `"all"` those of every layer; `modules_to_save` trains whole modules, such as a
new head. `peft` trains the base's own biases, so that its base is another one once the
adapter is off. Here each adapter has copies of its own, of biases as of modules, and
the base is never written to.

    b    (d)  the base's bias        b_a  an adapter's copy of it

    bias in use:    b + Σ (b_a − b)   over the active adapters; b_a if there is one
    module in use:  the active adapter's copy; two copies cannot be active together

A module that was tied to another, as a head to the embedding, is not tied any more in
its copy: so it is in `peft`, too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from llmlab.peft import walk

BIASES = ("none", "lora_only", "all")


class Adapted(walk.Wrapper):
    """A frozen layer and what adapters train at it; the active ones have an effect."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.biases = nn.ParameterDict()  # copies of the base's bias
        self.configs: dict[str, object] = {}
        self.active: tuple[str, ...] = ()
        # one adapter for each row of the batch
        self.rows: Sequence[str | None] | None = None

    @property
    def merged(self) -> bool:
        """Whether what the active adapters train stands in the layer's own place."""
        raise NotImplementedError

    def held(self) -> list[Mapping]:
        """By adapter: the parameters and modules that train."""
        return [self.biases]

    def add_bias(self, adapter: str, config: object) -> None:
        """A copy of the base's bias, in fp32 even on a half-precision base."""
        b = walk.base_of(self).bias.detach()
        dtype = torch.promote_types(b.dtype, torch.float32)
        self.biases[adapter] = nn.Parameter(b.to(dtype, copy=True))
        self.configs[adapter] = config

    def activate(self, adapters: Sequence[str]) -> None:
        """Use these adapters from now on, and train these alone."""
        self.active = tuple(a for a in adapters if a in self.configs)
        self.train_only(self.active)

    def train_only(self, adapters: Sequence[str | None]) -> None:
        """Train the parameters of these adapters, and those of no other."""
        for held in self.held():
            for adapter, trained in held.items():
                trained.requires_grad_(adapter in adapters)

    def trained(self) -> list[str]:
        """The adapters whose parameters train."""
        found = {}
        for held in self.held():
            for adapter, trained in held.items():
                is_module = isinstance(trained, nn.Module)
                parameters = trained.parameters() if is_module else [trained]
                if any(p.requires_grad for p in parameters):
                    found[adapter] = None
        return list(found)

    def discard(self, adapters: Sequence[str]) -> None:
        """Forget these adapters."""
        for of_adapter in (*self.held(), self.configs):
            for adapter in adapters:
                if adapter in of_adapter:
                    del of_adapter[adapter]
        self.active = tuple(a for a in self.active if a in self.configs)

    def bias_with(self, adapters: Sequence[str]) -> Float[Tensor, "d"] | None:
        """The bias in use where these adapters are active, in the base's dtype.

        None: none of them has a copy.
        """
        own = [self.biases[a] for a in adapters if a in self.biases]
        if not own:
            return None
        b = walk.base_of(self).bias
        if len(own) == 1:
            return own[0].to(b.dtype)
        return (b + sum(b_a - b for b_a in own)).to(b.dtype)

    def base_with(self, adapters: Sequence[str], *args, **kwargs) -> Tensor:
        """What the base gives with the biases of these adapters."""
        bias = self.bias_with(adapters)
        if bias is None:
            return self.base(*args, **kwargs)
        name = "bias"
        layer = self.base
        while isinstance(layer, walk.Wrapper):
            name = f"base.{name}"
            layer = layer.base
        return functional_call(self.base, {name: bias}, args, kwargs)

    def by_rows(self, call: Callable[..., Tensor], *batches: Tensor) -> Tensor:
        """Each row through its own adapter; a row of None is the base's alone.

        Rows of one adapter go through it together.

        Args:
            call: what the layer gives for the adapters that are active and some rows of
                each of `batches`.
        """
        if len(self.rows) != len(batches[0]):
            raise ValueError(
                f"rows names {len(self.rows)} adapters for a batch of {len(batches[0])}"
            )
        groups: dict[str | None, list[int]] = {}
        for i, adapter in enumerate(self.rows):
            groups.setdefault(adapter if adapter in self.configs else None, []).append(
                i
            )
        places = []
        parts = []
        for adapter, its_rows in groups.items():
            index = torch.tensor(its_rows, device=batches[0].device)
            active = () if adapter is None else (adapter,)
            parts.append(call(active, *(batch[index] for batch in batches)))
            places.append(index)
        out = torch.cat(parts)[torch.cat(places).argsort()]
        return _WhileRowsTrain.apply(out, self)


class _WhileRowsTrain(torch.autograd.Function):
    """The identity. Its backward pass wants that the rows' adapters still train."""

    @staticmethod
    def forward(ctx, out: Tensor, layer: Adapted) -> Tensor:
        ctx.layer = layer
        ctx.adapters = [a for a in dict.fromkeys(layer.rows) if a in layer.trained()]
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        trained = ctx.layer.trained()
        for adapter in ctx.adapters:
            if adapter not in trained:
                raise ValueError(
                    f"by_row: adapter={adapter!r} does not train any more, so that its"
                    " gradient would be lost: call backward inside `with by_row(…)`"
                )
        return grad, None


class BiasCopies(Adapted):
    """A frozen layer without a low-rank change, and copies of its bias."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        # (b,) while merged. In a tuple, b is no parameter of this module.
        self.saved_bias: tuple[nn.Parameter, ...] = ()

    @property
    def merged(self) -> bool:
        """Whether the active copies stand for the base's bias."""
        return bool(self.saved_bias)

    @property
    def bias(self) -> Tensor:
        """The bias in use."""
        own = None if self.merged else self.bias_with(self.active)
        return self.base.bias if own is None else own

    def forward(self, *args, **kwargs) -> Tensor:
        """The base, with the bias in use."""
        if self.merged:
            return self.base(*args, **kwargs)
        if self.rows is None:
            return self.base_with(self.active, *args, **kwargs)
        x = only_input(self, args, kwargs)
        return self.by_rows(self.base_with, x)

    def merge(self) -> None:
        """The bias in use becomes the base's."""
        linear = walk.base_of(self)
        bias = self.bias.detach().clone()
        self.saved_bias = (linear.bias,)
        linear.bias = nn.Parameter(bias, requires_grad=False)

    def unmerge(self) -> None:
        """Put the very same b back."""
        if self.merged:
            walk.base_of(self).bias = self.saved_bias[0]
            self.saved_bias = ()

    def unwrapped(self) -> nn.Module:
        """What stands here without a wrapper, once merged or without adapters."""
        return self.base


class WholeModule(Adapted):
    """A frozen module and the adapters' trained copies of it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.copies = nn.ModuleDict()
        self.is_merged = False

    def stands_for(self) -> nn.Module:
        """The module in use."""
        return self.in_use() if "copies" in self._modules else walk.base_of(self)

    @property
    def weight(self) -> Tensor:
        """That of the module in use."""
        return self.in_use().weight

    @property
    def bias(self) -> Tensor | None:
        """That of the module in use."""
        return self.in_use().bias

    @property
    def merged(self) -> bool:
        """Whether the active copy is to stay: nothing else tells the two apart."""
        return self.is_merged

    def held(self) -> list[Mapping]:
        """By adapter: the copies."""
        return [self.copies]

    def add_copy(self, adapter: str, config: object) -> None:
        """A copy of the base, in the base's dtype, with weights of its own."""
        self.copies[adapter] = copy.deepcopy(self.base).requires_grad_(True)
        self.configs[adapter] = config

    def in_use(self, adapters: Sequence[str] | None = None) -> nn.Module:
        """The copy of the one among these adapters that has one, or the base."""
        for adapter in self.active if adapters is None else adapters:
            if adapter in self.copies:
                return self.copies[adapter]
        return self.base

    def forward(self, *args, **kwargs):
        """What the module in use gives."""
        if self.rows is None:
            return self.in_use()(*args, **kwargs)
        x = only_input(self, args, kwargs)
        return self.by_rows(lambda active, x: self.in_use(active)(x), x)

    def merge(self) -> None:
        """From now on the copy in use is meant to stay."""
        self.is_merged = True

    def unmerge(self) -> None:
        """Back to a copy that can be switched off."""
        self.is_merged = False

    def unwrapped(self) -> nn.Module:
        """What stands here without a wrapper."""
        return self.in_use().requires_grad_(False)


def only_input(layer: Adapted, args: tuple, kwargs: dict) -> Tensor:
    """The one tensor that a layer is called with, whose rows can be told apart.

    Raises:
        ValueError: it is called otherwise.
    """
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        kind = type(walk.base_of(layer)).__name__
        raise ValueError(
            f"by_row: a {kind} is called with more than one tensor, so its rows cannot"
            " go through different copies"
        )
    return args[0]


# Which modules and which biases -------------------------------------------------------


def whole_modules(model: nn.Module, endings: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that `modules_to_save` means, by name.

    The rule is that of `peft`: a name means every module whose name *ends* with it,
    where "norm" means `input_layernorm`, too.

    Raises:
        ValueError: a name that means nothing, or a module that cannot be copied.
    """
    found = {}
    for name, module in walk.places(model):
        if isinstance(walk.base_of(module), nn.Identity):
            continue  # other methods' places, which hold no layer
        if any(name.endswith(ending) for ending in endings):
            check_whole(name, module, found)
            found[name] = module
    for name in hidden(model):
        if any(name.endswith(ending) for ending in endings):
            raise ValueError(
                f"modules_to_save: {name!r} is a part of what trains whole in another"
                " adapter"
            )
    for ending in endings:
        if not any(name.endswith(ending) for name in found):
            raise ValueError(f"modules_to_save: no module's name ends with {ending!r}")
    return found


def hidden(model: nn.Module) -> Iterator[str]:
    """The names of parts of modules that an adapter has copied whole."""
    for name, module in walk.places(model):
        if isinstance(module, WholeModule):
            for part, _ in module.base.named_modules():
                if part:
                    yield f"{name}.{part}"


def check_whole(name: str, module: nn.Module, others: Mapping[str, nn.Module]) -> None:
    """Raises: ValueError: no copy of `module` can train; says why."""
    why = None
    base = walk.base_of(module)
    if isinstance(module, walk.Wrapper) and not isinstance(module, WholeModule):
        why = f"carries a {type(module).__name__} already"
    elif any(isinstance(part, walk.Wrapper) for part in base.modules()):
        why = "has parts with adapters already"
    elif any(name.startswith(f"{other}.") for other in others):
        why = "is a part of another one of them"
    elif not list(base.parameters()):
        why = "has no parameters"
    elif not all(p.is_floating_point() for p in base.parameters()):
        why = f"is a {type(base).__name__} whose weights are no floats"
    if why:
        raise ValueError(f"modules_to_save: {name!r} {why}, so it cannot train whole")


def biased(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have a bias of their own, by name.

    Raises:
        ValueError: such a layer is inside of a module that another adapter has copied.
    """
    found = {}
    for name, module in walk.places(model):
        if has_bias(module):
            found[name] = module
        elif isinstance(module, WholeModule) and any(
            has_bias(part) for part in module.base.modules()
        ):
            raise ValueError(
                f"bias='all': {name!r}, which has biases, trains whole in another"
                " adapter"
            )
    return found


def has_bias(module: nn.Module) -> bool:
    """Whether the layer under all wrappers has a bias of its own."""
    return walk.base_of(module)._parameters.get("bias") is not None
