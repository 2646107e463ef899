"""A softmax over keys that come in pieces (Milakov & Gimelshein 2018).

https://arxiv.org/abs/1805.02867; with the values, as in FlashAttention (Dao et al.
2022, https://arxiv.org/abs/2205.14135). Of all keys seen so far a query keeps

    m = max_j S_j        l = Σ_j e^{S_j − m}        O = Σ_j e^{S_j − m} V_j

When more keys come and the maximum grows to m', every e^{S_j − m} that was summed is
too large by the same factor. So both sums are rescaled by α = e^{m − m'}:

    l' = α l + Σ_new e^{S_j − m'}       O' = α O + Σ_new e^{S_j − m'} V_j

At the end the output is O / l, and the log-sum-exp is L = m + log l. No exponent is
ever above 0, so nothing overflows, whatever the scores.

A query that has seen no key has m = −∞, l = 0, O = 0. It ends with output 0, L = −∞.

    S    scores of the new keys, (…, T, S): −∞ where a query may not look
    V    values of the new keys, (…, S, D)
    m    running maximum, (…, T)
    l    running sum of exponentials, (…, T)
    O    running sum of weighted values, (…, T, D): not divided by l (FlashAttention-2)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# m, l, O
State = tuple[
    Float[Tensor, "*heads T"], Float[Tensor, "*heads T"], Float[Tensor, "*heads T D"]
]


def start(shape: tuple[int, ...], like: Tensor) -> State:
    """m, l, O of queries that have seen no key; `shape` is that of O."""
    m = like.new_full(shape[:-1], -torch.inf)
    return m, like.new_zeros(shape[:-1]), like.new_zeros(shape)


def online_softmax(
    m: Float[Tensor, "*heads T"],
    l: Float[Tensor, "*heads T"],
    O: Float[Tensor, "*heads T D"],
    S: Float[Tensor, "*heads T S"],
    V: Float[Tensor, "*heads S D"],
) -> State:
    """m, l and O after the keys with scores S and values V."""
    m_new = torch.maximum(m, S.amax(-1))
    base = finite(m_new)
    alpha = (m - base).exp()
    P = (S - base[..., None]).exp()
    return m_new, alpha * l + P.sum(-1), alpha[..., None] * O + P @ V


def merge(
    m_a: Float[Tensor, "*heads T"],
    l_a: Float[Tensor, "*heads T"],
    O_a: Float[Tensor, "*heads T D"],
    m_b: Float[Tensor, "*heads T"],
    l_b: Float[Tensor, "*heads T"],
    O_b: Float[Tensor, "*heads T D"],
) -> State:
    """m, l and O over the keys of a and b together.

    The order does not matter: that is what lets several workers share the keys.
    """
    m = torch.maximum(m_a, m_b)
    base = finite(m)
    alpha = (m_a - base).exp()
    beta = (m_b - base).exp()
    O = alpha[..., None] * O_a + beta[..., None] * O_b
    return m, alpha * l_a + beta * l_b, O


def finish(
    m: Float[Tensor, "*heads T"],
    l: Float[Tensor, "*heads T"],
    O: Float[Tensor, "*heads T D"],
) -> tuple[Float[Tensor, "*heads T D"], Float[Tensor, "*heads T"]]:
    """The output O / l and the log-sum-exp L = m + log l."""
    seen = l > 0
    out = O / torch.where(seen, l, 1.0)[..., None]  # 0 / 1 where no key was seen
    return out, torch.where(seen, m + l.log(), -torch.inf)


def finite(m: Tensor) -> Tensor:
    """m, or 0 where it is −∞: then −∞ − 0 is −∞, and not NaN, and its e^ is 0."""
    return m.masked_fill(m == -torch.inf, 0.0)
