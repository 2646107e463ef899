"""The fused steps of a Llama layer, as plain functions: what each kernel computes.

    qkv      =  x W_qkvᵀ                      one product where three were
    q, cache =  RoPE(q), RoPE(k), v           one pass; keys go straight to their place
    gate_up  =  x W_gate_upᵀ                  one product where two were
    a        =  silu(gate) ⊙ up               one pass
    r ← r + x,  y = r / rms(r) ⊙ g            one pass: the sum is there to be squared

All rows are tokens: x is (N, d), whatever batch they come from. So a product is one
product, no axis has to be moved for it, and padding is not needed (`padding`).

    N  tokens             H  query heads          d  hidden_size
    B  batch              K  key/value heads      f  intermediate_size
    T  new tokens         D  head_dim             C  places in the cache

Equal to the unfused layer up to the order of sums; each is differentiable, but for
`rope_and_store`, which writes into the cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# Packed weights ---------------------------------------------------------------------


def pack_qkv(
    q: Float[Tensor, "H_D ..."],
    k: Float[Tensor, "K_D ..."],
    v: Float[Tensor, "K_D ..."],
    parts: int = 1,
) -> Float[Tensor, "all ..."]:
    """Three weights (or biases) as one, so that one product gives q, k and v.

    With `parts` the rows come in that many equal blocks, and each block holds q, k and
    v of its own heads: as many devices can then take a block each. parts = K is the
    order of Megatron-LM: a key head next to the query heads that share it.

    Raises:
        ValueError: the rows of q or of k and v cannot be cut into `parts`.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if parts < 1 or x.shape[0] % parts:
            raise ValueError(
                f"parts={parts} must be at least 1 and divide the {x.shape[0]} rows of"
                f" {name}"
            )
    blocks = zip(q.chunk(parts), k.chunk(parts), v.chunk(parts), strict=True)
    return torch.cat([x for block in blocks for x in block])


def split_qkv(
    qkv: Float[Tensor, "N all"], heads: int, kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q (N, H, D), k and v (N, K, D), as views of a product with parts = 1."""
    cut = qkv.unflatten(-1, (heads + 2 * kv_heads, head_dim))  # (N, H + 2 K, D)
    return cut.split([heads, kv_heads, kv_heads], dim=-2)


# Passes over the tokens -------------------------------------------------------------


def add_rms_norm(
    x: Float[Tensor, "N d"],
    residual: Float[Tensor, "N d"],
    weight: Float[Tensor, "d"],
    eps: float,
) -> tuple[Float[Tensor, "N d"], Float[Tensor, "N d"]]:
    """The layer's result is added to the residual stream, and the sum is normed.

    Returns:
        What the next product reads, and the new residual stream.
    """
    residual = residual + x
    wide = residual.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(residual.dtype), residual


def rope_and_store(
    qkv: Float[Tensor, "N all"],
    cos: Float[Tensor, "N half"],
    sin: Float[Tensor, "N half"],
    keys: Float[Tensor, "B K C D"],
    values: Float[Tensor, "B K C D"],
    start: int,
) -> Float[Tensor, "B H T D"]:
    """q with RoPE; k with RoPE and v go to the places start … start + T − 1.

    Args:
        keys, values: the cache of this layer; changed in place.
    Returns:
        q, whose memory lies in the order (B, T, H, D): attention keeps that order for
        what it writes, so that W_o reads it without a copy.
    """
    B, K, _, D = keys.shape
    T = qkv.shape[0] // B
    H = qkv.shape[1] // D - 2 * K
    q, k, v = split_qkv(qkv, H, K, D)
    places = slice(start, start + T)
    # (N, K, D) → (B, T, K, D) → (B, K, T, D)
    keys[:, :, places] = turn(k, cos, sin).unflatten(0, (B, T)).transpose(1, 2)
    values[:, :, places] = v.unflatten(0, (B, T)).transpose(1, 2)
    q = turn(q, cos, sin).unflatten(0, (B, T))  # (B, T, H, D)
    return q.transpose(1, 2)


def turn(
    x: Float[Tensor, "N heads D"], cos: Float[Tensor, "N half"], sin: Tensor
) -> Float[Tensor, "N heads D"]:
    """RoPE in the half-split layout, the angle of a pair given once."""
    x1, x2 = x.chunk(2, dim=-1)  # (N, heads, D/2) each
    cos, sin = cos[:, None], sin[:, None]  # (N, 1, D/2)
    turned_1 = torch.addcmul(x1 * cos, x2, sin, value=-1)  # x₁ cos − x₂ sin
    turned_2 = torch.addcmul(x2 * cos, x1, sin)  # x₂ cos + x₁ sin
    return torch.cat([turned_1, turned_2], dim=-1)


def swiglu(gate_up: Float[Tensor, "N two_f"]) -> Float[Tensor, "N f"]:
    """silu(gate) ⊙ up, where gate is the first half of each row."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
