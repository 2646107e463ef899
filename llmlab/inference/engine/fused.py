"""Blocks with fewer steps: q, k, v in one product, gate and up in another.

    h ──► norm ──► W_qkv ──► RoPE ──► attention ──► W_o ──► add and norm ──► W_gate_up
                                                  ──► SwiGLU ──► W_down ──► add

Products that read the same input become one, with the outputs side by side; what stands
between two products is a pass of lesson 06. The numbers are the same; what is saved is
calls, which count when there are few tokens. For inference only.

The passes are PyTorch's (`TORCH`), or in C, which `packed` puts in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmlab.inference.fused_transformers import pieces
from llmlab.models.attention import AttentionFn, Mask
from llmlab.models.cache import Cache
from llmlab.models.llama import MLP, Attention, Block, Llama, rotate


def turn(
    qkv: Float[Tensor, "B T all"],
    rope: tuple[Tensor, Tensor],
    sizes: Sequence[int],
    head_dim: int,
) -> list[Tensor]:
    """q and k with RoPE, and v: (B, T, n·D) → (B, n, T, D)."""
    q, k, v = heads(qkv, sizes, head_dim)
    return [rotate(q, *rope), rotate(k, *rope), v]


def heads(
    qkv: Float[Tensor, "B T all"], sizes: Sequence[int], head_dim: int
) -> list[Tensor]:
    """q, k, v as views: (B, T, n·D) → (B, n, T, D)."""
    parts = qkv.split(list(sizes), dim=-1)
    return [part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in parts]


class Passes(NamedTuple):
    """What stands between the products; the last two as in lesson 06's `pieces`."""

    turn: Callable
    add_rms_norm: Callable
    swiglu: Callable


TORCH = Passes(turn, pieces.add_rms_norm, pieces.swiglu)


class SideBySide(nn.Module):
    """Linears of the same x, as one whose outputs are those of all."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        return torch.cat([linear(x) for linear in self.linears], dim=-1)


def joined(*linears: nn.Module) -> nn.Module:
    """One linear whose outputs are those of all, side by side.

    What is no plain `nn.Linear`, as a quantised one, multiplies by itself.
    """
    plain = all(type(linear) is nn.Linear for linear in linears)
    if not plain or len({linear.bias is None for linear in linears}) > 1:
        return SideBySide(linears)
    rows = sum(linear.out_features for linear in linears)
    bias = linears[0].bias is not None
    one = nn.Linear(linears[0].in_features, rows, bias=bias, device="meta")
    weight = torch.cat([linear.weight.detach() for linear in linears])
    one.weight = nn.Parameter(weight, requires_grad=False)
    if bias:
        together = torch.cat([linear.bias.detach() for linear in linears])
        one.bias = nn.Parameter(together, requires_grad=False)
    return one


def outputs(linear: nn.Module) -> int:
    """How many a linear has, a quantised one too."""
    found = getattr(linear, "out_features", None)
    return len(linear.weight) if found is None else found


class FusedAttention(nn.Module):
    """`Attention` with one product for q, k and v."""

    names = ("q_proj", "k_proj", "v_proj")  # of what `joint` joins
    joint = "qkv_proj"
    passes = TORCH

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        parts = [getattr(attention, name) for name in self.names]
        self.layer = attention.layer
        self.head_dim = attention.head_dim
        self.sizes = [outputs(part) for part in parts]
        self.qkv_proj = joined(*parts)
        self.o_proj = attention.o_proj

    def forward(
        self,
        x: Float[Tensor, "B T d"],
        rope: tuple[Tensor, Tensor],
        mask: Mask | None,
        cache: Cache | None,
        attention: AttentionFn,
    ) -> Float[Tensor, "B T d"]:
        qkv = self.qkv_proj(x)
        q, k, v = self.passes.turn(qkv, rope, self.sizes, self.head_dim)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D)
        out = attention(q, k, v, mask)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class FusedMLP(nn.Module):
    """`MLP` with one product for gate and up."""

    names = ("gate_proj", "up_proj")
    joint = "gate_up_proj"
    passes = TORCH

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.sizes = [outputs(mlp.gate_proj), outputs(mlp.up_proj)]
        self.gate_up_proj = joined(mlp.gate_proj, mlp.up_proj)
        self.down_proj = mlp.down_proj

    def forward(self, x: Float[Tensor, "N d"]) -> Float[Tensor, "N d"]:
        return self.down_proj(self.passes.swiglu(self.gate_up_proj(x)))


class FusedBlock(nn.Module):
    """`Block`: four products, and what stands between them in one pass each."""

    passes = TORCH

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.self_attn = FusedAttention(block.self_attn)
        self.mlp = FusedMLP(block.mlp)
        self.input_layernorm = block.input_layernorm
        self.post_attention_layernorm = block.post_attention_layernorm

    def forward(
        self,
        h: Float[Tensor, "B T d"],
        rope: tuple[Tensor, Tensor],
        mask: Mask | None,
        cache: Cache | None,
        attention: AttentionFn,
    ) -> Float[Tensor, "B T d"]:
        first, second = self.input_layernorm, self.post_attention_layernorm
        x = first(h)
        out = self.self_attn(x, rope, mask, cache, attention)
        # in C the residual stream is changed in place
        flat = h.flatten(0, 1).clone()  # (B, T, d) → (N, d)
        x, flat = self.passes.add_rms_norm(
            out.flatten(0, 1), flat, second.weight, second.eps
        )
        return (flat + self.mlp(x)).view(h.shape)


def fuse(model: Llama) -> Llama:
    """Every block of a model, in place."""
    layers = model.model.layers
    for i, block in enumerate(layers):
        layers[i] = FusedBlock(block)
    return model


class Place(NamedTuple):
    """Where the product of a linear of the checkpoint is made.

    Attributes:
        module: that computes it, perhaps with others.
        outputs: which of the module's are its own.
        shape: of its weight, (out, in).
    """

    module: nn.Module
    outputs: slice
    shape: tuple[int, int]


def find(model: nn.Module, name: str) -> Place | None:
    """The linear of that name, also where it was joined with others; None: no such."""
    above, _, last = name.rpartition(".")
    try:
        part = model.get_submodule(above)
    except AttributeError:
        return None
    module = getattr(part, last, None)
    if isinstance(module, nn.Module):
        return Place(module, slice(None), tuple(module.weight.shape))
    if not isinstance(part, FusedAttention | FusedMLP) or last not in part.names:
        return None
    at = part.names.index(last)
    start = sum(part.sizes[:at])
    size = part.sizes[at]
    width = model.config.hidden_size  # both joints read the normed stream
    return Place(getattr(part, part.joint), slice(start, start + size), (size, width))
