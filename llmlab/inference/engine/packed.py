"""The same model for a processor: weights laid out as it multiplies, fewer calls.

A product of few rows with a large weight reads the weight from memory as it lies, row
by row, and arranges pieces of it anew for the vector units, in every call. oneDNN,
which PyTorch brings, can do that once, before the first token. And products that read
the same x are one product:

    W_q, W_k, W_v   one below the other         W_gate, W_up   likewise

What stands between the products is in `layer.c`: add and RMSNorm, RoPE, SwiGLU. So a
layer is four products and five other calls, instead of seven and some thirty. Linears
that are not PyTorch's own, as quantised ones, stay, each a product by itself.

Simplified: float32 on a CPU; the plain weights stay in memory, too.
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

from llmlab.models.attention import AttentionFn
from llmlab.models.c_library import LONG, POINTER, NoCompiler, build
from llmlab.models.cache import Cache
from llmlab.models.llama import Block, Llama, LlamaConfig

ROWS = 16  # tokens for which the layout is chosen
SOURCE = Path(__file__).parent / "layer.c"
ARGUMENTS = {
    "add_rms_norm": [POINTER] * 4 + [LONG] * 2 + [ctypes.c_float],
    "rotate": [POINTER] * 3 + [LONG] * 4,
    "swiglu": [POINTER] * 2 + [LONG] * 2,
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where there is no compiler."""
    try:
        return build(SOURCE, ARGUMENTS)
    except NoCompiler:
        return None


def available() -> bool:
    """Whether PyTorch has oneDNN here."""
    return torch.backends.mkldnn.is_available()


class PackedLinear(nn.Module):
    """y = W x + b, with a second copy of W in oneDNN's layout."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        # not a buffer: it is no tensor that can be saved
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if x.requires_grad:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(
            x, self.packed, self.bias, "none", [], ""
        )


class SideBySide(nn.Module):
    """Linears of the same x, as one whose outputs are those of all."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        return torch.cat([linear(x) for linear in self.linears], dim=-1)


class PackedBlock(nn.Module):
    """One decoder layer, as `Block`, with four products. For inference only."""

    def __init__(self, block: Block, config: LlamaConfig) -> None:
        super().__init__()
        attention, mlp = block.self_attn, block.mlp
        self.layer = attention.layer
        self.head_dim = config.head_dim
        self.query_width = config.num_attention_heads * config.head_dim
        self.key_width = config.num_key_value_heads * config.head_dim
        self.qkv = _stacked(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = _stacked(attention.o_proj)
        self.gate_up = _stacked(mlp.gate_proj, mlp.up_proj)
        self.down = _stacked(mlp.down_proj)
        self.norms = nn.ModuleList(
            [block.input_layernorm, block.post_attention_layernorm]
        )

    def forward(
        self,
        h: Float[Tensor, "B T d"],
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
        attention: AttentionFn,
    ) -> Float[Tensor, "B T d"]:
        h = h.clone(memory_format=torch.contiguous_format)  # it is added to in place
        qkv = self.qkv(self._normed(0, h))  # (B, T, (H + 2K) D)
        self._rotate(qkv, rope)
        widths = (self.query_width, self.key_width, self.key_width)
        q, k, v = (self._heads(part) for part in qkv.split(widths, dim=-1))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        out = attention(q, k, v, mask).transpose(1, 2).flatten(2)  # (B, T, H·D)
        x = self._normed(1, h, self.output(out))
        return h.add_(self.down(self._swiglu(self.gate_up(x))))

    def _heads(self, x: Float[Tensor, "B T all"]) -> Float[Tensor, "B n T D"]:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _normed(self, which: int, h: Tensor, add: Tensor | None = None) -> Tensor:
        """h ← h + add, and RMSNorm of that."""
        norm = self.norms[which]
        out = torch.empty_like(h)
        library().add_rms_norm(
            h.data_ptr(),
            None if add is None else add.data_ptr(),
            norm.weight.data_ptr(),
            out.data_ptr(),
            h.numel() // h.shape[-1],
            h.shape[-1],
            norm.eps,
        )
        return out

    def _rotate(self, qkv: Tensor, rope: tuple[Tensor, Tensor]) -> None:
        """RoPE on q and k, in place."""
        B, T, width = qkv.shape
        cos, sin = rope
        if len(cos) != B:
            cos, sin = (each.expand(B, -1, -1, -1) for each in rope)
        cos, sin = cos.contiguous(), sin.contiguous()  # (B, 1, T, D)
        heads = (self.query_width + self.key_width) // self.head_dim
        library().rotate(
            qkv.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            B * T,
            heads,
            self.head_dim,
            width,
        )

    def _swiglu(self, x: Float[Tensor, "B T two_f"]) -> Float[Tensor, "B T f"]:
        f = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], f)
        library().swiglu(x.data_ptr(), out.data_ptr(), x.numel() // (2 * f), f)
        return out


def _stacked(*linears: nn.Module) -> nn.Module:
    """One linear whose outputs are those of all, side by side."""
    if any(type(linear) is not nn.Linear for linear in linears):
        return linears[0] if len(linears) == 1 else SideBySide(linears)
    if len(linears) == 1:
        return PackedLinear(linears[0].weight, linears[0].bias)
    weight = torch.cat([linear.weight for linear in linears])
    bias = None
    if linears[0].bias is not None:
        bias = torch.cat([linear.bias for linear in linears])
    return PackedLinear(weight, bias)


@torch.no_grad()
def packed(model: Llama, *, fused: bool = True) -> Llama:
    """A model that computes with packed weights; `model` itself is left as it is.

    Without oneDNN, or where its numbers are not float32, it is the model itself.

    Args:
        fused: whole layers become a `PackedBlock` where there is a C compiler. Their
            linears have no names of their own then, so that no adapter finds them:
            with adapters say False, and each `nn.Linear` becomes a `PackedLinear`.
    """
    if not available() or model.model.norm.weight.dtype != torch.float32:
        return model
    return _packed(model, model.config, fused and library() is not None)


def _packed(module: nn.Module, config: LlamaConfig, fused: bool) -> nn.Module:
    """A copy of the tree of modules, down to what is packed."""
    if fused and type(module) is Block:
        return PackedBlock(module, config)
    if type(module) is nn.Linear:
        return PackedLinear(module.weight, module.bias)
    twin = copy(module)
    twin._modules = {
        name: None if child is None else _packed(child, config, fused)
        for name, child in module._modules.items()
    }
    return twin
