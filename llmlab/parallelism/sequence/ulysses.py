"""Ulysses: before attention the ranks exchange tokens for heads, after it back again.

Jacobs et al. 2023, https://arxiv.org/abs/2309.14509 (DeepSpeed-Ulysses). Outside of
attention rank r has its tokens and all heads. An all-to-all gives it all tokens and its
heads; any attention kernel runs there, unchanged; another all-to-all gives the tokens
back:

    q, k, v  (B, H, Tr, D)  →  (B, H/p, T, D)
    attention
    out      (B, H/p, T, D)  →  (B, H, Tr, D)

Each of the four tensors costs a rank (p−1)/p of its own share: with H = K, forward it
sends 4 · T · d / p numbers for large p, which falls with p; backward as many. The
number of ranks must divide the query heads. Where it does not divide the key/value
heads (grouped-query attention with K < p, above all), each of them is sent to
p / gcd(K, p) ranks. That costs bytes; the result stays exact.

Simplified: contiguous shards only, no padding mask, no packed documents.

    B   batch
    H   query heads
    K   key/value heads
    D   head_dim
    d   H·D, hidden size
    T   all tokens
    Tr  this rank's tokens, a contiguous stretch
    p   ranks; Hp is H/p
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmlab.models.attention import AttentionFn, sdpa
from llmlab.parallelism.runtime import Communicator
from llmlab.parallelism.sequence.shards import check_positions


def tokens_to_heads(
    x: Float[Tensor, "B H Tr D"], comm: Communicator
) -> Float[Tensor, "B Hp T D"]:
    """All ranks' tokens for this rank's heads. Communication only."""
    # one part per rank: (B, H/p, Tr, D) → (Tr, B, H/p, D)
    parts = [part.movedim(2, 0) for part in x.chunk(comm.size, dim=1)]
    received = comm.all_to_all(parts)
    # p × (Tr of that rank, B, H/p, D) → (T, B, H/p, D) → (B, H/p, T, D)
    return torch.cat(received).movedim(0, 2)


def heads_to_tokens(
    x: Float[Tensor, "B Hp T D"], comm: Communicator, lengths: list[int]
) -> Float[Tensor, "B H Tr D"]:
    """All ranks' heads for this rank's tokens: `tokens_to_heads` undone.

    Communication only.

    Args:
        lengths: tokens of each rank.
    """
    # one part per rank: (B, H/p, Tr of that rank, D) → (Tr of that rank, B, H/p, D)
    parts = [part.movedim(2, 0) for part in x.split(lengths, dim=2)]
    received = comm.all_to_all(parts)
    # p × (Tr, B, H/p, D) → (Tr, B, H, D) → (B, H, Tr, D)
    return torch.cat(received, dim=2).movedim(0, 2)


# The gradient of one exchange is the other.


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator, lengths: list[int]) -> Tensor:
        ctx.comm = comm
        ctx.lengths = lengths
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
    """Exact attention over a sequence in contiguous stretches.

    It takes the place of the model's attention function.

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

    def check_positions(self, position_ids: Int[Tensor, "B Tr"]) -> None:
        """Raises: ValueError: they are not those of this rank's stretch."""
        start = sum(self.lengths[: self.comm.rank])
        stretch = torch.arange(start, start + self.lengths[self.comm.rank])
        check_positions(position_ids, stretch)

    def __call__(
        self,
        q: Float[Tensor, "B H Tr D"],
        k: Float[Tensor, "B K Tr D"],
        v: Float[Tensor, "B K Tr D"],
        mask: Tensor | None = None,
    ) -> Float[Tensor, "B H Tr D"]:
        """Attention of this rank's queries over all ranks' keys, causal.

        Raises:
            ValueError: a mask; query heads that do not divide over the ranks.
        """
        p = self.comm.size
        H = q.shape[1]
        K = k.shape[1]
        if mask is not None:
            raise ValueError(
                "mask must be None: after the exchange attention is plain causal"
                " attention, which keeps no documents apart"
            )
        if H % p:
            raise ValueError(f"{H} query heads must be a multiple of the {p} ranks")
        if K % p:
            # several ranks get a copy of a head; autograd sums the copies' gradients
            copies = p // math.gcd(K, p)
            k = k.repeat_interleave(copies, dim=1)  # (B, lcm(K, p), Tr, D)
            v = v.repeat_interleave(copies, dim=1)
        q = _ToHeads.apply(q, self.comm, self.lengths)  # (B, H/p, T, D)
        k = _ToHeads.apply(k, self.comm, self.lengths)
        v = _ToHeads.apply(v, self.comm, self.lengths)
        out = self.attention(q, k, v, None)
        return _ToTokens.apply(out, self.comm, self.lengths)  # (B, H, Tr, D)
