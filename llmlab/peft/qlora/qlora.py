"""QLoRA: LoRA on a base that is frozen in 4 bits.

Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, equation 5, in LoRA's symbols:

    h = ŵ(W₀) x + (α/r) B A x        ŵ(W₀) = dequantize(c₂, c, W₀ in NF4), made anew for
                                     each product

    W₀ (d, k)  4-bit codes with the scales c and c₂ (`nf4.py`), frozen
    A  (r, k), B  (d, r)  trained, in fp32 or better

Storage has 4 bits; arithmetic has x's dtype. The way back needs ŵ once more, ∂E/∂x = ŵᵀ
∂E/∂h + …, and dequantises again instead of keeping it; nothing ever asks for ∂E/∂W₀,
which rounding would make zero anyway. All linears but the output head are quantised,
whether or not they get an adapter, as in the paper; embedding, norms and biases keep
their dtype. Simplified: the fused kernels of a GPU dequantise inside the product.
Paging is in `paging.py`.
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
    """LoRA's settings, with the paper's choices as defaults, and how the base is
    stored.
    """

    r: int = 64
    alpha: float = 16
    # "critical" in the paper: adapters on every linear
    target_modules: walk.Targets = walk.ALL_LINEAR
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


class _FrozenProduct(torch.autograd.Function):
    """x ŵᵀ + bias. Saves codes, never ŵ; gives gradients to x and to the bias alone."""

    @staticmethod
    def forward(ctx, x: Tensor, q: nf4.Quantized, bias: Tensor | None) -> Tensor:
        ctx.q = q
        return F.linear(x, nf4.dequantize(q, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        for_x, _, for_bias = ctx.needs_input_grad
        grad_x = grad @ nf4.dequantize(ctx.q, grad.dtype) if for_x else None
        return (
            grad_x,
            None,
            grad.reshape(-1, grad.shape[-1]).sum(0) if for_bias else None,
        )


class Linear4bit(nn.Linear):
    """A linear whose weight is 4-bit codes. To the walk, and to LoRA, it is a linear
    like any other.
    """

    def __init__(
        self, linear: nn.Linear, kind: str, block: int, double: bool, keep: bool = False
    ) -> None:
        nn.Module.__init__(self)
        q = nf4.quantize(linear.weight, kind, block, double)
        self.in_features, self.out_features, self.bias = (
            linear.in_features,
            linear.out_features,
            linear.bias,
        )
        self.kind, self.block, self.dtype = kind, block, linear.weight.dtype
        self.weight = nn.Parameter(q.packed, requires_grad=False)
        self.register_buffer("scales", q.scales)
        self.register_buffer("scales2", q.scales2)
        self.register_buffer("offset", q.offset)
        # in a tuple it is no part of this module
        self.kept = (_on_host(linear),) if keep else ()

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
        return _FrozenProduct.apply(
            x, self.quantized, None if self.bias is None else self.bias.to(x.dtype)
        )

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
    return (
        linear
        if linear.weight.device.type in ("cpu", "meta")
        else copy.deepcopy(linear).cpu()
    )


def quantize(model: nn.Module, config: QLoRAConfig) -> nn.Module:
    """Put the base in 4 bits, in place: every linear that `config.quantize_modules`
    means and that has floats still.

    Raises:
        ValueError: a target names no linear.
    """
    for name, place in walk.find(model, config.quantize_modules).items():
        linear = walk.base_of(place)
        if linear.weight.is_floating_point():
            _put(
                model,
                name,
                Linear4bit(
                    linear, config.kind, config.block, config.double, config.keep_base
                ),
            )
    return model


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
        if isinstance(layer := walk.base_of(place), Linear4bit):
            yield name, layer


def dequantize(model: nn.Module) -> nn.Module:
    """Every 4-bit linear becomes a plain one with its ŵ, in place. What rounding took
    does not come back.
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
    """Freeze `model`, put its linears in 4 bits and add a LoRA adapter, the active one
    from now on. In place.

    `num_parameters`, `adapters`, `set_adapter`, `combine` and the rest of LoRA work on
    the result as they are.

    Raises:
        ValueError: as `lora.apply` does; the model is then as it was.
    """
    walk.find(model, config.quantize_modules)  # before anything changes: it may raise
    lora.apply(model, config, adapter, generator)
    return quantize(model, config)


