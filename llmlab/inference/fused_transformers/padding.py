"""Texts of unequal lengths without padding.

A batch is a table, as long as its longest text, and the places behind shorter ones are
padding: computed like all others, and thrown away. In a layer only attention needs to
know which token belongs to which text. Products, norms and SwiGLU take a list of tokens
(ByteDance's Effective Transformer; Zhai et al. 2023,
https://arxiv.org/abs/2210.03052):

    table (B, T)     a a a ·        tokens   a a a b c c       starts   0 3 4 6
                     b · · ·        places   0 1 2 4 8 9
                     c c · ·

`places` are positions in the flattened table: the way back. `starts` are the prefix
sums of the lengths; flash-attn calls them cu_seqlens.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llmlab.models.accounting import forward_flops
from llmlab.models.llama import LlamaConfig


def remove_padding(
    x: Float[Tensor, "B T d"], mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"]
) -> tuple[Float[Tensor, "N d"], Int[Tensor, "N"], Int[Tensor, "B_and_1"]]:
    """The tokens of a table, text after text.

    Args:
        mask: 1 (or True) for a token and 0 for padding, which may be on either side.
    Returns:
        tokens; places, each token's position in the flattened table; starts, where
        each text begins among the tokens, and at the end their number. Both int64.
    """
    is_token = mask.bool()
    places = is_token.flatten().nonzero().flatten()  # (N,)
    starts = F.pad(is_token.sum(1).cumsum(0), (1, 0))  # (B + 1,)
    return x.flatten(0, 1)[places], places, starts


def restore_padding(
    tokens: Float[Tensor, "N d"], places: Int[Tensor, "N"], batch: int, length: int
) -> Float[Tensor, "B T d"]:
    """The table again, with zeros where there is padding."""
    table = tokens.new_zeros(batch * length, *tokens.shape[1:])
    table[places] = tokens
    return table.unflatten(0, (batch, length))


def flops(config: LlamaConfig, lengths: list[int]) -> tuple[int, int]:
    """FLOPs of a padded batch and of its tokens alone.

    As in `accounting`, masked scores count.
    """
    padded = forward_flops(config, len(lengths), max(lengths))
    return padded, sum(forward_flops(config, 1, length) for length in lengths)
