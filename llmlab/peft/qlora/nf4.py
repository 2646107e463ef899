"""Four-bit codebooks: NF4 and FP4 with one scale per block, and double quantisation.

Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3. A block of B = 64
weights shares c = max |w|:

    q_i = argmin_q |w_i / c − level[q]|        ŵ_i = c · level[q_i]

Double quantisation stores the c of all blocks in 8 bits as well: their mean is
subtracted first, since a maximum is never negative, and blocks of 256 of what is left
share a scale of their own, c₂:

    bits per weight:  4 + 32/64 = 4.5    →    4 + 8/64 + 32/(64 · 256) = 4.127

    w      weights, in one row, whatever their shape
    n      their number
    c      scales of the weights (absmax)
    level  the 16 values of a codebook, the largest 1

Codes and scales are bit for bit those of bitsandbytes' `quantize_4bit` on a CPU, which
is why a last, shorter block is divided where full ones are multiplied by 1/c, and why
`encode_8bit` looks up a table of 65,536 entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

NF4 = (  # as published (appendix E): `normal_float` derives them
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# sign, 2 exponent bits, 1 mantissa bit, in the order of bitsandbytes' bit patterns
_FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3)
# the same format with a usual subnormal: the smallest step is 1, not 1/16
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)
CODEBOOKS = {
    "nf4": NF4,
    "fp4": tuple(sign * v / 12 for sign in (1, -1) for v in _FP4),
    "e2m1": tuple(sign * v / 12 for sign in (1, -1) for v in _E2M1),
    # evenly spaced, as many below 0 as above
    "int4": tuple(v / 7 for v in range(-7, 8)),
}
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SCALES_BLOCK = 256  # scales that share a second scale
GRID = 65536


@dataclass(frozen=True)
class Quantized:
    """A tensor in 4 bits: all that must be kept of it."""

    packed: UInt8[Tensor, "bytes 1"]  # two codes a byte, the first in the high half
    scales: Tensor  # (blocks,): c in fp32, or its 8-bit codes
    # (⌈blocks / 256⌉,): c₂ in fp32; None without double quantisation
    scales2: Tensor | None
    offset: Tensor | None  # (): the mean of c
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    block: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales.

        The codebooks, 1 KiB for a whole model, are not counted.
        """
        parts = (self.packed, self.scales, self.scales2, self.offset)
        return sum(part.nbytes for part in parts if part is not None)


def normal_float(bits: int = 4, offset: float = 0.9677083) -> Float[Tensor, "levels"]:
    """NFk: quantiles of N(0, 1), scaled to [−1, 1].

    There are 2^(k−1) − 1 negative ones, an exact 0, and 2^(k−1) positive ones.
    Each side steps evenly in probability from `offset` to ½. The offset lies midway
    between 1 − 1/32 and 1 − 1/30.
    """
    half = 2 ** (bits - 1)

    def side(n: int) -> Float[Tensor, "n"]:
        probabilities = torch.linspace(offset, 0.5, n + 1)[:-1].double()
        return torch.special.ndtri(probabilities).float()

    values = torch.cat([-side(half - 1), torch.zeros(1), side(half).flip(0)])
    return values / values.max()


def levels_of(kind: str) -> Float[Tensor, "levels"]:
    """A codebook, in the order of its codes.

    Raises:
        ValueError: there is none of that name.
    """
    if kind not in CODEBOOKS:
        raise ValueError(f"kind={kind!r} must be one of {tuple(CODEBOOKS)}")
    return torch.tensor(CODEBOOKS[kind])


def nearest(x: Float[Tensor, "*any"], levels: Float[Tensor, "levels"]) -> Tensor:
    """The code of the nearest level for each x; halfway, the smaller level."""
    order = levels.argsort(stable=True)
    ranked = levels[order]
    midpoints = (ranked[:-1] + ranked[1:]) / 2
    return order.int()[torch.bucketize(x, midpoints, out_int32=True)]


def absmax_blocks(
    flat: Float[Tensor, "n"], block: int
) -> tuple[Float[Tensor, "blocks"], Float[Tensor, "n"]]:
    """(c of each block, w / c). The last block may be short."""
    full = len(flat) // block * block
    blocks = flat[:full].view(-1, block)  # (full blocks, block)
    rest = flat[full:]
    c = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / c.clamp(min=1e-38))[:, None]).clamp(-1, 1).flatten()
    if len(rest):  # divided, as bitsandbytes does it: the bits differ from · 1/c
        last = rest.abs().amax().clamp(min=1e-38)
        c = torch.cat([c, last[None]])
        scaled = torch.cat([scaled, (rest / last).clamp(-1, 1)])
    return c, scaled


def pack(codes: Tensor) -> UInt8[Tensor, "bytes 1"]:
    """Codes 0 … 15, an even number of them, two a byte."""
    codes = codes.to(torch.uint8)
    return ((codes[::2] << 4) | codes[1::2])[:, None]


def check_finite(name: str, x: Tensor) -> None:
    """Raises: ValueError: the tensor called `name` holds NaN or ∞."""
    bad = int((~x.detach().isfinite()).sum())
    if bad:
        raise ValueError(
            f"{name} holds {bad} values that are NaN or infinite: no scale fits them"
        )


