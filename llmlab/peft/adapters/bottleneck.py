"""The bottleneck that every adapter is, and the seams of a block where one can be put.

    Δ(x) = s · (W_up f(W_down x + b_down) + b_up)          out ← out + Δ(x)

    x    (…, d)  what it reads        W_down (m, d)     d  hidden_size
    out  (…, d)  what it changes      W_up   (d, m)     m  its width
    f    activation                   B  batch          T  tokens
    s    scale

He et al. 2022 (https://arxiv.org/abs/2110.04366) sort adapters by what they read and
what they change. Here a `Seam` says both. `Site` holds the adapters of one seam of one
block and works by forward hooks, so that the block's own modules, and their names, stay
as they are, in our Llama as in transformers'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llmlab.peft import walk

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
STARTS = ("houlsby", "normal", "zero")


class Seam(NamedTuple):
    """A place in a block: whose output changes ("" is the block), and what is read."""

    module: str
    # "output", "input" of that module, or the "residual" stream before the MLP's norm
    reads: str


SEAMS = {
    "after_attention": Seam("self_attn", "output"),  # Houlsby, the first of two
    "after_mlp": Seam("mlp", "output"),  # Houlsby, the second
    "after_block": Seam("", "output"),  # Pfeiffer
    # He's parallel adapter: reads what the MLP reads
    "beside_mlp": Seam("mlp", "input"),
    # the same before the norm, as the `adapters` library has it
    "beside_mlp_residual": Seam("mlp", "residual"),
}


class Shape(NamedTuple):
    """What one bottleneck is like."""

    d: int
    m: int
    activation: str
    scale: float
    init: str
    dropout: float


def check(config: object) -> None:
    """Raises: ValueError: a setting of `config` that no bottleneck can have."""
    if not isinstance(config.bottleneck, int) or config.bottleneck < 1:
        raise ValueError(
            f"bottleneck must be an integer of at least 1, not {config.bottleneck!r}"
        )
    if config.activation not in ACTIVATIONS:
        raise ValueError(
            f"activation={config.activation!r} must be one of"
            f" {', '.join(map(repr, ACTIVATIONS))}"
        )
    if config.init not in STARTS:
        raise ValueError(
            f"init={config.init!r} must be one of {', '.join(map(repr, STARTS))}"
        )
    if not 0 <= config.dropout < 1:
        raise ValueError(
            f"dropout must be at least 0 and below 1, not {config.dropout!r}"
        )


def count(d: int, m: int) -> int:
    """2·m·d + d + m: the parameters of one bottleneck, biases included (Houlsby et al.
    2019, section 2.1).
    """
    return 2 * m * d + d + m


def flops(d: int, m: int, tokens: int) -> int:
    """Floating-point operations of its two matrix products."""
    return 2 * tokens * 2 * m * d


class Bottleneck(nn.Module):
    """Δ(x), in fp32 even on a half-precision base, with an optional gate over it."""

    def __init__(
        self, shape: Shape, like: Tensor, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.shape = shape
        dtype = torch.promote_types(like.dtype, torch.float32)
        kind = {"device": like.device, "dtype": dtype}
        self.down = nn.utils.skip_init(nn.Linear, shape.d, shape.m, **kind)
        self.up = nn.utils.skip_init(nn.Linear, shape.m, shape.d, **kind)
        self.gate: nn.Module | None = None
        start(self, shape.init, generator)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Δ(x), not yet added to anything."""
        x = x.to(self.down.weight.dtype)
        f = ACTIVATIONS[self.shape.activation]
        narrow = f(self.down(x))  # (*batch, m)
        delta = self.up(narrow) * self.shape.scale  # (*batch, d)
        delta = F.dropout(delta, self.shape.dropout, self.training)
        if self.gate is None:
            return delta
        return delta * self.gate(x)


