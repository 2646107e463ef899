"""Products of the codes of inputs and weights, wherever they lie: exact, in int32."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Int, Int8
from torch import Tensor

from llmlab.models.codes import product


def multiply_codes(
    x: Int8[Tensor, "tokens n"], w: Int8[Tensor, "out n"]
) -> Int[Tensor, "tokens out"]:
    """x wᵀ of two matrices of codes, exact, in int32."""
    if x.is_cuda:
        return multiply_padded(x, w)
    return product(x, w.contiguous().t())


def multiply_padded(x: Tensor, w: Tensor) -> Tensor:
    """cuBLAS wants more than 16 tokens, and widths that 8 divides: zeros fill up."""
    tokens, out = len(x), len(w)
    width = -x.shape[1] % 8
    x = F.pad(x, (0, width, 0, max(0, 17 - tokens)))
    w = F.pad(w, (0, width, 0, -out % 8))
    return product(x, w.contiguous().t())[:tokens, :out]
