"""The same linears, their weights laid out as the processor multiplies them.

A product of few rows with a large weight reads the weight from memory as it lies, row
by row, and arranges pieces of it anew for the vector units, in every call. oneDNN,
which PyTorch brings, can do that once, before the first token.

Simplified: the plain weight stays in memory, too.
"""

from __future__ import annotations

from copy import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

ROWS = 16  # tokens for which the layout is chosen


class PackedLinear(nn.Module):
    """y = W x + b, with a second copy of W in oneDNN's layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        weight = linear.weight.detach()
        # not a buffer: it is no tensor that can be saved
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if x.requires_grad:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(
            x, self.packed, self.bias, "none", [], ""
        )


def available() -> bool:
    """Whether PyTorch has oneDNN here."""
    return torch.backends.mkldnn.is_available()


@torch.no_grad()
def packed(model: nn.Module) -> nn.Module:
    """A model that computes with packed weights; `model` itself is left as it is.

    Each `nn.Linear` in fp32 becomes a `PackedLinear` that shares its weight; all else
    is the model's own. Without oneDNN it is the model itself.
    """
    if not available():
        return model
    return _with_packed(model)


def _with_packed(module: nn.Module) -> nn.Module:
    """A copy of the tree of modules, down to the linears."""
    if type(module) is nn.Linear and module.weight.dtype == torch.float32:
        return PackedLinear(module)
    twin = copy(module)
    twin._modules = {
        name: None if child is None else _with_packed(child)
        for name, child in module._modules.items()
    }
    twin._forward_hooks = module._forward_hooks.copy()
    return twin
