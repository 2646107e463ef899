"""Attention in pieces: a softmax over some of the keys, and how two of them become one.

Let S be the scores of a query and A a set of keys. A piece of attention is a pair, both
in fp32 at least:

    o_A = Σ_{j ∈ A} e^{S_j − ℓ_A} v_j          ℓ_A = log Σ_{j ∈ A} e^{S_j}
                                               (lse, the log-sum-exp)

and two disjoint sets merge exactly (Milakov & Gimelshein 2018,
https://arxiv.org/abs/1805.02867; Rabe & Staats 2021):

    ℓ = log(e^{ℓ_A} + e^{ℓ_B})                 o = e^{ℓ_A − ℓ} o_A + e^{ℓ_B − ℓ} o_B

A query that may see none of the keys has o = 0 and ℓ = −∞, which changes nothing when
it is merged.

Backward each piece needs the ℓ of *all* keys, and D = Σ_c dO_c O_c: with P = e^{S − ℓ},

    dV = Pᵀ dO        dS = P ∘ (dO Vᵀ − D)        dQ = dS K / √d        dK = dSᵀ Q / √d

    B  batch     H  query heads     K  key/value heads     G = H/K     D  head_dim
                                                           T, S  queries and keys of
                                                           this piece
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """In fp32 at least: there a softmax in pieces is merged, whatever the model
    computes in.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _grouped(q: Float[Tensor, "B H T D"], K: int) -> Float[Tensor, "B K G T D"]:
    # (B, K·G, T, D) → (B, K, G, T, D): head h uses key head h // G
    return wide(q).unflatten(1, (K, -1))


def _scores(
    q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor, causal: bool
) -> Float[Tensor, "B K G T S"]:
    """Q Kᵀ / √D, −∞ where a key is later than the query."""
    S = (
        _grouped(q, k.shape[1])
        @ wide(k)[:, :, None].transpose(-1, -2)
        * q.shape[-1] ** -0.5
    )
    later = k_pos.to(S.device) > q_pos.to(S.device)[:, None]  # (T, S)
    return S.masked_fill(later, -torch.inf) if causal else S


def attend(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    q_pos: Int[Tensor, " T"],
    k_pos: Int[Tensor, " S"],
    causal: bool = True,
) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B H T"]]:
    """One piece of attention: o and ℓ of these queries over these keys, in fp32 at
    least.
    """
    S = _scores(q, k, q_pos, k_pos, causal)
    lse = S.logsumexp(-1)  # −∞ where nothing may be seen
    # and there e^{−∞ − 0} = 0, not NaN
    P = (S - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    # (B, K, G, T, D) → (B, H, T, D)
    return (P @ wide(v)[:, :, None]).flatten(1, 2), lse.flatten(1, 2)


def merge(o_a: Tensor, l_a: Tensor, o_b: Tensor, l_b: Tensor) -> tuple[Tensor, Tensor]:
    """Two pieces over disjoint keys as one. o: (B, H, T, D), ℓ: (B, H, T)."""
    lse = torch.logaddexp(l_a, l_b)
    safe = lse.masked_fill(lse == -torch.inf, 0.0)  # neither saw a key: 0 · 0 + 0 · 0
    return (l_a - safe).exp()[..., None] * o_a + (l_b - safe).exp()[
        ..., None
    ] * o_b, lse


def attend_backward(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    do: Float[Tensor, "B H T D"],
    lse: Float[Tensor, "B H T"],
    delta: Float[Tensor, "B H T"],
    q_pos: Int[Tensor, " T"],
    k_pos: Int[Tensor, " S"],
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """This piece's part of dQ, and of dK and dV (summed over the G query heads of a key
    head), in fp32 at least.

    Args:
        lse: ℓ over all keys of all pieces. delta: D = Σ dO ∘ O, with the merged O.
    """
    K, scale = k.shape[1], q.shape[-1] ** -0.5
    grouped = lambda t: t.unflatten(1, (K, -1))[..., None]  # noqa: E731  (B, H, T) → (B, K, G, T, 1)
    P = (_scores(q, k, q_pos, k_pos, causal) - grouped(lse)).exp()
    do = _grouped(do, K)
    dv = (P.transpose(-1, -2) @ do).sum(2)  # (B, K, G, S, D) → (B, K, S, D)
    dS = P * (do @ wide(v)[:, :, None].transpose(-1, -2) - grouped(delta)) * scale
    dq = (dS @ wide(k)[:, :, None]).flatten(1, 2)
    dk = (dS.transpose(-1, -2) @ _grouped(q, K)).sum(2)
    return dq, dk, dv
