"""Attention's two loose ends: the kernel, and who may look where.

B  batch            H  query heads        D  head_dim
T  new tokens       K  key/value heads
S  all tokens, those in the cache included (S = T without a cache)
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
    """softmax(q kᵀ / √D) v by PyTorch's fused kernel. `mask` is True where a query may
    look; None means causal.
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
    """Where query i (at place past + i) may look: at keys j ≤ past + i that are not
    padding, and always at itself.

    None stands for plain causal attention, which the fused kernel does without a mask.
    """
    if padding is None and (past == 0 or seq == 1):
        return None
    # (1, 1, T, S)
    mask = torch.ones(seq, past + seq, dtype=torch.bool, device=device).tril(past)[
        None, None
    ]
    if padding is None:
        return mask
    if padding.shape[-1] != past + seq:
        raise ValueError(
            f"attention_mask covers {padding.shape[-1]} tokens; it must cover the"
            f" {past} in the cache and the {seq} new ones"
        )
    itself = torch.eye(seq, dtype=torch.bool, device=device)
    # (1, 1, T, S): keeps a padding row from a softmax over nothing
    itself = F.pad(itself, (past, 0))[None, None]
    return mask & padding.bool()[:, None, None, :] | itself
