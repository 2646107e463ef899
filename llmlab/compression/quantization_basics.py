"""Uniform quantisation: integers of b bits and a scale, rounded to nearest (RTN).

Jacob et al. 2018, https://arxiv.org/abs/1712.05877, equation 1, r = S(q − Z); Nagel et
al. 2021, https://arxiv.org/abs/2106.08295, section 2, whose symbols are used here:

    q = clamp(⌊x / s⌉ + z, q_min, q_max)        x̂ = s · (q − z)

    x     real values
    x̂     real values again, after quantisation
    q     integer codes
    b     bits of a code
    s     scale: the step between two levels
    z     zero point: the code of 0
    n     length of the last dimension
    lo    lower end of the range that the codes cover, hi its upper end

Symmetric: z = 0, codes −(2^(b−1) − 1) … 2^(b−1) − 1, as many below zero as above.
Affine: codes 0 … 2^b − 1. A *block* is the set of values that share one s and z. Blocks
run along the last dimension, the one that a linear sums over. So each partial sum of a
matrix product has one scale. Simplified: codes are stored packed, but computed with as
floats; a GPU kernel unpacks them in registers.

A scale is stored in a float type of its own, and may not fit it: 6e5 / 7 is more than
float16 holds, and 1e-6 / 127 is less. Then it is the largest or the smallest that there
is, and the values beyond the last level are clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

BLOCKS = ("tensor", "row", "group")
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
    # What is stored: scales are rounded to it before the codes are made.
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
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(
                f"scale_dtype={self.scale_dtype} must be one of {SCALE_DTYPES}"
            )
        if not (isinstance(self.group_size, Integral) and self.group_size >= 1):
            raise ValueError(
                f"group_size={self.group_size!r} must be an integer and at least 1"
            )
        if self.symmetric not in (True, False):
            raise ValueError(f"symmetric={self.symmetric!r} must be True or False")
        if not 50 < self.percentile <= 100:
            raise ValueError(
                f"percentile={self.percentile} must be above 50 and at most 100"
            )

    @property
    def range(self) -> tuple[int, int]:
        """(q_min, q_max)."""
        if self.symmetric:
            top = 2 ** (self.bits - 1) - 1
            return -top, top
        return 0, 2**self.bits - 1


# The algorithm on blocks, one per row -------------------------------------------------


def quantize(x: Tensor, scale: Tensor, zero: Tensor, q_min: int, q_max: int) -> Tensor:
    """q = clamp(⌊x / s⌉ + z, q_min, q_max), as floats that hold integers.

    Ties round to even, as in PyTorch.
    """
    return (x / scale).round_().add_(zero).clamp_(q_min, q_max)


def dequantize(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x̂ = s · (q − z)."""
    return (q - zero).mul_(scale)


def storable(step: Float[Tensor, "blocks 1"], dtype: torch.dtype) -> Tensor:
    """`step` rounded to what `dtype` holds, in the dtype of `step`; never 0 or ∞.

    Subnormal numbers of `dtype` lie far apart, and rounding down there would clip the
    largest values: they are rounded up.
    """
    kind = torch.finfo(dtype)
    smallest = kind.tiny * kind.eps
    up = (step / smallest).ceil().clamp(min=1) * smallest
    # clamped first: ∞ is what rounding would make of more
    nearest = step.clamp(max=kind.max).to(dtype).to(step.dtype)
    return torch.where(step < kind.tiny, up, nearest)


def finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, where the last level may lie a little above the largest number."""
    kind = torch.finfo(dtype)
    return x.clamp(kind.min, kind.max).to(dtype)


def scale_and_zero(
    lo: Tensor, hi: Tensor, config: QuantConfig
) -> tuple[Tensor, Tensor]:
    """s and z that map [lo, hi] onto all the codes.

    0 is always one of the levels. A block of zeros gets s = 1.
    """
    q_min, q_max = config.range
    lo = lo.clamp(max=0)
    hi = hi.clamp(min=0)
    if config.symmetric:
        step = torch.maximum(-lo, hi) / q_max
    else:
        steps = q_max - q_min
        step = (hi - lo) / steps
        step = torch.where(step.isinf(), hi / steps - lo / steps, step)
    scale = torch.where(step > 0, storable(step, config.scale_dtype), 1.0)
    if config.symmetric:
        zero = torch.zeros_like(scale)
    else:
        zero = torch.round(-lo / scale).clamp(q_min, q_max)
    return scale, zero


def minmax(
    x: Float[Tensor, "blocks size"], config: QuantConfig
) -> tuple[Tensor, Tensor]:
    """The whole range: nothing is clipped."""
    return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)


def percentile(
    x: Float[Tensor, "blocks size"], config: QuantConfig
) -> tuple[Tensor, Tensor]:
    """The range without the outermost values.

    Symmetric: up to the percentile of |x|. Affine: between the two percentiles of x.
    """
    size = x.shape[-1]
    rank = max(1, round(size * config.percentile / 100))  # the nearest one
    if config.symmetric:
        hi = x.abs().kthvalue(rank, dim=-1, keepdim=True).values
        return -hi, hi
    lo = x.kthvalue(size + 1 - rank, dim=-1, keepdim=True).values
    hi = x.kthvalue(rank, dim=-1, keepdim=True).values
    return lo, hi


def least_squares(
    x: Float[Tensor, "blocks size"], config: QuantConfig, steps: int = 25
) -> tuple[Tensor, Tensor]:
    """The range that leaves a block the least squared error.

    It is searched among the min-max range and smaller ones, down to 0.4 of it, for
    each block by itself.
    """
    lo, hi = minmax(x, config)
    best_error = torch.full_like(lo, torch.inf)
    best_shrink = torch.ones_like(lo)
    for shrink in torch.linspace(1, 0.4, steps).tolist():
        scale, zero = scale_and_zero(lo * shrink, hi * shrink, config)
        codes = quantize(x, scale, zero, *config.range)
        error = dequantize(codes, scale, zero) - x
        error = error.square().sum(-1, keepdim=True)  # (blocks, 1)
        best_shrink = torch.where(error < best_error, shrink, best_shrink)
        best_error = torch.minimum(error, best_error)
    return lo * best_shrink, hi * best_shrink


RANGES: dict[str, Callable] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": least_squares,
}


def to_blocks(
    x: Float[Tensor, "... n"], config: QuantConfig
) -> Float[Tensor, "blocks size"]:
    """x with one block per row.

    Raises:
        ValueError: the group size does not divide the last dimension.
    """
    sizes = {"tensor": x.numel(), "row": x.shape[-1], "group": config.group_size}
    size = sizes[config.per]
    if config.per == "group" and x.shape[-1] % size:
        raise ValueError(
            f"group_size={size} must divide the last dimension, {x.shape[-1]}"
        )
    return x.reshape(-1, size)  # (…, n) → (blocks, size)


def check_finite(name: str, x: Tensor) -> None:
    """Raises: ValueError: the tensor called `name` holds NaN or ∞."""
    # One NaN or ∞ makes the sum one; only then is each value looked at.
    if x.detach().sum(dtype=torch.float32).isfinite():
        return
    bad = int((~x.detach().isfinite()).sum())
    if bad:
        raise ValueError(
            f"{name} holds {bad} values that are NaN or infinite: no scale fits them"
        )


def encode(
    x: Float[Tensor, "... n"], config: QuantConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in the shape of x, and s and z of shape (blocks, 1).

    Raises:
        ValueError: x holds NaN or ∞, or the group size does not divide the last
            dimension.
    """
    blocks = to_blocks(x.detach().float(), config)
    check_finite("x", blocks)
    find_range = RANGES[config.calibration]
    lo, hi = find_range(blocks, config)
    scale, zero = scale_and_zero(lo, hi, config)
    codes = quantize(blocks, scale, zero, *config.range)
    return codes.reshape(x.shape), scale, zero


def decode(codes: Tensor, scale: Tensor, zero: Tensor, config: QuantConfig) -> Tensor:
    """x̂ in the shape of `codes`: the inverse of `encode`, but for the rounding."""
    blocks = dequantize(to_blocks(codes, config), scale, zero)
    return finite(blocks, blocks.dtype).reshape(codes.shape)


def nearest(x: Float[Tensor, "... n"], config: QuantConfig) -> Float[Tensor, "... n"]:
    """x̂: round to nearest (RTN), each block with a scale of its own."""
    return decode(*encode(x, config), config)


