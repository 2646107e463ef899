"""What `Llama` takes from outside for attention: the kernel and the mask.

B  batch
T  new tokens
S  all tokens, those in the cache included (S = T without a cache)
H  query heads
K  key/value heads
D  head_dim
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

AttentionFn = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def sdpa(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    mask: Bool[Tensor, "B 1 T S"] | None,
) -> Float[Tensor, "B H T D"]:
    """softmax(q kᵀ / √D) v by PyTorch's fused kernel.

    Args:
        mask: True where a query may look; None means causal.
    """
    causal = mask is None and q.shape[2] > 1
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )


def attention_mask_for(
    seq: int,
    past: int,
    padding: Int[Tensor, "batch all_seq"] | Bool[Tensor, "batch all_seq"] | None,
    device=None,
) -> Bool[Tensor, "batch 1 seq all_seq"] | None:
    """Where a query may look: at itself, and at earlier keys that are not padding.

    Query i stands at position past + i, so these are the keys j ≤ past + i.

    Args:
        seq: new tokens, T.
        past: tokens in the cache, S − T.
        padding: 1 for a token and 0 for padding, over all S tokens.
    Returns:
        The mask, or None for plain causal attention: the fused kernel needs no mask.
    Raises:
        ValueError: `padding` does not cover S tokens.
    """
    if padding is None and (past == 0 or seq == 1):
        return None
    everywhere = torch.ones(seq, past + seq, dtype=torch.bool, device=device)
    mask = everywhere.tril(past)[None, None]  # (1, 1, T, S)
    if padding is None:
        return mask
    if padding.shape[-1] != past + seq:
        raise ValueError(
            f"attention_mask covers {padding.shape[-1]} tokens; it must cover the"
            f" {past} in the cache and the {seq} new ones"
        )
    # A query that is padding looks at itself: a softmax over nothing would be NaN.
    itself = torch.eye(seq, dtype=torch.bool, device=device)
    itself = F.pad(itself, (past, 0))[None, None]  # (T, T) -> (1, 1, T, S)
    is_token = padding.bool()[:, None, None, :]  # (B, 1, 1, S)
    return mask & is_token | itself
