"""Floats of 8 and 4 bits, from their numbers of exponent and mantissa bits.

Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433 (E4M3 and E5M2), and the OCP
Microscaling specification 1.0 (E2M1). With the exponent field E and the mantissa M:

    x  =  ± 2^(E − bias) · (1 + M / 2^m)        E > 0, normal
    x  =  ± 2^(1 − bias) · M / 2^m              E = 0, subnormal

    e      exponent bits          bias   2^(e−1) − 1
    m      mantissa bits          e_min  1 − bias, the exponent of the smallest normal
    code   sign, E, M from the highest bit down; without the sign, a larger code is a
           larger value, and the codes of neighbours differ by 1

So rounding to nearest, ties to even, is rounding of M to even: the code of a tie ends
in a 0 bit. What is beyond the largest value becomes the largest (it saturates), where
PyTorch's cast to E5M2 gives ∞.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

SPECIALS = ("none", "nan", "ieee")


@dataclass(frozen=True)
class FloatFormat:
    """A float of 1 + exponent + mantissa bits."""

    exponent: int  # e
    mantissa: int  # m
    # Codes that are no numbers. none: all are numbers (E2M1). nan: the highest is NaN
    # (E4M3). ieee: those of the highest exponent are ∞ and NaN (E5M2).
    specials: str = "none"

    def __post_init__(self) -> None:
        if self.specials not in SPECIALS:
            raise ValueError(f"specials={self.specials!r} must be one of {SPECIALS}")
        if self.exponent < 2 or self.mantissa < 1 or self.bits > 8:
            raise ValueError(
                f"exponent={self.exponent} must be at least 2 and"
                f" mantissa={self.mantissa} at least 1, with at most 8 bits in all"
            )

    @property
    def bits(self) -> int:
        """Of a code, the sign included."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """What is taken off the exponent field."""
        return 2 ** (self.exponent - 1) - 1

    @property
    def e_min(self) -> int:
        """The exponent of the smallest normal number, and of all subnormal ones."""
        return 1 - self.bias

    @property
    def top_code(self) -> int:
        """The code of the largest value."""
        count = 2 ** (self.exponent + self.mantissa)
        beyond = {"none": 0, "nan": 1, "ieee": 2**self.mantissa}
        return count - 1 - beyond[self.specials]

    @property
    def e_max(self) -> int:
        """The exponent of the largest value."""
        return (self.top_code >> self.mantissa) - self.bias

    @property
    def top(self) -> float:
        """The largest value."""
        M = self.top_code % 2**self.mantissa
        return 2.0**self.e_max * (1 + M / 2**self.mantissa)


E4M3 = FloatFormat(4, 3, "nan")
E5M2 = FloatFormat(5, 2, "ieee")
E2M1 = FloatFormat(2, 1)


def levels(kind: FloatFormat) -> Float[Tensor, "codes"]:
    """The value of every code, 0 first, the negative ones in the upper half."""
    codes = torch.arange(2 ** (kind.bits - 1))
    E = codes >> kind.mantissa
    fraction = (codes % 2**kind.mantissa) / 2**kind.mantissa
    normal = torch.ldexp(1 + fraction, E - kind.bias)
    subnormal = torch.ldexp(fraction, torch.tensor(kind.e_min))
    values = torch.where(E > 0, normal, subnormal)
    beyond = codes > kind.top_code
    values[beyond] = torch.nan
    if kind.specials == "ieee":
        values[kind.top_code + 1] = torch.inf
    return torch.cat([values, -values])


def round_to(x: Float[Tensor, "..."], kind: FloatFormat) -> Float[Tensor, "..."]:
    """The nearest value of the format, ties to even, in the dtype of x. NaN stays NaN.

    Within one power of two the values lie 2^(exponent − m) apart, and below the
    smallest normal as far apart as just above it.
    """
    _, exponent = torch.frexp(x)  # |x| is in [2^(exponent−1), 2^exponent)
    exponent = (exponent - 1).clamp(min=kind.e_min)
    step = torch.ldexp(torch.ones_like(x), exponent - kind.mantissa)
    step = torch.where(x.isfinite(), step, 1.0)
    return (torch.round(x / step) * step).clamp(-kind.top, kind.top)


def encode(x: Float[Tensor, "..."], kind: FloatFormat) -> UInt8[Tensor, "..."]:
    """The code of the nearest value of each x.

    Raises:
        ValueError: x holds NaN.
    """
    if x.isnan().any():
        raise ValueError("x holds NaN, for which a weight has no code")
    rounded = round_to(x.float(), kind)
    size = rounded.abs()
    _, exponent = torch.frexp(size)  # of 0 it is 0, which is no exponent
    exponent = torch.where(size > 0, exponent - 1, kind.e_min).clamp(min=kind.e_min)
    # 2^m … 2^(m+1) − 1 for a normal number, less for a subnormal one
    M = torch.ldexp(size, kind.mantissa - exponent).int()
    code = ((exponent - kind.e_min) << kind.mantissa) + M
    sign = rounded.signbit().int() << (kind.bits - 1)
    return (sign | code).to(torch.uint8)


def decode(codes: UInt8[Tensor, "..."], kind: FloatFormat) -> Float[Tensor, "..."]:
    """The values of the codes, in float32."""
    return levels(kind)[codes.int()]
