"""The vocabulary split over ranks: an embedding and a cross-entropy that never meet a
whole row of logits.

Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3. Rank r holds rows
r·V/p … (r+1)·V/p of the embedding and of the output projection. Gathering the logits
would send b·s·V numbers; the loss needs three numbers a token:

    m = max over all ranks of max_j z_j        s = Σ over all ranks of Σ_j exp(z_j − m)
                                               loss = log s + (m − z_target)
    dz_j = exp(z_j − m) / s − [j = target]     (no communication)

    N  tokens      V  vocabulary      p  ranks      Vp = ⌈V/p⌉  rows a rank; the last
                                                    rank's are padded and masked
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.parallelism.runtime import Communicator
from llmlab.parallelism.tensor.fg import sum_over_ranks


def rows_per_rank(vocab_size: int, p: int) -> int:
    """⌈V/p⌉: every rank holds as many rows, so the vocabulary is padded to a multiple
    of p.
    """
    return -(-vocab_size // p)


class VocabParallelEmbedding(nn.Module):
    """Looks up the tokens that this rank has, gives zeros for the others, and sums over
    ranks (g).
    """

    def __init__(self, weight: Float[Tensor, "Vp d"], comm: Communicator) -> None:
        super().__init__()
        self.weight, self.comm = nn.Parameter(weight), comm

    def forward(self, tokens: Int[Tensor, " ..."]) -> Float[Tensor, "... d"]:
        """Embeddings of all tokens, on every rank."""
        local, inside = _localize(tokens, len(self.weight), self.comm.rank)
        return sum_over_ranks(
            F.embedding(local, self.weight) * inside[..., None], self.comm
        )


def _localize(tokens: Tensor, rows: int, rank: int) -> tuple[Tensor, Tensor]:
    """Row numbers on this rank (0 where the row is elsewhere), and which rows are
    here.
    """
    local = tokens - rank * rows
    inside = (local >= 0) & (local < rows)
    return local.where(inside, torch.zeros_like(local)), inside


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        logits: Float[Tensor, "N Vp"],
        targets: Int[Tensor, " N"],
        comm: Communicator,
        vocab_size: int,
    ) -> Tensor:
        rows, rank = logits.shape[-1], comm.rank
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))  # at least fp32
        column = rank * rows + torch.arange(rows, device=z.device)
        # the padding of an uneven vocabulary
        z = z.masked_fill(column >= vocab_size, -torch.inf)
        # the maximum of all ranks, not of this one
        m = comm.all_reduce(z.amax(-1), op="max")
        e = (z - m[:, None]).exp()
        local, inside = _localize(targets, rows, rank)
        z_target = (
            z.gather(1, local[:, None]).squeeze(1).where(inside, torch.zeros_like(m))
        )
        # both sums in one message
        s, z_target = comm.all_reduce(torch.stack([e.sum(-1), z_target]))
        ctx.save_for_backward(e / s[:, None], local, inside)
        ctx.dtype = logits.dtype
        return s.log() + (m - z_target)

    @staticmethod
    def backward(ctx, grad: Float[Tensor, " N"]):
        softmax, local, inside = ctx.saved_tensors
        dz = softmax.clone()
        dz[torch.arange(len(dz), device=dz.device), local] -= inside.to(dz.dtype)
        return (dz * grad[:, None]).to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(
    logits: Float[Tensor, "... Vp"],
    targets: Int[Tensor, " ..."],
    comm: Communicator,
    vocab_size: int,
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    """Mean cross-entropy, in fp32, over the targets that are not `ignore_index`, from
    this rank's slice of the logits.

    Sends 3 numbers a token in 2 all-reduces, and nothing backward.

    Raises:
        ValueError: the slices do not add up to ⌈V/p⌉ columns; a target outside the
            vocabulary.
    """
    rows, p = logits.shape[-1], comm.size
    if rows != rows_per_rank(vocab_size, p):
        raise ValueError(
            f"logits have {rows} columns; vocab_size={vocab_size} over {p} ranks makes"
            f" ⌈V/p⌉ = {-(-vocab_size // p)}"
        )
    z, t = logits.reshape(-1, rows), targets.reshape(-1)
    keep = t != ignore_index
    if ((t < 0) | (t >= vocab_size))[keep].any():
        raise ValueError(
            f"targets must lie in 0 … {vocab_size - 1} or be"
            f" ignore_index={ignore_index}"
        )
    losses = _CrossEntropy.apply(z[keep], t[keep], comm, vocab_size)
    return losses.sum() / keep.sum()
