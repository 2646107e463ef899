"""QLoRA: LoRA on a base that is frozen in 4 bits.

Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, equation 5, in LoRA's symbols:

    h = ŵ x + (α/r) B A x        ŵ = dequantize(c₂, c, W₀ in NF4), made for each product

    W₀ (d, k)  4-bit codes with the scales c and c₂ (`nf4.py`), frozen
    ŵ  (d, k)  the weight that the codes stand for, in x's dtype
    A  (r, k)  trained, in fp32 or better
    B  (d, r)  trained, in fp32 or better

Storage has 4 bits; arithmetic has x's dtype. The backward pass needs ŵ once more,
∂E/∂x = ŵᵀ ∂E/∂h + …, and dequantises again instead of keeping it; nothing ever asks for
∂E/∂W₀, which rounding would make zero anyway. All linears but the output head are
quantised, whether or not they get an adapter, as in the paper; embedding, norms and
biases keep their dtype. Simplified: the fused kernels of a GPU dequantise inside the
product. Paging is in `paging.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llmlab.models.accounting import linear_shapes, parameters
from llmlab.models.llama import LlamaConfig
from llmlab.peft import lora, walk
from llmlab.peft.lora import LoRAConfig, files
from llmlab.peft.qlora import nf4


@dataclass(frozen=True)
class QLoRAConfig(LoRAConfig):
    """LoRA's settings, with the paper's defaults, and how the base is stored."""

    r: int = 64
    alpha: float = 16
    # "critical" in the paper: adapters on every linear
    target_modules: walk.Targets = walk.ALL_LINEAR
    # with `double`, the paper's; bitsandbytes and transformers take "fp4" unless asked
    kind: str = "nf4"  # the codebook: "nf4", "fp4", "e2m1" or "int4"
    block: int = 64
    double: bool = True  # double quantisation of the scales
    quantize_modules: walk.Targets = walk.ALL_LINEAR
    # keep the old weights in host memory, so that `remove` can put them back
    keep_base: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        nf4.levels_of(self.kind)
        if self.block not in nf4.BLOCKS:
            raise ValueError(f"block={self.block!r} must be one of {nf4.BLOCKS}")


class FrozenProduct(torch.autograd.Function):
    """x ŵᵀ + bias. Saves codes, never ŵ; gives gradients to x and to the bias alone."""

    @staticmethod
    def forward(ctx, x: Tensor, q: nf4.Quantized, bias: Tensor | None) -> Tensor:
        ctx.q = q
        return F.linear(x, nf4.dequantize(q, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        x_needs_grad, _, bias_needs_grad = ctx.needs_input_grad
        grad_x = None
        grad_bias = None
        if x_needs_grad:
            grad_x = grad @ nf4.dequantize(ctx.q, grad.dtype)  # (*batch, k)
        if bias_needs_grad:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)  # (d)
        return grad_x, None, grad_bias


class Linear4bit(nn.Linear):
    """A linear whose weight is 4-bit codes.

    For the walk, and for LoRA, it is a linear like any other.
    """

    def __init__(
        self, linear: nn.Linear, kind: str, block: int, double: bool, keep: bool = False
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a weight
        q = nf4.quantize(linear.weight, kind, block, double)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.kind = kind
        self.block = block
        self.dtype = linear.weight.dtype
        self.weight = nn.Parameter(q.packed, requires_grad=False)
        self.register_buffer("scales", q.scales)
        self.register_buffer("scales2", q.scales2)
        self.register_buffer("offset", q.offset)
        # in a tuple it is no part of this module
        self.float_linear = (_on_host(linear),) if keep else ()

    @property
    def quantized(self) -> nf4.Quantized:
        """The weight, as `nf4` has it."""
        shape = (self.out_features, self.in_features)
        return nf4.Quantized(
            self.weight.data,
            self.scales,
            self.scales2,
            self.offset,
            shape,
            self.dtype,
            self.kind,
            self.block,
        )

    def forward(self, x: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch d"]:
        """x ŵᵀ + bias in x's dtype."""
        bias = self.bias
        if bias is not None:
            bias = bias.to(x.dtype)
        return FrozenProduct.apply(x, self.quantized, bias)

    def dequantized(self) -> nn.Linear:
        """A plain linear with the weight ŵ, frozen; the bias is the same one."""
        linear = nn.Linear(
            self.in_features, self.out_features, bias=False, device="meta"
        )
        linear.weight = nn.Parameter(
            nf4.dequantize(self.quantized), requires_grad=False
        )
        linear.bias = self.bias
        return linear

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"{super().extra_repr()}, {self.kind}, block={self.block},"
            f" double={self.scales2 is not None}"
        )


