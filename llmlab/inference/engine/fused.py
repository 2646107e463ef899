"""Blocks with two matrices fewer to multiply: q, k, v as one, gate and up as one.

Products that read the same input become one, with the outputs side by side. The numbers
are the same; what is saved is calls, which count when there are few tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llmlab.models.attention import AttentionFn, Mask
from llmlab.models.cache import Cache
from llmlab.models.llama import MLP, Attention, Llama, rotate


def joined(*linears: nn.Linear) -> nn.Linear:
    """One linear whose outputs are those of all, side by side."""
    rows = sum(linear.out_features for linear in linears)
    bias = linears[0].bias is not None
    one = nn.Linear(linears[0].in_features, rows, bias=bias, device="meta")
    weight = torch.cat([linear.weight.detach() for linear in linears])
    one.weight = nn.Parameter(weight, requires_grad=False)
    if bias:
        together = torch.cat([linear.bias.detach() for linear in linears])
        one.bias = nn.Parameter(together, requires_grad=False)
    return one


class FusedAttention(nn.Module):
    """`Attention` with one product for q, k and v."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.layer = attention.layer
        self.head_dim = attention.head_dim
        self.sizes = [part.out_features for part in parts]
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
        B, T, _ = x.shape
        parts = self.qkv_proj(x).split(self.sizes, dim=-1)
        # (B, T, n·D) → (B, n, T, D)
        q, k, v = (p.view(B, T, -1, self.head_dim).transpose(1, 2) for p in parts)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D)
        out = attention(q, k, v, mask)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class FusedMLP(nn.Module):
    """`MLP` with one product for gate and up."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.gate_up_proj = joined(mlp.gate_proj, mlp.up_proj)
        self.down_proj = mlp.down_proj

    def forward(self, x: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d"]:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def fuse(model: Llama) -> Llama:
    """Every block of a model, in place."""
    for block in model.model.layers:
        block.self_attn = FusedAttention(block.self_attn)
        block.mlp = FusedMLP(block.mlp)
    return model
