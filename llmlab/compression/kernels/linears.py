"""Linears that multiply packed codes where they lie, and a model made of them.

    codes of 4 bits   a scale and a zero point for each group of a row
    codes of 8 bits   a scale for each row: the embedding, and the head tied to it

A few tokens go through `matvec_…` one by one. For many, as in a prompt, the weight is
decoded once and PyTorch multiplies.
"""

from __future__ import annotations

from copy import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from llmlab.compression import recipes
from llmlab.compression.kernels.compiling import library
from llmlab.compression.quantization_basics import QuantLinear

FEW = 4  # tokens that are multiplied one by one


def pack_halves(codes: Int[Tensor, "blocks size"]) -> UInt8[Tensor, "blocks bytes"]:
    """Codes 0 … 15 of a group: j in the low half of byte j, j + size/2 in the high."""
    low, high = codes.to(torch.uint8).chunk(2, dim=1)  # (blocks, size / 2) each
    return low | high << 4


class Int4Linear(nn.Module):
    """y = W x with 4-bit codes, unpacked in registers."""

    is_compressed = True

    def __init__(self, linear: QuantLinear) -> None:
        super().__init__()
        config = linear.config
        rows, columns = linear.shape
        size = config.group_size if config.per == "group" else columns
        if config.bits != 4 or config.per == "tensor" or size % 2:
            raise ValueError(
                f"config={config} must have 4 bits and groups of an even size"
            )
        # the kernel's codes are 0 … 15, and 8 is the zero point of symmetric ones
        middle = 8 if config.symmetric else 0
        codes = (linear.codes() + middle).reshape(-1, size)  # (blocks, size)
        zero = None if config.symmetric else linear.zeros().flatten().to(torch.uint8)
        # float16 holds no bfloat16 of a large or tiny scale: those become float32
        narrow = linear.scale.dtype == torch.float16
        scale = linear.scale if narrow else linear.scale.float()
        self.shape = (rows, columns, size)
        self.register_buffer("packed", pack_halves(codes))
        self.register_buffer("scale", scale.flatten().contiguous())
        self.register_buffer("zero", zero)
        self.bias = linear.bias
        self.kernel = library()

    def stored(self) -> tuple[int, int, int | None]:
        """Where codes, scales and zero points lie."""
        zero = None if self.zero is None else self.zero.data_ptr()
        return self.packed.data_ptr(), self.scale.data_ptr(), zero

    def sizes(self) -> tuple[int, int, int, int]:
        """Rows, columns, group, and whether a scale has 32 bits."""
        return *self.shape, int(self.scale.dtype == torch.float32)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The decoded weight."""
        rows, columns, _ = self.shape
        out = torch.empty(rows, columns)
        self.kernel.decode_4bit(*self.stored(), out.data_ptr(), *self.sizes())
        return out

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        rows, columns, _ = self.shape
        flat = x.reshape(-1, columns)  # (tokens, in)
        if len(flat) > FEW or x.dtype != torch.float32 or x.requires_grad:
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        flat = flat.contiguous()
        y = torch.empty(len(flat), rows)
        stored, sizes = self.stored(), self.sizes()
        for t in range(len(flat)):
            vectors = flat[t].data_ptr(), y[t].data_ptr()
            self.kernel.matvec_4bit(*stored, *vectors, *sizes)
        if self.bias is not None:
            y += self.bias
        return y.reshape(*x.shape[:-1], rows)


class Int8Table(nn.Module):
    """Embedding and head in one: 8-bit codes, a scale for each row."""

    def __init__(self, weight: Float[Tensor, "vocab dim"]) -> None:
        super().__init__()
        absmax = weight.detach().float().abs().amax(1)
        scale = torch.where(absmax > 0, absmax / 127, 1.0)
        codes = torch.round(weight.detach().float() / scale[:, None])
        self.register_buffer("codes", codes.to(torch.int8))
        self.register_buffer("scale", scale)
        self.kernel = library()

    @property
    def weight(self) -> Float[Tensor, "vocab dim"]:
        """The decoded rows."""
        return self.codes * self.scale[:, None]

    def embed(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... dim"]:
        """The rows of these tokens."""
        return self.codes[ids] * self.scale[ids][..., None]

    def logits(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... vocab"]:
        """x times each row."""
        rows, columns = self.codes.shape
        flat = x.reshape(-1, columns)  # (tokens, dim)
        if len(flat) > FEW or x.dtype != torch.float32 or x.requires_grad:
            return F.linear(x, self.weight.to(x.dtype))
        flat = flat.contiguous()
        y = torch.empty(len(flat), rows)
        for t in range(len(flat)):
            self.kernel.matvec_8bit(
                self.codes.data_ptr(),
                self.scale.data_ptr(),
                flat[t].data_ptr(),
                y[t].data_ptr(),
                rows,
                columns,
            )
        return y.reshape(*x.shape[:-1], rows)


class Int8Embedding(nn.Module):
    """An embedding that looks up in a table of codes."""

    def __init__(self, table: Int8Table) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... dim"]:
        return self.table.embed(ids)


class Int8Head(nn.Module):
    """The output layer on a table of codes."""

    def __init__(self, table: Int8Table) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... vocab"]:
        return self.table.logits(x)


@torch.no_grad()
def fast(model: nn.Module) -> nn.Module:
    """A model that computes with packed codes; `model` itself is left as it is.

    Linears that are 4-bit `QuantLinear` become `Int4Linear`; embedding and head get 8
    bits, in one table where they are tied.

    Raises:
        NoCompiler: the kernels cannot be compiled here.
        ValueError: the model has no `QuantLinear`, or one that is not of 4 bits.
    """
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            modules[name] = Int4Linear(module)
    if not modules:
        raise ValueError("the model has no QuantLinear: quantise it first")
    embedding = model.model.embed_tokens.weight
    head = model.lm_head.weight
    table = Int8Table(embedding)
    modules["model.embed_tokens"] = Int8Embedding(table)
    tied = head.data_ptr() == embedding.data_ptr()
    modules["lm_head"] = Int8Head(table if tied else Int8Table(head))
    return recipes.with_modules(copy(model), modules)
