"""Products of 8-bit codes, added up in 32 bits, as integer units compute them.

A sum of n products of codes −127 … 127 is at most 127² n: int16 holds two of them,
int32 holds 133,000, and a float32 is exact for 1,040.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Int, Int8
from torch import Tensor


def multiply_codes(
    x: Int8[Tensor, "tokens n"], w: Int8[Tensor, "out n"]
) -> Int[Tensor, "tokens out"]:
    """x wᵀ of two matrices of codes, exact, in int32."""
    if x.is_cuda:
        return multiply_padded(x, w)
    return product(x, w)


def product(x: Tensor, w: Tensor) -> Tensor:
    """x wᵀ by PyTorch's product of codes, or in float64 where that one is wrong."""
    if x.is_cuda or sums_are_exact():
        return torch._int_mm(x.contiguous(), w.contiguous().t())
    return (x.double() @ w.double().t()).to(torch.int32)  # exact below 2⁵³


@cache
def sums_are_exact() -> bool:
    """Whether PyTorch's product of codes is exact on this CPU.

    Where oneDNN may not use VNNI instructions, two products are added up in 16 bits and
    stay at the largest number without a word (torch 2.13, ONEDNN_MAX_CPU_ISA=AVX2).
    """
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    found = torch._int_mm(largest[:4], largest.t())
    return bool((found == 64 * 127**2).all())


def multiply_padded(x: Tensor, w: Tensor) -> Tensor:
    """cuBLAS wants more than 16 tokens, and widths that 8 divides: zeros fill up."""
    tokens, out = len(x), len(w)
    width = -x.shape[1] % 8
    x = F.pad(x, (0, width, 0, max(0, 17 - tokens)))
    w = F.pad(w, (0, width, 0, -out % 8))
    return product(x, w)[:tokens, :out]
