"""The same model for a processor: weights laid out as it multiplies, fewer calls.

A product of few rows with a large weight takes as long as the weight takes to come from
memory. PyTorch reads it as it lies, row by row, and arranges pieces of it anew for the
vector units, in every call. Here that is done once, before the first token; `packed.c`
says how the numbers then lie. Layers are fused (`fused`), with their passes in C: four
products and five other calls, instead of seven and some thirty.

Linears that are not PyTorch's own, as quantised ones, stay, each a product by itself.

Simplified: float32 on a CPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from copy import copy
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llmlab.inference.engine.fused import FusedBlock, Passes, heads
from llmlab.inference.fused_transformers import kernels
from llmlab.models.c_library import LONG, POINTER, NoCompiler, build
from llmlab.models.llama import Block, Llama, RMSNorm

WIDTH = 32  # outputs in a panel, as in packed.c
SOURCE = Path(__file__).parent / "packed.c"
ARGUMENTS = {
    "product": [POINTER] * 3 + [LONG] * 3,
    "rotate": [POINTER] * 3 + [LONG] * 4,
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where there is no compiler."""
    try:
        return build(SOURCE, ARGUMENTS)
    except NoCompiler:
        return None


def panels(weight: Float[Tensor, "out in"]) -> Float[Tensor, "panels in width"]:
    """Runs of `WIDTH` outputs, filled up with 0, the inputs before the outputs."""
    missing = -len(weight) % WIDTH
    full = F.pad(weight, (0, 0, 0, missing))
    return full.unflatten(0, (-1, WIDTH)).transpose(1, 2).contiguous()


class PackedLinear(nn.Module):
    """y = W x + b, with W in panels. For inference only."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.register_buffer("panels", panels(weight.detach()), persistent=False)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """W as it was: a copy."""
        return self.panels.transpose(1, 2).flatten(0, 1)[: self.out_features]

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        x = x.contiguous()
        width = self.in_features
        y = x.new_empty(*x.shape[:-1], self.out_features)
        pointers = [each.data_ptr() for each in (x, self.panels, y)]
        rows = x.numel() // width
        library().product(*pointers, rows, width, self.out_features)
        return y if self.bias is None else y.add_(self.bias)


class PackedNorm(nn.Module):
    """`RMSNorm` in one pass."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.eps

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        flat = x.reshape(-1, x.shape[-1])
        return kernels.add_rms_norm(None, flat, self.weight, self.eps)[0].view(x.shape)


def turn(
    qkv: Float[Tensor, "B T all"],
    rope: tuple[Tensor, Tensor],
    sizes: Sequence[int],
    head_dim: int,
) -> list[Tensor]:
    """`fused.turn`, in place."""
    B, T, width = qkv.shape
    cos, sin = (
        each.expand(B, -1, -1, -1).contiguous() for each in rope
    )  # (B, 1, T, D)
    pointers = [each.data_ptr() for each in (qkv, cos, sin)]
    turned = (sizes[0] + sizes[1]) // head_dim
    library().rotate(*pointers, B * T, turned, head_dim, width)
    return heads(qkv, sizes, head_dim)


IN_C = Passes(turn, kernels.add_rms_norm, kernels.swiglu)


@torch.no_grad()
def packed(model: Llama) -> Llama:
    """A model that computes with packed weights; `model` itself is left as it is, and
    all but its embedding and its norms may go.

    Without a C compiler, or where its numbers are not float32, it is the model itself.
    Adapters find their linears as in the plain model (`fused.find`).
    """
    if library() is None or model.model.norm.weight.dtype != torch.float32:
        return model
    return _packed(model)


def _packed(module: nn.Module) -> nn.Module:
    """A copy of the tree of modules, down to what is packed."""
    if type(module) is Block:
        module = FusedBlock(module)
    if type(module) is nn.Linear:
        return PackedLinear(module.weight, module.bias)
    if type(module) is RMSNorm:
        return PackedNorm(module)
    twin = copy(module)
    if hasattr(twin, "passes"):
        twin.passes = IN_C
    twin._modules = {
        name: None if child is None else _packed(child)
        for name, child in module._modules.items()
    }
    return twin