@torch.no_grad()
def start(net: Bottleneck, init: str, generator: torch.Generator | None) -> None:
    """Start near the identity.

    Args:
        init: "houlsby" is N(0, 0.01²) cut at 2σ; "normal" is N(0, 0.02²), as in BERT;
            "zero" is zero up and Kaiming down, as in LoRA.
    """
    for linear in (net.down, net.up):
        nn.init.zeros_(linear.bias)
        if init == "houlsby":
            nn.init.trunc_normal_(
                linear.weight, std=0.01, a=-0.02, b=0.02, generator=generator
            )
        elif init == "normal":
            nn.init.normal_(linear.weight, std=0.02, generator=generator)
    if init == "zero":
        nn.init.kaiming_uniform_(net.down.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(net.up.weight)


class Site(walk.Wrapper):
    """The adapters at one seam of one block.

    It wraps no layer. It is a `Wrapper` so that the walk does not look inside.
    """

    def __init__(self, seam: Seam, layer: int) -> None:
        super().__init__(nn.Identity())
        self.seam = seam
        self.layer = layer
        self.nets = nn.ModuleDict()
        # a mixer joins several nets' outputs: AdapterFusion
        self.mixers = nn.ModuleDict()
        self.configs: dict[str, object] = {}
        self.active: str | None = None
        self.dropped = False  # AdapterDrop
        # the residual stream, on its way from the norm's hook to the MLP's
        self.seen: Tensor | None = None

    def change(self, x: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d"]:
        """Δ(x) of the active adapter, or of the active mixture of adapters."""
        if self.active in self.nets:
            return self.nets[self.active](x)
        mixer = self.mixers[self.active]
        z = torch.stack([self.nets[name](x) for name in mixer.names], dim=-2)
        return mixer(x, z)  # z (B, T, N, d)

    def before_norm(self, norm: nn.Module, args: tuple) -> None:
        """Pre-hook of the MLP's norm: keep what it reads."""
        self.seen = args[0]

    def after(
        self, module: nn.Module, args: tuple, kwargs: dict, output: object
    ) -> object:
        """Hook: out + Δ(x), summed in the adapter's precision and rounded once."""
        residual = self.seen
        self.seen = None
        if self.active is None or self.dropped:
            return output
        is_tuple = isinstance(output, tuple)  # from transformers' attention
        out = output[0] if is_tuple else output
        if self.seam.reads == "output":
            x = out
        elif self.seam.reads == "residual" and residual is not None:
            x = residual
        else:
            x = args[0] if args else kwargs["hidden_states"]
        changed = (out + self.change(x)).to(out.dtype)
        return (changed, *output[1:]) if is_tuple else changed

    def hook(self, block: nn.Module) -> None:
        """Begin to change `block`."""
        module = block.get_submodule(self.seam.module)
        module.register_forward_hook(self.after, with_kwargs=True)
        if self.seam.reads == "residual":
            block.post_attention_layernorm.register_forward_pre_hook(self.before_norm)

    def unhook(self, block: nn.Module) -> None:
        """Leave `block` as it was."""
        walk.unhook(block.get_submodule(self.seam.module), self)
        walk.unhook(block.post_attention_layernorm, self)


# Adapters -----------------------------------------------------------------------------


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of our Llama or of transformers'."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"model is a {type(model).__name__} without model.layers: only a Llama is"
            " supported"
        )
    return layers


def sites(model: nn.Module) -> dict[str, Site]:
    """The sites on `model`, by name, as in 'model.layers.0.after_mlp'."""
    return walk.installed(model, Site)


def names(model: nn.Module) -> list[str]:
    """The adapters on `model`, in the order they came; mixtures are not among them."""
    found: dict[str, None] = {}  # a set that remembers the order
    for site in sites(model).values():
        found.update(dict.fromkeys(site.nets))
    return list(found)


def mixtures(model: nn.Module) -> list[str]:
    """The mixtures of adapters on `model`."""
    found: dict[str, None] = {}
    for site in sites(model).values():
        found.update(dict.fromkeys(site.mixers))
    return list(found)


def check_new(model: nn.Module, adapter: str) -> None:
    """Raises: ValueError: `adapter` is on the model already, or is no good name."""
    if not adapter or "." in adapter or hasattr(nn.ModuleDict, adapter):
        raise ValueError(
            f"adapter={adapter!r} must be a name without dots that torch does not use"
            " itself (as 'type')"
        )
    if adapter in names(model) + mixtures(model):
        raise ValueError(
            f"adapter={adapter!r} exists already: remove it first, or take another name"
        )


def install(
    model: nn.Module,
    seams: Sequence[str],
    shape: Shape,
    config: object,
    adapter: str,
    generator: torch.Generator | None,
) -> nn.Module:
    """Freeze `model` and put a new bottleneck at each of `seams` of every block.

    They are the active ones from now on.
    """
    check_new(model, adapter)
    layers = blocks(model)
    model.requires_grad_(False)
    for i, block in enumerate(layers):
        for name in seams:
            if not hasattr(block, name):
                setattr(block, name, Site(SEAMS[name], i).train(model.training))
                getattr(block, name).hook(block)
            site = getattr(block, name)
            like = walk.base_of(block.mlp.down_proj).weight
            net = Bottleneck(shape, like, generator)
            site.nets[adapter] = net.train(model.training)
            site.configs[adapter] = config
    set_active(model, adapter)
    return model


def set_active(model: nn.Module, adapter: str | None) -> None:
    """Make this adapter or mixture the active one, which alone trains.

    None is the plain base.
    """
    known = names(model) + mixtures(model)
    if adapter is not None and adapter not in known:
        raise ValueError(
            f"adapter={adapter!r} is not on the model; it has {known or 'none'}"
        )
    for site in sites(model).values():
        is_here = adapter in site.nets or adapter in site.mixers
        site.active = adapter if is_here else None
        for name, net in [*site.nets.items(), *site.mixers.items()]:
            net.requires_grad_(name == adapter)


def discard(model: nn.Module, adapters: Sequence[str]) -> nn.Module:
    """Forget these adapters and the mixtures that read them.

    Without adapters `model` is the base again, bit for bit (still frozen).
    """
    for path, site in sites(model).items():
        gone = set(adapters)
        for name, mixer in site.mixers.items():
            if set(adapters) & set(mixer.names):
                gone.add(name)
        for table in (site.nets, site.mixers, site.configs):
            for name in gone & table.keys():
                del table[name]
        if site.active in gone:
            site.active = None
        if not site.nets:
            place, _, seam = path.rpartition(".")
            block = model.get_submodule(place)
            site.unhook(block)
            delattr(block, seam)
    return model