def remove(model: nn.Module, adapter: str | None = None) -> nn.Module:
    """Take one adapter off, or all. With the last one gone, the base is what it was
    before `apply`, bit for bit.

    That is the float base where `keep_base` kept it, else the 4-bit one. It stays
    frozen.
    """
    lora.remove(model, adapter)
    for name, layer in list(installed(model)):
        if layer.kept and not lora.adapters(model):
            _put(
                model, name, layer.kept[0].to(layer.weight.device).requires_grad_(False)
            )
    return model


def merge_and_unload(model: nn.Module) -> nn.Module:
    """ŵ + ΔW as plain floats, 16 or 32 bits a weight again. Rounding them to 4 bits
    would throw most of ΔW away.
    """
    return lora.merge_and_unload(dequantize(model))


def save(model: nn.Module, folder: str | Path, adapter: str = "default") -> None:
    """Write one adapter as `peft` does. It is a LoRA adapter: the base's 4 bits are not
    in it.
    """
    files.save(model, folder, adapter)


def load(
    model: nn.Module, folder: str | Path, config: QLoRAConfig, adapter: str = "default"
) -> nn.Module:
    """Put a LoRA adapter, ours or `peft`'s, on `model` and the base in 4 bits as
    `config` says (its r and α are not read).

    Raises:
        FileNotFoundError, ValueError: as `lora_adapters.load` does.
    """
    walk.find(model, config.quantize_modules)
    files.load(model, folder, adapter)
    return quantize(model, config)


# What it costs ------------------------------------------------------------------------


def nbytes(model: nn.Module) -> dict[str, int]:
    """Bytes by kind: 4-bit codes, their scales, trained parameters, all other weights.
    Each tensor counts once.
    """
    count = {"codes": 0, "scales": 0, "trained": 0, "other": 0}
    layers = [layer for _, layer in installed(model)]
    codes = {id(layer.weight) for layer in layers}
    scales = {
        id(t) for layer in layers for t in (layer.scales, layer.scales2, layer.offset)
    }
    for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        mine = (
            "codes"
            if id(tensor) in codes
            else "scales"
            if id(tensor) in scales
            else "other"
        )
        count["trained" if tensor.requires_grad else mine] += (
            tensor.numel() * tensor.element_size()
        )
    return count


def memory_plan(
    config: LlamaConfig, settings: QLoRAConfig, batch: int = 1, seq: int = 512
) -> dict[str, int]:
    """Bytes on the GPU to train a Llama of shape `config`, as the paper has it: bf16
    adapters, gradients and inputs, Adam in fp32.

    With gradient checkpointing each block keeps its input alone, and recomputes one
    block at a time: the inputs of one block's linears live at once. Attention scores
    and logits are left out, as in the paper's figure 6.
    """
    d, f, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    shapes = {
        f"model.layers.{i}.{n}": s
        for i in range(L)
        for n, s in linear_shapes(config).items()
    }
    four = [
        m * k
        for name, (m, k) in shapes.items()
        if walk.matches(name, settings.quantize_modules)
    ]
    stored = [nf4.stored_bytes(n, settings.block, settings.double) for n in four]
    adapted = {
        name: shape
        for name, shape in shapes.items()
        if walk.matches(name, settings.target_modules)
    }
    trained = sum(settings.rank(name) * sum(shape) for name, shape in adapted.items())
    live = 2 * d + config.num_attention_heads * config.head_dim + 3 * f
    return {
        "4-bit codes": sum(s["codes"] for s in stored),
        "scales": sum(s["scales"] for s in stored),
        "other weights": 2 * (parameters(config) - sum(four)),
        "adapters": 2 * trained,
        "gradients": 2 * trained,
        "optimizer": 8 * trained,
        "activations": 2 * batch * seq * (L * d + live),
    }
