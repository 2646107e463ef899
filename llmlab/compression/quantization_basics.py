"""Uniform quantisation: real numbers as integers of b bits and a scale, rounded to
nearest (RTN).

Jacob et al. 2018, https://arxiv.org/abs/1712.05877, equation 1, r = S(q − Z); Nagel et
al. 2021, https://arxiv.org/abs/2106.08295, section 2, whose symbols are used here:

    q = clamp(⌊x / s⌉ + z, q_min, q_max)        x̂ = s · (q − z)

    x, x̂  real values, and what is left of them   b  bits
    q      integer codes                           s  scale, the step between two levels
    z      zero point, the code of 0               g  group size

Symmetric: z = 0, codes −(2^(b−1) − 1) … 2^(b−1) − 1, as many below zero as above.
Affine: codes 0 … 2^b − 1. A *block* is the set of values that share one s and z. Blocks
run along the last dimension, the one a linear sums over, so that each partial sum of a
matrix product has one scale. Simplified: codes are stored packed, but computed with as
floats; a GPU kernel unpacks them in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

BLOCKS = ("tensor", "row", "group")


@dataclass(frozen=True)
class QuantConfig:
    """How a tensor is quantised.

    `per="row"` means per output channel for a weight (out, in), and per token for
    activations (…, tokens, features).
    """

    bits: int = 4
    symmetric: bool = True
    per: str = "group"
    group_size: int = 64  # read when per="group"; it must divide the last dimension
    calibration: str = "minmax"
    percentile: float = 99.9  # read when calibration="percentile"
    # scales are rounded to what is stored before the codes are made
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise ValueError(f"bits={self.bits!r} must be an integer from 2 to 8")
        if self.per not in BLOCKS:
            raise ValueError(f"per={self.per!r} must be one of {BLOCKS}")
        if self.calibration not in RANGES:
            raise ValueError(
                f"calibration={self.calibration!r} must be one of {tuple(RANGES)}"
            )
        if self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1")
        if not 50 < self.percentile <= 100:
            raise ValueError(
                f"percentile={self.percentile} must be above 50 and at most 100"
            )

    @property
    def range(self) -> tuple[int, int]:
        """(q_min, q_max)."""
        top = 2 ** (self.bits - 1) - 1
        return (-top, top) if self.symmetric else (0, 2**self.bits - 1)


# The algorithm on blocks, one a row ---------------------------------------------------


def quantize(x: Tensor, scale: Tensor, zero: Tensor, q_min: int, q_max: int) -> Tensor:
    """q = clamp(⌊x / s⌉ + z, q_min, q_max), as floats that hold integers. Ties round to
    even, as PyTorch's do.
    """
    return (x / scale).round_().add_(zero).clamp_(q_min, q_max)


def dequantize(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x̂ = s · (q − z)."""
    return (q - zero).mul_(scale)


def scale_and_zero(
    lo: Tensor, hi: Tensor, config: QuantConfig
) -> tuple[Tensor, Tensor]:
    """s and z that map [lo, hi] onto all the codes. 0 is always one of the levels; a
    block of zeros gets s = 1.
    """
    q_min, q_max = config.range
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    step = (
        torch.maximum(-lo, hi) / q_max
        if config.symmetric
        else (hi - lo) / (q_max - q_min)
    )
    scale = step.to(config.scale_dtype).to(step.dtype)
    scale = torch.where(scale > 0, scale, 1.0)
    zero = (
        torch.zeros_like(scale)
        if config.symmetric
        else torch.round(-lo / scale).clamp(q_min, q_max)
    )
    return scale, zero


def minmax(
    x: Float[Tensor, "blocks size"], config: QuantConfig
) -> tuple[Tensor, Tensor]:
    """The whole range: nothing is clipped."""
    return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)


