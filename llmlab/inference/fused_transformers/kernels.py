"""The fused steps as kernels: in C where there is a compiler, else by PyTorch.

The C of `kernels.c` takes float32 in memory order on the CPU, in one launch each, and
tells a counter that is on. What is of another kind, or needs a gradient, goes to the
function of the same name in `pieces`, which computes the same in several launches.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor

from llmlab.inference.fused_transformers import pieces
from llmlab.inference.fused_transformers.counting import report
from llmlab.models.c_library import FLOAT, LONG, POINTER, NoCompiler, build

SOURCE = Path(__file__).parent / "kernels.c"
ARGUMENTS = {
    "add_rms_norm": [POINTER] * 4 + [LONG] * 2 + [FLOAT],
    "rope_and_store": [POINTER] * 6 + [LONG] * 7,
    "swiglu": [POINTER] * 2 + [LONG] * 2,
    "linear_8bit": [POINTER] * 4 + [LONG] * 3,
}
FEW = 8  # tokens up to which codes are multiplied where they lie


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where there is no compiler."""
    try:
        return build(SOURCE, ARGUMENTS)
    except NoCompiler:
        return None


def describe() -> str:
    """Which kernels are used here, in a word."""
    return "PyTorch (no C compiler here)" if library() is None else "C"


def fits_c(*tensors: Tensor) -> bool:
    """Whether the C functions can take these tensors."""
    if library() is None:
        return False
    grad = torch.is_grad_enabled()
    for x in tensors:
        if x.dtype != torch.float32 or not x.is_contiguous() or not x.is_cpu:
            return False
        if grad and x.requires_grad:
            return False
    return True


def add_rms_norm(
    x: Float[Tensor, "N d"] | None,
    residual: Float[Tensor, "N d"],
    weight: Float[Tensor, "d"],
    eps: float,
) -> tuple[Float[Tensor, "N d"], Float[Tensor, "N d"]]:
    """`pieces.add_rms_norm`; the C one adds to `residual` in place.

    Args:
        x: None where nothing is to be added, as before the first layer.
    """
    known = (residual, weight) if x is None else (x, residual, weight)
    if not fits_c(*known):
        add = torch.zeros_like(residual) if x is None else x
        return pieces.add_rms_norm(add, residual, weight, eps)
    y = torch.empty_like(residual)
    library().add_rms_norm(
        None if x is None else x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        *residual.shape,
        eps,
    )
    report("add_rms_norm", known, (y,) if x is None else (y, residual))
    return y, residual


def rope_and_store(
    qkv: Float[Tensor, "N all"],
    cos: Float[Tensor, "N half"],
    sin: Float[Tensor, "N half"],
    keys: Float[Tensor, "B K C D"],
    values: Float[Tensor, "B K C D"],
    start: int,
) -> Float[Tensor, "B H T D"]:
    """`pieces.rope_and_store`.

    Raises:
        ValueError: the cache has no room for the new tokens.
    """
    B, K, C, D = keys.shape
    T = qkv.shape[0] // B
    H = qkv.shape[1] // D - 2 * K
    if start < 0 or start + T > C:
        raise ValueError(
            f"start={start} and {T} new tokens need {start + T} places, and the cache"
            f" has {C}"
        )
    if not fits_c(qkv, cos, sin, keys, values):
        return pieces.rope_and_store(qkv, cos, sin, keys, values, start)
    q = torch.empty(B, T, H, D).transpose(1, 2)
    library().rope_and_store(
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        *(B, T, H, K, D, C, start),
    )
    new = (keys[:, :, start : start + T], values[:, :, start : start + T])
    report("rope_and_store", (qkv, cos, sin), (q, *new), changed=new)
    return q


def swiglu(gate_up: Float[Tensor, "N two_f"]) -> Float[Tensor, "N f"]:
    """`pieces.swiglu`."""
    if not fits_c(gate_up):
        return pieces.swiglu(gate_up)
    N, two_f = gate_up.shape
    y = torch.empty(N, two_f // 2)
    library().swiglu(gate_up.data_ptr(), y.data_ptr(), N, two_f // 2)
    report("swiglu", (gate_up,), (y,))
    return y


# Weights of 8 bits --------------------------------------------------------------------


def to_8bit(
    weight: Float[Tensor, "rows columns"],
) -> tuple[Int8[Tensor, "rows columns"], Float[Tensor, "rows"]]:
    """Codes −127 … 127 and a scale for each row: weight ≈ codes · scale."""
    weight = weight.detach().float()
    absmax = weight.abs().amax(1)
    scale = torch.where(absmax > 0, absmax / 127, 1.0)
    return torch.round(weight / scale[:, None]).to(torch.int8), scale


def linear_8bit(
    x: Float[Tensor, "N columns"],
    codes: Int8[Tensor, "rows columns"],
    scale: Float[Tensor, "rows"],
) -> Float[Tensor, "N rows"]:
    """x (codes · scale)ᵀ: for a few tokens the codes are multiplied where they lie.

    For many the weight is decoded, and PyTorch multiplies.
    """
    N, columns = x.shape
    if N > FEW or not fits_c(x, scale):
        return F.linear(x, (codes * scale[:, None]).to(x.dtype))
    y = torch.empty(N, len(codes))
    library().linear_8bit(
        codes.data_ptr(),
        scale.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        *(N, len(codes), columns),
    )
    report("linear_8bit", (x, codes, scale), (y,))
    return y
