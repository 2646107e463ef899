"""The products of this room as plugins of an engine: (pack, product, weight).

    int4   affine codes of 4 bits, a scale and a zero point for each group of 32
    int8   codes of 8 bits, a scale for each row

Weights are rounded to nearest where they are packed. One that lies on the grid of a
method (GPTQ, AWQ) already keeps its values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llmlab.compression.kernels.compiling import library
from llmlab.compression.kernels.linears import FEW, Int4Linear, Int8Table
from llmlab.compression.quantization_basics import QuantConfig, QuantLinear

GROUP = 32
GRID = QuantConfig(4, symmetric=False, group_size=GROUP, scale_dtype=torch.float32)
Tensors = dict[str, Tensor]


def pack_int4(weight: Float[Tensor, "out in"]) -> Tensors:
    """Codes (out, in / 2), scale and zero (out, in / 32)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
    packed = Int4Linear(QuantLinear(linear, GRID))
    rows = len(weight)
    return {
        "packed": packed.packed.reshape(rows, -1),
        "scale": packed.scale.reshape(rows, -1),
        "zero": packed.zero.reshape(rows, -1),
    }


def sizes(tensors: Tensors) -> tuple[int, int, int, int]:
    """Rows, columns, group, and whether a scale has 32 bits."""
    scale = tensors["scale"]
    rows, columns = len(tensors["packed"]), 2 * tensors["packed"].shape[1]
    return rows, columns, columns // scale.shape[1], int(scale.dtype == torch.float32)


def weight_int4(tensors: Tensors) -> Float[Tensor, "out in"]:
    """The decoded weight."""
    packed, scale, zero = (tensors[name] for name in ("packed", "scale", "zero"))
    out = torch.empty(len(packed), 2 * packed.shape[1])
    pointers = [t.data_ptr() for t in (packed, scale, zero, out)]
    library().decode_4bit(*pointers, *sizes(tensors))
    return out


def product_int4(x: Float[Tensor, "... in"], tensors: Tensors) -> Tensor:
    """x Wᵀ: few tokens one by one in C, many with the decoded weight."""
    packed, scale, zero = (tensors[name] for name in ("packed", "scale", "zero"))
    rows, columns = len(packed), 2 * packed.shape[1]
    flat = x.reshape(-1, columns).contiguous()  # (tokens, in)
    if len(flat) > FEW or x.dtype != torch.float32:
        return F.linear(x, weight_int4(tensors).to(x.dtype))
    y = torch.empty(len(flat), rows)
    pointers = [t.data_ptr() for t in (packed, scale, zero)]
    for t in range(len(flat)):
        vectors = (flat[t].data_ptr(), y[t].data_ptr())
        library().matvec_4bit(*pointers, *vectors, *sizes(tensors))
    return y.reshape(*x.shape[:-1], rows)


def pack_int8(weight: Float[Tensor, "out in"]) -> Tensors:
    """Codes (out, in), scale (out,)."""
    table = Int8Table(weight)
    return {"codes": table.codes, "scale": table.scale}


def weight_int8(tensors: Tensors) -> Float[Tensor, "out in"]:
    """The decoded weight."""
    return tensors["codes"] * tensors["scale"][:, None]


def product_int8(x: Float[Tensor, "... in"], tensors: Tensors) -> Tensor:
    """x Wᵀ, as `product_int4`."""
    codes, scale = tensors["codes"], tensors["scale"]
    rows, columns = codes.shape
    flat = x.reshape(-1, columns).contiguous()  # (tokens, in)
    if len(flat) > FEW or x.dtype != torch.float32:
        return F.linear(x, weight_int8(tensors).to(x.dtype))
    y = torch.empty(len(flat), rows)
    for t in range(len(flat)):
        pointers = [v.data_ptr() for v in (codes, scale, flat[t], y[t])]
        library().matvec_8bit(*pointers, rows, columns)
    return y.reshape(*x.shape[:-1], rows)


class Product(NamedTuple):
    """A plugin as engines want it."""

    pack: object
    product: object
    weight: object


PLUGINS = {
    "int8": Product(pack_int8, product_int8, weight_int8),
    "int4": Product(pack_int4, product_int4, weight_int4),
}
