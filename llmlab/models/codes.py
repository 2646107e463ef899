"""Products of 8-bit codes, added up in 32 bits, as integer units compute them: exact.

A sum of n products of codes −127 … 127 is at most 127² n: int16 holds two of them,
int32 holds 133,000, and a float32 is exact for 1,040.
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Int8, Int32
from torch import Tensor


def product(a: Int8[Tensor, "m n"], b: Int8[Tensor, "n k"]) -> Int32[Tensor, "m k"]:
    """a b by PyTorch's product of codes, or in float64 where that one is wrong."""
    if a.is_cuda or sums_are_exact():
        return torch._int_mm(row(a.contiguous()), row(b))
    return (a.double() @ b.double()).to(torch.int32)  # exact below 2⁵³


def row(x: Tensor) -> Tensor:
    """A matrix of one row with the stride that belongs to it.

    The stride of one row has no meaning, and after a transpose it is any number; but
    PyTorch's product relies on it (torch 2.13).
    """
    return x[0][None] if len(x) == 1 else x


@cache
def sums_are_exact() -> bool:
    """Whether PyTorch's product of codes is exact on this CPU.

    Where oneDNN may not use VNNI instructions, two products are added up in 16 bits and
    stay at the largest number without a word (torch 2.13, ONEDNN_MAX_CPU_ISA=AVX2).
    """
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    found = torch._int_mm(largest[:4], largest.t())
    return bool((found == 64 * 127**2).all())
