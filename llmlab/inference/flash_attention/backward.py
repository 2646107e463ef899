"""The backward pass of FlashAttention: the probabilities are computed again.

With the scaled scores S = Q Kᵀ / √D and the log-sum-exp L that the forward pass kept,
each tile of P comes back by itself, P = e^{S − L}: no maximum, no sum. Then

    dV = Pᵀ dO
    dP = dO Vᵀ
    dS = P ∘ (dP − D)          D_i = Σ_c dO_ic O_ic
    dQ = dS K / √D             dK = dSᵀ Q / √D

Through a softmax, dS_ij = P_ij (dP_ij − Σ_k P_ik dP_ik). The sum runs over all keys,
which no tile has. But it is a product of two rows that are there:

    Σ_k P_ik dP_ik  =  Σ_k P_ik Σ_c dO_ic V_kc  =  Σ_c dO_ic Σ_k P_ik V_kc  =  D_i

Key blocks are the outer loop, as in Dao et al. 2022 (appendix B) and Dao 2023
(algorithm 2): dK and dV of a block stay in the fast memory, dQ is added to.

Simplified: D is computed in each tile, as FlashAttention (2022) does; FlashAttention-2
computes it once per row beforehand.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from llmlab.inference.flash_attention.forward import (
    grouped,
    tile_scores,
    tiles,
    wide,
)
from llmlab.inference.flash_attention.online_softmax import finite
from llmlab.models.attention import Mask


def score_gradient(
    S: Float[Tensor, "*heads rows cols"],
    L: Float[Tensor, "*heads rows"],
    O: Float[Tensor, "*heads rows D"],
    dO: Float[Tensor, "*heads rows D"],
    V: Float[Tensor, "*heads cols D"],
) -> tuple[Float[Tensor, "*heads rows cols"], Float[Tensor, "*heads rows cols"]]:
    """P and dS of one tile.

    Args:
        S: scaled scores, −∞ where a query may not look.
        L: log-sum-exp over the keys of all tiles.
        O: output over the keys of all tiles.
    """
    P = (S - finite(L)[..., None]).exp()  # a query without keys: e^{−∞ − 0} = 0
    D = (dO * O).sum(-1, keepdim=True)
    dP = dO @ V.transpose(-1, -2)
    return P, P * (dP - D)


def backward(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    out: Float[Tensor, "B H T D"],
    lse: Float[Tensor, "B H T"],
    dout: Float[Tensor, "B H T D"],
    mask: Mask | None = None,
    causal: bool = True,
    rows: int = 64,
    cols: int = 64,
) -> tuple[
    Float[Tensor, "B H T D"], Float[Tensor, "B K S D"], Float[Tensor, "B K S D"]
]:
    """dQ, dK and dV, in the dtypes of q, k and v.

    dK and dV are summed over the G query heads that share a key head.
    """
    dtypes = (q.dtype, k.dtype, v.dtype)
    G = q.shape[1] // k.shape[1]
    plan = tiles(q.shape[2], k.shape[2], rows, cols, mask, causal)
    plan.sort(key=lambda tile: tile[2])  # key blocks outside
    q, k, v = grouped(q, k, v)
    out, dout = (x.unflatten(1, (-1, G)).to(wide(q)) for x in (out, dout))
    lse = lse.unflatten(1, (-1, G))  # (B, H, T) → (B, K, G, T)
    dq, dk, dv = (x.new_zeros(x.shape, dtype=wide(q)) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    for tile in plan:
        i = slice(tile[0], tile[1])
        j = slice(tile[2], tile[3])
        dO = dout[..., i, :]
        P, dS = score_gradient(
            tile_scores(q, k, mask, tile),
            lse[..., i],
            out[..., i, :],
            dO,
            v[..., j, :].to(wide(q)),
        )
        # over G: (B, K, G, cols, D) → (B, K, 1, cols, D)
        dv[..., j, :] += (P.transpose(-1, -2) @ dO).sum(2, keepdim=True)
        q_tile = q[..., i, :].to(wide(q))
        dk[..., j, :] += (dS.transpose(-1, -2) @ q_tile).sum(2, keepdim=True) * scale
        dq[..., i, :] += dS @ k[..., j, :].to(wide(q)) * scale
    # (B, K, G, T, D) → (B, H, T, D); (B, K, 1, S, D) → (B, K, S, D)
    found = (dq.flatten(1, 2), dk[:, :, 0], dv[:, :, 0])
    return tuple(x.to(dtype) for x, dtype in zip(found, dtypes, strict=True))