def percentile(
    x: Float[Tensor, "blocks size"], config: QuantConfig
) -> tuple[Tensor, Tensor]:
    """The range without the outermost values: the p-th percentile of |x|; of x, at both
    ends, when affine.
    """
    n = x.shape[-1]
    k = max(1, round(n * config.percentile / 100))  # nearest rank
    if config.symmetric:
        hi = x.abs().kthvalue(k, dim=-1, keepdim=True).values
        return -hi, hi
    return (
        x.kthvalue(n + 1 - k, dim=-1, keepdim=True).values,
        x.kthvalue(k, dim=-1, keepdim=True).values,
    )


def least_squares(
    x: Float[Tensor, "blocks size"], config: QuantConfig, steps: int = 25
) -> tuple[Tensor, Tensor]:
    """Of the min-max range and smaller ones, down to 0.4 of it, the one that leaves
    each block the least squared error.
    """
    lo, hi = minmax(x, config)
    best, kept = torch.full_like(lo, torch.inf), torch.ones_like(lo)
    for shrink in torch.linspace(1, 0.4, steps).tolist():
        scale, zero = scale_and_zero(lo * shrink, hi * shrink, config)
        error = (
            (dequantize(quantize(x, scale, zero, *config.range), scale, zero) - x)
            .square()
            .sum(-1, keepdim=True)
        )
        kept = torch.where(error < best, shrink, kept)
        best = torch.minimum(error, best)
    return lo * kept, hi * kept


RANGES: dict[str, Callable] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": least_squares,
}


def to_blocks(
    x: Float[Tensor, "... n"], config: QuantConfig
) -> Float[Tensor, "blocks size"]:
    """x with one block a row.

    Raises:
        ValueError: the group size does not divide the last dimension.
    """
    size = {"tensor": x.numel(), "row": x.shape[-1], "group": config.group_size}[
        config.per
    ]
    if config.per == "group" and x.shape[-1] % size:
        raise ValueError(
            f"group_size={size} must divide the last dimension, {x.shape[-1]}"
        )
    return x.reshape(-1, size)  # (…, n) → (blocks, size)


