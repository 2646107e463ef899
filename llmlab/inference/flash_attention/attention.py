"""FlashAttention for autograd, and in the place of `Llama`'s attention.

What is kept between the passes: q, k, v, the output and one number per query. Standard
attention keeps P, a number per query and key.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from llmlab.inference.flash_attention.backward import backward
from llmlab.inference.flash_attention.forward import forward
from llmlab.models.attention import Mask

# What scripts/flash_attention_sweep.py measured, a run a line.
FILE = Path(__file__).parent.parent / "data" / "flash_attention.csv"


class FlashAttentionFunction(Function):
    """(q, k, v) → O, and back."""

    @staticmethod
    def forward(ctx, q, k, v, mask, causal, rows, cols):
        out, lse = forward(q, k, v, mask, causal, rows, cols)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.settings = (causal, rows, cols)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, mask, out, lse = ctx.saved_tensors
        grads = backward(q, k, v, out, lse, dout, mask, *ctx.settings)
        return (*grads, None, None, None, None)


def flash_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    mask: Mask | None = None,
    *,
    causal: bool = True,
    rows: int = 64,
    cols: int = 64,
) -> Float[Tensor, "B H T D"]:
    """softmax(q kᵀ / √D) v, tile by tile, forward and backward.

    Args:
        mask: where a query may look, or what is added to its scores; None means causal
            with the queries at the end of the keys.
        causal: False, without a mask: every query sees every key.
    Raises:
        ValueError: shapes that do not fit, tiles of no size, or a mask that wants a
            gradient.
    """
    if mask is not None and mask.requires_grad:
        raise ValueError("mask requires a gradient, which the tile loop does not have")
    return FlashAttentionFunction.apply(q, k, v, mask, causal, rows, cols)


def standard_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    mask: Mask | None = None,
) -> Float[Tensor, "B H T D"]:
    """The same as in a textbook: S and P are whole matrices. Autograd keeps P."""
    T, S = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    else:
        scores = scores + mask
    return scores.softmax(-1) @ v


@dataclass(frozen=True)
class FlashAttention:
    """`attention=` for our Llama, with tiles of rows queries × cols keys."""

    rows: int = 64
    cols: int = 64

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise ValueError(
                f"rows={self.rows} and cols={self.cols} must be at least 1"
            )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        return flash_attention(q, k, v, mask, rows=self.rows, cols=self.cols)