def _on_host(linear: nn.Linear) -> nn.Linear:
    """`linear` itself in host memory; a copy there when it stands on an accelerator."""
    if linear.weight.device.type in ("cpu", "meta"):
        return linear
    return copy.deepcopy(linear).cpu()


def quantize(model: nn.Module, config: QLoRAConfig) -> nn.Module:
    """Put the base in 4 bits, in place.

    This means every linear of `config.quantize_modules` that still has floats.

    Raises:
        ValueError: a target names no linear, one that must stay in floats, or one that
            holds NaN or ∞ (named); the model is then as it was.
    """
    for name, linear in to_quantize(model, config).items():
        small = Linear4bit(
            linear, config.kind, config.block, config.double, config.keep_base
        )
        _put(model, name, small)
    return model


def to_quantize(model: nn.Module, config: QLoRAConfig) -> dict[str, nn.Linear]:
    """The linears that `quantize` puts in 4 bits, by name; raises as it does.

    Those whose weight the model reads instead of calling them, as T5 reads its `wo`,
    are what transformers keeps in fp32: "all-linear" passes over them.
    """
    found = {}
    in_floats = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, place in walk.find(model, config.quantize_modules).items():
        linear = walk.base_of(place)
        if not linear.weight.is_floating_point():
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        is_read = isinstance(parent, nn.MultiheadAttention)
        if is_read or walk.matches(name, in_floats):
            if config.quantize_modules == walk.ALL_LINEAR:
                continue
            raise ValueError(
                f"quantize_modules={config.quantize_modules!r}: {name!r} must stay in"
                " floats, since the model reads its weight instead of calling it"
            )
        nf4.check_finite(f"{name}.weight", linear.weight)
        found[name] = linear
    return found


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """`layer` at `name`, under whatever wrappers stand there."""
    place = model.get_submodule(name)
    while isinstance(place, walk.Wrapper) and isinstance(place.base, walk.Wrapper):
        place = place.base
    if isinstance(place, walk.Wrapper):
        place.base = layer.train(place.base.training)
    else:
        walk.replace(model, name, layer)


def installed(model: nn.Module) -> Iterator[tuple[str, Linear4bit]]:
    """The 4-bit linears by name, also those under wrappers."""
    for name, place in walk.places(model):
        layer = walk.base_of(place)
        if isinstance(layer, Linear4bit):
            yield name, layer


def dequantize(model: nn.Module) -> nn.Module:
    """Every 4-bit linear becomes a plain one with its ŵ, in place.

    What rounding lost does not come back.
    """
    for name, layer in list(installed(model)):
        _put(model, name, layer.dequantized())
    return model


