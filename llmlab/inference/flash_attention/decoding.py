"""Flash decoding: one new query, many keys, and the keys are shared among workers.

Dao, Haziza, Massa & Sizov 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
While a text is read there are enough blocks of queries to keep a GPU busy. While it is
written there is one query per head, hence one block: most of the chip waits. So the
keys are cut into splits, each worker goes over one, and the partial results are merged.
"""

from __future__ import annotations

from functools import reduce

from jaxtyping import Float
from torch import Tensor

from llmlab.inference.flash_attention.forward import grouped, wide
from llmlab.inference.flash_attention.online_softmax import (
    finish,
    merge,
    online_softmax,
    start,
)


def split_keys(
    q: Float[Tensor, "B H 1 D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    splits: int,
) -> Float[Tensor, "B H 1 D"]:
    """Attention of the newest token over all keys, as `splits` workers compute it.

    Raises:
        ValueError: there are more splits than keys, or several queries.
    """
    if q.shape[2] != 1:
        raise ValueError(f"q has {q.shape[2]} queries: split_keys is for one")
    if not 1 <= splits <= k.shape[2]:
        raise ValueError(f"splits={splits} must be 1 to {k.shape[2]}, the keys there")
    dtype = wide(q)
    q_grouped, k, v = (x.to(dtype) for x in grouped(q, k, v))
    shape = (*q_grouped.shape[:-1], v.shape[-1])
    partial = []
    keys, values = (x.tensor_split(splits, dim=-2) for x in (k, v))
    for K, V in zip(keys, values, strict=True):  # each on a worker of its own
        S = q_grouped @ K.transpose(-1, -2) * q.shape[-1] ** -0.5
        partial.append(online_softmax(*start(shape, S), S, V))
    out, _ = finish(*reduce(lambda a, b: merge(*a, *b), partial))
    return out.flatten(1, 2).to(q.dtype)  # (B, K, G, 1, D) → (B, H, 1, D)
