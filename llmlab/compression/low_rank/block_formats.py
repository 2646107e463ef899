"""Blocks of small floats with a shared scale: MXFP8, MXFP4, NVFP4, and plain FP4.

OCP Microscaling Formats (MX) specification 1.0, 2023,
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf

    V  =  X · P        P_i elements of a block of k,  X its scale, a power of two
    X  =  2^(⌊log2 max|V|⌋ − e_max)      then P_i = V_i / X, rounded and saturated

X is stored as E8M0, the exponent alone: code 0 … 254 is 2^(code − 127), 255 is NaN.
NVFP4 (NVIDIA 2025) has blocks of 16 with a scale in E4M3, which is finer but reaches
less far, and a float32 for the whole tensor:

    G  =  448 · 6 / max|W|        s  =  E4M3(G · max|V| / 6)        V  =  P · s / G

    V     a block of values            k      its size
    P     elements, in E2M1 or E4M3    e_max  exponent of the largest element
    X, s  scale of the block           G      divisor for all blocks of a tensor

A block's maximum is in X · [2^e_max, 2^(e_max + 1)), but the largest element, 6, is
less than 8: the rule of the specification clips what is between. `RULES` has two more:
`carry`, that of compressed-tensors, and `ceil`, under which nothing is clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llmlab.compression.low_rank import float_formats
from llmlab.compression.low_rank.float_formats import E2M1, E4M3, FloatFormat

SCALES = {"e8m0": 8, "e4m3": 8, "float16": 16}  # and their bits
BIAS = 127  # of E8M0


def floor_rule(top: Tensor, element: FloatFormat) -> Tensor:
    """The exponent of X by the specification: ⌊log2 max|V|⌋ − e_max."""
    _, exponent = torch.frexp(top)
    return exponent - 1 - element.e_max


def carry_rule(top: Tensor, element: FloatFormat) -> Tensor:
    """As compressed-tensors 0.19 does: max|V| is rounded to one mantissa bit first.

    From 1.75 times a power of two on it carries over into the next. So max|V| / X is
    below 7: what is above 6 is still clipped.
    """
    _, exponent = torch.frexp(top)
    up = top >= torch.ldexp(torch.full_like(top, 1.75), exponent - 1)
    return exponent - 1 + up.int() - element.e_max


def ceil_rule(top: Tensor, element: FloatFormat) -> Tensor:
    """The least X under which the maximum is not clipped."""
    exponent = floor_rule(top, element)
    clipped = torch.ldexp(top, -exponent) > element.top
    return exponent + clipped.int()


RULES: dict[str, Callable] = {
    "floor": floor_rule,
    "carry": carry_rule,
    "ceil": ceil_rule,
}


@dataclass(frozen=True)
class BlockFormat:
    """What the elements are, how many share a scale, and what the scale is."""

    element: FloatFormat = E2M1
    size: int = 32  # k
    scale: str = "e8m0"
    rule: str = "floor"  # read when scale="e8m0"

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"scale={self.scale!r} must be one of {tuple(SCALES)}")
        if self.rule not in RULES:
            raise ValueError(f"rule={self.rule!r} must be one of {tuple(RULES)}")
        if self.size < 2 or self.size % 2:
            raise ValueError(f"size={self.size} must be even, so that nibbles pair up")
        if self.element.bits not in (4, 8):
            raise ValueError(
                f"element={self.element} has {self.element.bits} bits; it must have 4"
                " or 8"
            )

    @property
    def has_global(self) -> bool:
        """Whether a float32 for the whole tensor is stored, too."""
        return self.scale == "e4m3"


MXFP8 = BlockFormat(E4M3)
MXFP4 = BlockFormat(E2M1)
NVFP4 = BlockFormat(E2M1, size=16, scale="e4m3")
FP4 = BlockFormat(E2M1, size=64, scale="float16")


@dataclass
class Blocks:
    """What is stored of a tensor (…, n)."""

    codes: UInt8[Tensor, "... n"]  # of the elements, not packed yet
    scale: Tensor  # (…, n / k): codes of E8M0 or E4M3, or float16
    global_scale: Float[Tensor, "1"] | None = None  # G, a divisor


def encode(x: Float[Tensor, "... n"], kind: BlockFormat) -> Blocks:
    """Round each block to elements times its scale.

    Raises:
        ValueError: x holds NaN or ∞, or blocks do not divide the last dimension.
    """
    blocks = to_blocks(x.detach().float(), kind.size)  # (…, n / k, k)
    bad = int((~blocks.isfinite()).sum())
    if bad:
        raise ValueError(
            f"x holds {bad} values that are NaN or infinite: no scale fits them"
        )
    top = blocks.abs().amax(-1)  # (…, n / k)
    G = None
    if kind.scale == "e8m0":
        exponent = RULES[kind.rule](top, kind.element)
        exponent = torch.where(top > 0, exponent, -BIAS)
        stored = (exponent + BIAS).clamp(min=0).to(torch.uint8)  # 253 at most
    elif kind.scale == "e4m3":
        largest = top.max().clamp(min=torch.finfo(torch.float32).tiny)
        G = (E4M3.top * kind.element.top / largest).reshape(1)
        G = torch.where(G.isfinite(), G, 1.0)
        stored = float_formats.encode(G * (top / kind.element.top), E4M3)
        # A block too small for E4M3 gets the smallest scale there is, not 0.
        stored = stored.clamp(min=1)
    else:
        half = torch.finfo(torch.float16)
        smallest = half.tiny * half.eps
        stored = (top / kind.element.top).clamp(smallest, half.max).half()
    scale = scale_values(stored, kind, G)  # (…, n / k)
    elements = float_formats.encode(blocks / scale[..., None], kind.element)
    return Blocks(elements.reshape(x.shape), stored, G)


def decode(stored: Blocks, kind: BlockFormat) -> Float[Tensor, "... n"]:
    """The values, in float32: the inverse of `encode`, but for the rounding."""
    scale = scale_values(stored.scale, kind, stored.global_scale)
    elements = float_formats.decode(stored.codes, kind.element)
    blocks = to_blocks(elements, kind.size) * scale[..., None]
    largest = torch.finfo(torch.float32).max  # which `carry` and `ceil` may exceed
    return blocks.clamp(-largest, largest).reshape(stored.codes.shape)


def round_to(x: Float[Tensor, "... n"], kind: BlockFormat) -> Float[Tensor, "... n"]:
    """x on the values that the format can store."""
    return decode(encode(x, kind), kind)


def scale_values(stored: Tensor, kind: BlockFormat, G: Tensor | None) -> Tensor:
    """What the elements of each block are multiplied by, in float32."""
    if kind.scale == "e8m0":
        return e8m0_values(stored)
    if kind.scale == "e4m3":
        return float_formats.decode(stored, E4M3) / G
    return stored.float()


def e8m0_values(codes: UInt8[Tensor, "..."]) -> Float[Tensor, "..."]:
    """2^(code − 127), and NaN for 255."""
    exponent = codes.int() - BIAS
    # in two steps: 2^−127 is a subnormal number of float32
    half = torch.div(exponent, 2, rounding_mode="floor")
    one = torch.ones(codes.shape)
    values = torch.ldexp(one, half) * torch.ldexp(one, exponent - half)
    return torch.where(codes == 255, torch.nan, values)


def pack_nibbles(codes: UInt8[Tensor, "... n"]) -> UInt8[Tensor, "... half"]:
    """Two codes of 4 bits per byte, the first in the low half."""
    pairs = codes.unflatten(-1, (-1, 2))  # (…, n / 2, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def unpack_nibbles(packed: UInt8[Tensor, "... half"]) -> UInt8[Tensor, "... n"]:
    """The codes that `pack_nibbles` put in."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def to_blocks(x: Float[Tensor, "... n"], size: int) -> Float[Tensor, "... blocks size"]:
    """x with its last dimension cut into blocks.

    Raises:
        ValueError: they do not divide it.
    """
    if x.shape[-1] % size:
        raise ValueError(f"size={size} must divide the last dimension, {x.shape[-1]}")
    return x.unflatten(-1, (-1, size))


def bits_per_weight(kind: BlockFormat, weights: int | None = None) -> float:
    """Stored bits per weight: its element, and its share of the scales.

    Args:
        weights: of the tensor; NVFP4's float32 is shared by so many.
    """
    bits = kind.element.bits + SCALES[kind.scale] / kind.size
    if kind.has_global and weights:
        bits += 32 / weights
    return bits


def with_rule(kind: BlockFormat, rule: str) -> BlockFormat:
    """The same format with another rule for its scale."""
    return replace(kind, rule=rule)