def apply(
    model: nn.Module,
    config: QLoRAConfig,
    adapter: str = "default",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Freeze `model`, put its linears in 4 bits and add a LoRA adapter, in place.

    The adapter is the active one from now on.
    `num_parameters`, `adapters`, `set_adapter`, `combine` and the rest of LoRA work on
    the result as they are.

    Raises:
        ValueError: as `lora.apply` does; the model is then as it was.
    """
    to_quantize(model, config)  # before anything changes: it may raise
    lora.apply(model, config, adapter, generator)
    return quantize(model, config)


def remove(model: nn.Module, adapter: str | None = None) -> nn.Module:
    """Take one adapter off, or all of them.

    Without adapters the base is what it was before `apply`, bit for bit: the float base
    where `keep_base` saved it, else the 4-bit one. It stays frozen.
    """
    lora.remove(model, adapter)
    if lora.adapters(model):
        return model
    for name, layer in list(installed(model)):
        if layer.float_linear:
            linear = layer.float_linear[0].to(layer.weight.device)
            _put(model, name, linear.requires_grad_(False))
    return model


def merge_and_unload(model: nn.Module) -> nn.Module:
    """ŵ + ΔW as plain floats, 16 or 32 bits per weight again.

    Rounding them to 4 bits again loses most of a small ΔW: it falls between two levels.
    """
    return lora.merge_and_unload(dequantize(model))


def save(model: nn.Module, folder: str | Path, adapter: str = "default") -> None:
    """Write one adapter as `peft` does: a LoRA adapter, without the base's 4 bits."""
    files.save(model, folder, adapter)


def load(
    model: nn.Module, folder: str | Path, config: QLoRAConfig, adapter: str = "default"
) -> nn.Module:
    """Put a LoRA adapter, ours or `peft`'s, on `model`, and the base in 4 bits.

    Args:
        config: says how the base is stored; its r and α are not read.

    Raises:
        FileNotFoundError, ValueError: as `lora.files.load` does.
    """
    to_quantize(model, config)
    files.load(model, folder, adapter)
    return quantize(model, config)


# What it costs ------------------------------------------------------------------------


def nbytes(model: nn.Module) -> dict[str, int]:
    """Bytes by kind: 4-bit codes, their scales, trained parameters, all other weights.

    Each tensor counts once.
    """
    kinds: dict[int, str] = {}
    for _, layer in installed(model):
        kinds[id(layer.weight)] = "codes"
        for tensor in (layer.scales, layer.scales2, layer.offset):
            kinds[id(tensor)] = "scales"
    count = {"codes": 0, "scales": 0, "trained": 0, "other": 0}
    distinct = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for key, tensor in distinct.items():
        kind = "trained" if tensor.requires_grad else kinds.get(key, "other")
        count[kind] += tensor.numel() * tensor.element_size()
    return count


def memory_plan(
    config: LlamaConfig, settings: QLoRAConfig, batch: int = 1, seq: int = 512
) -> dict[str, int]:
    """Bytes on the GPU to train a Llama of shape `config`, as in the paper.

    Adapters, gradients and inputs are in bf16, Adam's state is in fp32.
    With gradient checkpointing each block keeps its input alone, and recomputes one
    block at a time: the inputs of one block's linears live at once. Attention scores
    and logits are left out, as in the paper's figure 6.
    """
    d = config.hidden_size
    L = config.num_hidden_layers
    quantized = 0  # weights in 4 bits
    codes = 0
    scales = 0
    trained = 0
    for i in range(L):
        for ending, (rows, columns) in linear_shapes(config).items():
            name = f"model.layers.{i}.{ending}"
            if walk.matches(name, settings.quantize_modules):
                n = rows * columns
                stored = nf4.stored_bytes(n, settings.block, settings.double)
                quantized += n
                codes += stored["codes"]
                scales += stored["scales"]
            if walk.matches(name, settings.target_modules):
                trained += settings.rank(name) * (rows + columns)
    # one token's inputs of one block's linears
    heads = config.num_attention_heads * config.head_dim
    live = 2 * d + heads + 3 * config.intermediate_size
    return {
        "4-bit codes": codes,
        "scales": scales,
        "other weights": 2 * (parameters(config) - quantized),
        "adapters": 2 * trained,
        "gradients": 2 * trained,
        "optimizer": 8 * trained,
        "activations": 2 * batch * seq * (L * d + live),
    }