class _StraightThrough(torch.autograd.Function):
    """Forward x̂. Backward as if x̂ were x, but 0 where x was clipped.

    Bengio et al. 2013, https://arxiv.org/abs/1308.3432.
    """

    @staticmethod
    def forward(ctx, x: Tensor, config: QuantConfig) -> Tensor:
        codes, scale, zero = encode(x, config)
        # A value was clipped where its code is not what it would be without the clamp.
        unclamped = torch.round(to_blocks(x, config) / scale) + zero
        inside = unclamped == to_blocks(codes, config)
        ctx.save_for_backward(inside.reshape(x.shape))
        return finite(decode(codes, scale, zero, config), x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None


def fake_quantize(
    x: Float[Tensor, "... n"], config: QuantConfig
) -> Float[Tensor, "... n"]:
    """x̂ with the straight-through gradient, as in quantisation-aware training."""
    return _StraightThrough.apply(x, config)


# Storage ------------------------------------------------------------------------------


def pack(codes: Int[Tensor, "..."], bits: int) -> UInt8[Tensor, "bytes"]:
    """Codes as a stream of bits, one code after the other, the lowest bit first.

    Eight codes of b bits are b bytes: they are put together in one word of 64 bits.

    Args:
        codes: 0 … 2^bits − 1.
    Returns:
        ⌈numel · bits / 8⌉ bytes.
    """
    count = codes.numel()
    codes = codes.to(torch.uint8).flatten()
    codes = F.pad(codes, (0, -count % 8)).reshape(-1, 8)  # (words, 8)
    words = torch.zeros(len(codes), dtype=torch.int64)
    for i in range(8):
        words |= codes[:, i].long() << bits * i
    parts = [(words >> 8 * j).to(torch.uint8) for j in range(bits)]
    stream = torch.stack(parts, -1).flatten()  # (words, bits) -> (words · bits,)
    return stream[: -(-count * bits // 8)].clone()


def unpack(
    packed: UInt8[Tensor, "bytes"], bits: int, count: int
) -> UInt8[Tensor, "count"]:
    """The first `count` codes that `pack` put in."""
    stream = F.pad(packed, (0, -len(packed) % bits)).reshape(-1, bits)  # (words, bits)
    words = torch.zeros(len(stream), dtype=torch.int64)
    for j in range(bits):
        words |= stream[:, j].long() << 8 * j
    parts = [(words >> bits * i).to(torch.uint8) for i in range(8)]
    codes = torch.stack(parts, -1).flatten()[:count]  # (words, 8) -> (count,)
    return codes & 2**bits - 1


def bits_per_weight(config: QuantConfig, block_size: int | None = None) -> float:
    """Stored bits per weight: its code, and its share of what the block stores.

    A block stores its scale and, when affine, a zero point of b bits.

    Args:
        block_size: weights per block; needed unless `per="group"`.
    Raises:
        ValueError: the size of a block is not known.
    """
    size = config.group_size if config.per == "group" else block_size
    if size is None:
        raise ValueError(
            f"block_size=None must be given when per={config.per!r}: the number of"
            " weights that share a scale"
        )
    block_bits = 8 * config.scale_dtype.itemsize
    if not config.symmetric:
        block_bits += config.bits
    return config.bits + block_bits / size


class QuantLinear(nn.Module):
    """A linear that stores packed codes, and makes its weight in each forward pass."""

    is_compressed = True

    def __init__(self, linear: nn.Linear, config: QuantConfig) -> None:
        super().__init__()
        self._store(*encode(linear.weight, config), config, linear.bias)

    @classmethod
    def of(
        cls,
        codes: Float[Tensor, "out in"],
        scale: Tensor,
        zero: Tensor,
        config: QuantConfig,
        bias: nn.Parameter | None = None,
    ) -> QuantLinear:
        """From codes that another method chose, or that a file holds.

        Args:
            codes: within `config.range`.
            scale: of each block, in the order of `encode`, as is `zero`.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        scale = scale.reshape(-1, 1)
        made._store(codes, scale, zero.reshape(-1, 1), config, bias)
        return made

    def _store(self, codes, scale, zero, config, bias) -> None:
        self.config = config
        self.shape = tuple(codes.shape)
        q_min, _ = config.range
        packed_zero = None if config.symmetric else pack(zero, config.bits)
        self.register_buffer("packed", pack(codes - q_min, config.bits))
        self.register_buffer("scale", scale.to(config.scale_dtype))
        self.register_buffer("zero", packed_zero)
        self.bias = bias

    def codes(self) -> Float[Tensor, "out in"]:
        """The codes q, as floats that hold integers."""
        rows, columns = self.shape
        q_min, _ = self.config.range
        codes = unpack(self.packed, self.config.bits, rows * columns).float() + q_min
        return codes.reshape(rows, columns)

    def zeros(self) -> Float[Tensor, "blocks 1"]:
        """The zero point z of each block."""
        if self.zero is None:
            return torch.zeros(len(self.scale), 1)
        return unpack(self.zero, self.config.bits, len(self.scale)).float()[:, None]

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The dequantised weight, x̂."""
        return decode(self.codes(), self.scale.float(), self.zeros(), self.config)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """F.linear with the dequantised weight, in the dtype of x."""
        return F.linear(x, finite(self.weight, x.dtype), self.bias)


# The walk over a model ----------------------------------------------------------------


def linears(
    model: nn.Module, skip: tuple[str, ...] = ("lm_head",)
) -> dict[str, nn.Linear]:
    """The linears of a model by name; the model may be one of `transformers`.

    Under an adapter it is the layer that the adapter changes, as in QLoRA; what the
    adapter trains is left out.

    Args:
        skip: last names of linears that are left out.
    """
    found = {}
    for name, place, module in layers(model):
        last_name = place.rpartition(".")[2]
        if isinstance(module, nn.Linear) and last_name not in skip:
            found[name] = module
    return found


def layers(
    model: nn.Module, name: str = "", place: str = ""
) -> Iterator[tuple[str, str, nn.Module]]:
    """Every (name, place, module) below `model`.

    A wrapper (`llmlab.peft.walk.Wrapper`) stands at the place of the layer that it
    wraps: of it, that layer alone is looked at.
    """
    wraps = getattr(model, "is_wrapper", False)
    for child_name, child in model.named_children():
        if not wraps:
            found = (f"{name}{child_name}", f"{place}{child_name}")
        elif child_name == "base":
            found = (f"{name}base", place.removesuffix("."))
        else:
            continue
        yield *found, child
        yield from layers(child, f"{found[0]}.", f"{found[1]}.")


def float_linears(model: nn.Module, skip: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linears of a model by name, once it is sure that all can be quantised.

    Raises:
        ValueError: a weight is no float, or holds NaN or ∞; it is named.
    """
    found = linears(model, skip)
    for name, linear in found.items():
        if not linear.weight.is_floating_point():
            raise ValueError(
                f"{name} is a {type(linear).__name__} in {linear.weight.dtype}: it is"
                " quantised already, so dequantise it first"
            )
        check_finite(f"{name}.weight", linear.weight)
    return found


@torch.no_grad()
def round_weights(
    model: nn.Module, config: QuantConfig, skip: tuple[str, ...] = ("lm_head",)
) -> nn.Module:
    """The weight of every linear becomes its x̂, in place, and stays a float.

    This gives the outputs of `apply` at the speed of floats.

    Raises:
        ValueError: as `apply`.
    """
    for linear in float_linears(model, skip).values():
        codes, scale, zero = encode(linear.weight, config)
        rounded = decode(codes, scale, zero, config)
        linear.weight.copy_(finite(rounded, linear.weight.dtype))
    return model


@torch.no_grad()
def apply(
    model: nn.Module, config: QuantConfig, skip: tuple[str, ...] = ("lm_head",)
) -> nn.Module:
    """Every linear becomes a `QuantLinear`, in place: a few bits per weight.

    Raises:
        ValueError: a weight is no float, or holds NaN or ∞ (named); the model is then
            as it was.
    """
    for name, linear in float_linears(model, skip).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantLinear(linear, config))
    return model


def quantize_inputs(
    model: nn.Module, config: QuantConfig, skip: tuple[str, ...] = ("lm_head",)
) -> list:
    """Every linear gets its input quantised, with scales computed from that input.

    Returns:
        The hooks: `.remove()` each to undo it.

    Raises:
        ValueError: a linear that the model reads and never calls; it is named.
    """

    def quantize_first(linear: nn.Module, args: tuple) -> tuple:
        return (fake_quantize(args[0], config), *args[1:])

    found = linears(model, skip)
    for name in found:
        place = name.removesuffix(".base" * name.count(".base"))
        parent = model.get_submodule(place.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"{name} is in an nn.MultiheadAttention, which reads its weight and"
                " never calls it: its input cannot be quantised"
            )
    hooks = []
    for linear in found.values():
        hooks.append(linear.register_forward_pre_hook(quantize_first))
    return hooks


def nbytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each stored tensor counted once."""
    stored = {}
    for t in (*model.parameters(), *model.buffers()):
        stored[t.data_ptr()] = t.numel() * t.element_size()
    return sum(stored.values())
