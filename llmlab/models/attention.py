"""What `Llama` takes from outside for attention: the kernel and the mask.

Training packs several documents into a row. Then a query must see its own document
only: the mask has a block for each document along its diagonal (`document_mask`).

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
# True where a query may look, or a number that is added to its score
Mask = Bool[Tensor, "B_or_1 H_or_1 T S"] | Float[Tensor, "B_or_1 H_or_1 T S"]


def sdpa(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    mask: Mask | None,
) -> Float[Tensor, "B H T D"]:
    """softmax(q kᵀ / √D) v by PyTorch's fused kernel.

    Args:
        mask: True where a query may look, or what is added to the scores; None means
            causal.
    Raises:
        ValueError: a mask for each head, and not as many as there are query heads.
    """
    if mask is not None and mask.shape[1] not in (1, q.shape[1]):
        raise ValueError(
            f"the mask is for {mask.shape[1]} heads, and here are {q.shape[1]} query"
            " heads: give one mask for all of them"
        )
    causal = mask is None and q.shape[2] > 1
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )


def attention_mask_for(
    seq: int,
    past: int,
    given: Tensor | None,
    device=None,
    documents: Int[Tensor, "B_or_1 T"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Mask | None:
    """Where a query may look: at itself, and at earlier keys that are not padding, in
    the same document.

    Query i stands at position past + i, so these are the keys j ≤ past + i.

    Args:
        seq: new tokens, T.
        past: tokens in the cache, S − T.
        given: the caller's mask. (B, S): 1 for a token and 0 for padding. (B, T, S) or
            (B, 1 or H, T, S): the whole rule, causality included; see `whole_mask`.
        documents: the document of each token, where a row has several.
        dtype: of the scores.
    Returns:
        The mask, or None for plain causal attention: the fused kernel needs no mask.
    Raises:
        ValueError: `given` does not cover S tokens, or is not of a kind named above.
    """
    if given is not None and given.dim() != 2:
        return whole_mask(given, seq, past, dtype)
    if documents is not None:
        return document_mask(documents, given)
    if given is None and (past == 0 or seq == 1):
        return None
    everywhere = torch.ones(seq, past + seq, dtype=torch.bool, device=device)
    mask = everywhere.tril(past)[None, None]  # (1, 1, T, S)
    if given is None:
        return mask
    if given.shape[-1] != past + seq:
        raise ValueError(
            f"attention_mask covers {given.shape[-1]} tokens; it must cover the"
            f" {past} in the cache and the {seq} new ones"
        )
    return _without_padding(mask, given, past)


def _without_padding(
    mask: Bool[Tensor, "B_or_1 1 T S"], padding: Tensor, past: int = 0
) -> Bool[Tensor, "B 1 T S"]:
    """The same, but nobody looks at padding."""
    if padding.is_floating_point() and (padding < 0).any():
        raise ValueError(
            "attention_mask has negative numbers: of two dimensions it is 1 for a token"
            " and 0 for padding; what is added to scores is (B, 1, T, S)"
        )
    # A query that is padding looks at itself: a softmax over nothing would be NaN.
    seq = mask.shape[-2]
    itself = torch.eye(seq, dtype=torch.bool, device=mask.device)
    itself = F.pad(itself, (past, 0))[None, None]  # (T, T) -> (1, 1, T, S)
    is_token = padding.bool()[:, None, None, :]  # (B, 1, 1, S)
    return mask & is_token | itself


def whole_mask(
    given: Tensor, seq: int, past: int, dtype: torch.dtype = torch.float32
) -> Mask:
    """A mask that says for each query which keys it may look at, as it is.

    As in transformers 5.23 nothing is added to it, not even that a query sees no later
    key. Its "sdpa" takes boolean ones (True: may look) and floats (added to the
    scores), as we do; its "eager" adds booleans, too, which then hide nothing.
    transformers has no masks of three dimensions.

    Raises:
        ValueError: other numbers of tokens; whole numbers, which could mean either.
    """
    if given.dim() == 3:
        given = given[:, None]  # (B, T, S) → (B, 1, T, S)
    if given.dim() != 4 or given.shape[-2:] != (seq, past + seq):
        raise ValueError(
            f"attention_mask has shape {tuple(given.shape)}: it must be (B, S), (B, T,"
            f" S) or (B, 1 or heads, T, S), with T={seq} new tokens, S={past + seq}"
            " with those in the cache"
        )
    if given.dtype == torch.bool:
        return given
    if not given.is_floating_point():
        raise ValueError(
            f"attention_mask of each query and key is {given.dtype}: it must be boolean"
            " (True: may look) or floating (added to the scores)"
        )
    return given.to(dtype)


# Packed documents ---------------------------------------------------------------------


def documents_of(
    position_ids: Int[Tensor, "B_or_1 T"],
) -> Int[Tensor, "B_or_1 T"] | None:
    """Which document each token is of: a new one begins where a position is not the one
    before plus 1.

    >>> documents_of(torch.tensor([[0, 1, 2, 0, 1]]))
    tensor([[0, 0, 0, 1, 1]])

    Returns:
        Numbers from 0 in each row; None if each row is one document.
    """
    begins = position_ids.diff(dim=-1) != 1  # (B, T − 1)
    if not begins.any():
        return None
    return F.pad(begins.cumsum(-1), (1, 0))


def document_mask(
    documents: Int[Tensor, "B_or_1 T"],
    padding: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None = None,
) -> Bool[Tensor, "B_or_1 1 T T"]:
    """Blocks along the diagonal: a query sees earlier keys of its own document.

    Args:
        documents: a number for each token, the same within a document.
        padding: 1 for a token, 0 for padding.
    """
    T = documents.shape[-1]
    # (B, 1, T, 1) and (B, 1, 1, T) → (B, 1, T, T)
    mask = documents[:, None, :, None] == documents[:, None, None, :]
    mask = mask & torch.ones(T, T, dtype=torch.bool, device=mask.device).tril()
    return mask if padding is None else _without_padding(mask, padding)
