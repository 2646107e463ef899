"""Ulysses: before attention the ranks swap tokens for heads, behind it they swap back.

Jacobs et al. 2023, https://arxiv.org/abs/2309.14509 (DeepSpeed-Ulysses). Outside of
attention rank r has its tokens and all heads. An all-to-all gives it all tokens and its
heads; any attention kernel runs there, unchanged; another all-to-all gives the tokens
back:

    q, k, v  (B, H, Tr, D)   →   (B, H/p, T, D)   →   attention   →   (B, H/p, T, D)   →
                                                      (B, H, Tr, D)

Each of the four tensors costs a rank (p−1)/p of its own share: with H = K, 4 · T · d /
p numbers forward for large p, which falls with p; backward as many. The number of ranks
must divide the query heads. Where it does not divide the key/value heads (grouped-query
attention with K < p, above all), each of them is sent to p / gcd(K, p) ranks: that
costs bytes, not exactness.

    B  batch     H, K  query and key/value heads     D  head_dim     T  all tokens
                                                        Tr  this rank's, a contiguous
                                                        stretch
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llmlab.models.attention import AttentionFn, sdpa
from llmlab.parallelism.runtime import Communicator


def tokens_to_heads(
    x: Float[Tensor, "B H Tr D"], comm: Communicator
) -> Float[Tensor, "B Hp T D"]:
    """All ranks' tokens for this rank's heads. Communication only."""
    # p × (Tr, B, H/p, D)
    parts = [part.movedim(2, 0) for part in x.chunk(comm.size, dim=1)]
    # (T, B, H/p, D) → (B, H/p, T, D)
    return torch.cat(comm.all_to_all(parts)).movedim(0, 2)


def heads_to_tokens(
    x: Float[Tensor, "B Hp T D"], comm: Communicator, lengths: list[int]
) -> Float[Tensor, "B H Tr D"]:
    """All ranks' heads for this rank's tokens: `tokens_to_heads` undone. Communication
    only.
    """
    # p × (Tr of that rank, B, H/p, D)
    parts = [part.movedim(2, 0) for part in x.split(lengths, dim=2)]
    # (Tr, B, H, D) → (B, H, Tr, D)
    return torch.cat(comm.all_to_all(parts), dim=2).movedim(0, 2)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator, lengths: list[int]) -> Tensor:
        ctx.comm, ctx.lengths = comm, lengths
        return tokens_to_heads(x, comm)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return heads_to_tokens(grad, ctx.comm, ctx.lengths), None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator, lengths: list[int]) -> Tensor:
        ctx.comm = comm
        return heads_to_tokens(x, comm, lengths)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return tokens_to_heads(grad, ctx.comm), None, None


@dataclass(frozen=True)
class UlyssesAttention:
    """Exact attention over a sequence in contiguous stretches: a drop-in for the
    model's attention function.

    Args:
        comm: the ranks, in the order of their stretches.
        lengths: tokens of each rank.
        attention: what runs on all tokens and H/p heads.
    """

    comm: Communicator
    lengths: list[int]
    attention: AttentionFn = sdpa

    def __post_init__(self) -> None:
        if len(self.lengths) != self.comm.size:
            raise ValueError(
                f"lengths={self.lengths} must name the tokens of each of the"
                f" {self.comm.size} ranks"
            )

    def __call__(
        self,
        q: Float[Tensor, "B H Tr D"],
        k: Float[Tensor, "B K Tr D"],
        v: Float[Tensor, "B K Tr D"],
        mask: Tensor | None = None,
    ) -> Float[Tensor, "B H Tr D"]:
        """Attention of this rank's queries over all ranks' keys, causal in the order of
        ranks.

        Raises:
            ValueError: a mask; query heads that do not divide over the ranks.
        """
        p, H, K = self.comm.size, q.shape[1], k.shape[1]
        if mask is not None:
            raise ValueError(
                "mask must be None: after the exchange attention is plain causal"
                " attention"
            )
        if H % p:
            raise ValueError(f"{H} query heads must be a multiple of the {p} ranks")
        if K % p:  # several ranks get a copy; autograd sums the copies' gradients
            k, v = (t.repeat_interleave(p // math.gcd(K, p), dim=1) for t in (k, v))
        q, k, v = (_ToHeads.apply(t, self.comm, self.lengths) for t in (q, k, v))
        return _ToTokens.apply(self.attention(q, k, v, None), self.comm, self.lengths)