def quantize(
    w: Float[Tensor, "..."], kind: str = "nf4", block: int = 64, double: bool = True
) -> Quantized:
    """`w` in 4 bits, row after row; a block may run over the end of a row.

    Raises:
        ValueError: an unknown codebook or block size, or `w` is empty, not
            floating-point, or holds what no scale fits: NaN, ∞, or so much that the
            mean of the scales is ∞.
    """
    levels = levels_of(kind).to(w.device)
    if block not in BLOCKS:
        raise ValueError(f"block={block!r} must be one of {BLOCKS}")
    if not w.is_floating_point() or w.numel() == 0:
        raise ValueError(
            f"w must hold floating-point values, not {w.numel()} of {w.dtype}"
        )
    flat = w.detach().reshape(-1).float()
    check_finite("w", flat)
    c, scaled = absmax_blocks(flat, block)
    even = F.pad(scaled, (0, len(scaled) % 2))  # two codes fill a byte
    packed = pack(nearest(even, levels))
    scales, scales2, offset = quantize_scales(c) if double else (c, None, None)
    if double:
        check_finite("the second scale of w", scales2 + offset)
    return Quantized(
        packed, scales, scales2, offset, tuple(w.shape), w.dtype, kind, block
    )


def unpacked_levels(
    packed: UInt8[Tensor, "bytes 1"], levels: Float[Tensor, "levels"]
) -> Float[Tensor, "2*bytes"]:
    """The level of each code: a byte looks up both of its levels at once."""
    levels = F.pad(levels, (0, 16 - len(levels)))
    # row `byte`: the levels of its high half and of its low half
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
    # two fp32 numbers move as one of 64 bits, so that one look-up brings both
    table = pairs.view(torch.float64).flatten()  # (256, 2) → (256)
    return table.index_select(0, packed.flatten().int()).view(torch.float32)


def dequantize(q: Quantized, dtype: torch.dtype | None = None) -> Float[Tensor, "..."]:
    """ŵ = c · level, in fp32, then rounded to `dtype`.

    By default that is the dtype of what was quantised.
    """
    n = math.prod(q.shape)
    levels = levels_of(q.kind).to(q.packed.device)
    values = unpacked_levels(q.packed, levels)
    c = scales_of(q)
    full = n // q.block * q.block  # weights in full blocks
    values[:full].view(-1, q.block).mul_(c[: full // q.block, None])
    if full < n:
        values[full:].mul_(c[-1])
    dtype = dtype or q.dtype
    if dtype == torch.float16:  # rounding of the scales may have passed its largest
        largest = torch.finfo(dtype).max
        values.clamp_(-largest, largest)
    return values[:n].view(q.shape).to(dtype)


# Double quantisation ------------------------------------------------------------------


def dynamic_map() -> Float[Tensor, "256"]:
    """The 8-bit numbers for scales: seven decades, each with twice the levels below it.

    A "dynamic" format (Dettmers 2016, https://arxiv.org/abs/1511.04561; 2022,
    https://arxiv.org/abs/2110.02861): a sign, a run of zeros for the decade, and evenly
    spaced fractions with the bits that are left; 0 and 1 besides.
    """
    return torch.tensor(_dynamic_values())


@cache
def _dynamic_values() -> tuple[float, ...]:
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, device="cpu")
        fractions = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += fractions + [-f for f in fractions]
    return tuple(sorted(values))


def encode_8bit(
    x: Float[Tensor, "n"], grid: int | None = GRID
) -> tuple[UInt8[Tensor, "n"], Float[Tensor, "blocks"]]:
    """Codes into `dynamic_map` and the scale of each block of 256.

    bitsandbytes' CPU kernel first rounds x / c₂ to one of `grid` evenly spaced values
    and looks the code up; only values within 1/65,535 of a midpoint, or of 0, are told
    apart differently by its GPU kernel (`grid=None`).
    """
    blocks = F.pad(x, (0, -len(x) % SCALES_BLOCK)).view(-1, SCALES_BLOCK)
    c2 = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / c2)[:, None]).clamp(-1, 1)
    if grid is not None:
        # in double, so that it is rounded once, as a fused operation is
        place = (((scaled + 1) * 0.5).double() * (grid - 1) + 0.5).float().floor()
        scaled = -1 + 2 * place / (grid - 1)
    # a block of zeros gets code 0
    codes = torch.where(c2[:, None] > 0, nearest(scaled, dynamic_map().to(x.device)), 0)
    return codes.flatten()[: len(x)].to(torch.uint8), c2


def quantize_scales(c: Float[Tensor, "blocks"]) -> tuple[Tensor, Tensor, Tensor]:
    """(8-bit codes, c₂, mean) of the scales c.

    As in bitsandbytes, a c that is read back can be below 0, and then the weights of
    its block change their sign: beside one c of 10, each of 63 of 0.003 is −0.0084.
    """
    offset = c.mean()
    codes, c2 = encode_8bit(c - offset)
    return codes, c2, offset


def scales_of(q: Quantized) -> Float[Tensor, "blocks"]:
    """The scales c that `dequantize` multiplies with."""
    if q.scales2 is None:
        return q.scales
    levels = dynamic_map().to(q.scales.device)[q.scales.int()]
    return levels * q.scales2.repeat_interleave(SCALES_BLOCK)[: len(levels)] + q.offset


def stored_bytes(n: int, block: int = 64, double: bool = True) -> dict[str, int]:
    """Bytes of a `Quantized` of n weights, exactly.

    The last block, and the last byte, may be partly empty.
    """
    blocks = math.ceil(n / block)
    scales = 4 * blocks  # c in fp32
    if double:  # c in 8 bits, c₂ and the mean in fp32
        scales = blocks + 4 * math.ceil(blocks / SCALES_BLOCK) + 4
    return {"codes": math.ceil(n / 2), "scales": scales}


def bits_per_weight(block: int = 64, double: bool = True) -> float:
    """4 bits, and a weight's share of its block's scale, as the paper counts."""
    if double:
        return 4 + (8 / block + 32 / (block * SCALES_BLOCK))
    return 4 + 32 / block