def encode(
    x: Float[Tensor, "... n"], config: QuantConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in x's shape, and s and z of shape (blocks, 1)."""
    blocks = to_blocks(x.detach().float(), config)
    scale, zero = scale_and_zero(*RANGES[config.calibration](blocks, config), config)
    return quantize(blocks, scale, zero, *config.range).reshape(x.shape), scale, zero


def decode(codes: Tensor, scale: Tensor, zero: Tensor, config: QuantConfig) -> Tensor:
    """x̂ in the shape of `codes`: the way back from `encode`."""
    return dequantize(to_blocks(codes, config), scale, zero).reshape(codes.shape)


class _StraightThrough(torch.autograd.Function):
    """Forward x̂. Backward as if x̂ were x, but 0 where x was clipped (Bengio et al.
    2013, arXiv 1308.3432).
    """

    @staticmethod
    def forward(ctx, x: Tensor, config: QuantConfig) -> Tensor:
        codes, scale, zero = encode(x, config)
        # what the codes would be without the clamp
        free = torch.round(to_blocks(x, config) / scale) + zero
        ctx.save_for_backward((free == to_blocks(codes, config)).reshape(x.shape))
        return decode(codes, scale, zero, config).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


def fake_quantize(
    x: Float[Tensor, "... n"], config: QuantConfig
) -> Float[Tensor, "... n"]:
    """x̂, with the straight-through gradient: what quantisation-aware training puts in
    x's place.
    """
    return _StraightThrough.apply(x, config)


# Storage ------------------------------------------------------------------------------


def pack(codes: Int[Tensor, "..."], bits: int) -> UInt8[Tensor, "bytes"]:
    """Codes 0 … 2^bits − 1 one after the other, lowest bit first, in ⌈numel · bits / 8⌉
    bytes.
    """
    places = torch.arange(bits, dtype=torch.uint8)
    stream = (codes.to(torch.uint8).reshape(-1, 1) >> places & 1).flatten()
    stream = F.pad(stream, (0, -len(stream) % 8)).reshape(-1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack(
    packed: UInt8[Tensor, "bytes"], bits: int, count: int
) -> UInt8[Tensor, "count"]:
    """The first `count` codes that `pack` put in."""
    stream = (packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[
        : count * bits
    ]
    return (stream.reshape(-1, bits) << torch.arange(bits, dtype=torch.uint8)).sum(
        -1, dtype=torch.uint8
    )


def bits_per_weight(config: QuantConfig, block_size: int | None = None) -> float:
    """Stored bits a weight: b, and a block's share of its scale and, when affine, of
    its b-bit zero point.
    """
    size = config.group_size if config.per == "group" else block_size
    if size is None:
        raise ValueError(
            f"block_size=None must be given when per={config.per!r}: the number of"
            " weights that share a scale"
        )
    return (
        config.bits
        + (8 * config.scale_dtype.itemsize + (0 if config.symmetric else config.bits))
        / size
    )


class QuantLinear(nn.Module):
    """A linear that keeps packed codes and scales, and builds its weight anew in each
    forward pass.
    """

    def __init__(self, linear: nn.Linear, config: QuantConfig) -> None:
        super().__init__()
        codes, scale, zero = encode(linear.weight, config)
        self.config, self.shape = config, tuple(linear.weight.shape)
        self.register_buffer("packed", pack(codes - config.range[0], config.bits))
        self.register_buffer("scale", scale.to(config.scale_dtype))
        self.register_buffer(
            "zero", None if config.symmetric else pack(zero, config.bits)
        )
        self.bias = linear.bias

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The dequantised weight, x̂."""
        (rows, columns), bits = self.shape, self.config.bits
        codes = unpack(self.packed, bits, rows * columns).float() + self.config.range[0]
        zero = (
            torch.zeros(1)
            if self.zero is None
            else unpack(self.zero, bits, len(self.scale)).float()[:, None]
        )
        return decode(
            codes.reshape(rows, columns), self.scale.float(), zero, self.config
        )

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """F.linear with the dequantised weight, in x's dtype."""
        return F.linear(x, self.weight.to(x.dtype), self.bias)


# The walk over a model ----------------------------------------------------------------


def linears(
    model: nn.Module, skip: tuple[str, ...] = ("lm_head",)
) -> dict[str, nn.Linear]:
    """The linears of a model by name, ours or a `transformers` one, but those whose
    last name is in `skip`.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: m for name, m in found.items() if name.split(".")[-1] not in skip}


@torch.no_grad()
def round_weights(
    model: nn.Module, config: QuantConfig, skip: tuple[str, ...] = ("lm_head",)
) -> nn.Module:
    """Every linear's weight becomes its x̂, in place, still as floats: the outputs of
    `apply` at the speed of floats.
    """
    for linear in linears(model, skip).values():
        linear.weight.copy_(decode(*encode(linear.weight, config), config))
    return model


@torch.no_grad()
def apply(
    model: nn.Module, config: QuantConfig, skip: tuple[str, ...] = ("lm_head",)
) -> nn.Module:
    """Every linear becomes a `QuantLinear`, in place: the model takes a few bits a
    weight.
    """
    for name, linear in linears(model, skip).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantLinear(linear, config))
    return model


def quantize_inputs(
    model: nn.Module, config: QuantConfig, skip: tuple[str, ...] = ("lm_head",)
) -> list:
    """Every linear sees its input quantised, the scale taken from that very input;
    `.remove()` each hook to undo it.
    """
    hook = lambda _, args: (fake_quantize(args[0], config), *args[1:])  # noqa: E731
    return [
        linear.register_forward_pre_hook(hook)
        for linear in linears(model, skip).values()
    ]


def nbytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each stored tensor counted once."""
    stored = {
        t.data_ptr(): t.numel() * t.element_size()
        for t in (*model.parameters(), *model.buffers())
    }
    return sum(stored.values())
