"""Which rank has which tokens of a sequence, and a loss over the tokens of all ranks.

Every rank holds the whole model and some of the tokens (NVIDIA and Meta call it context
parallelism). A cut is data, a list with one tensor of positions per rank, in any order
and of any lengths:

    contiguous   rank r has one stretch                  0 1 2 | 3 4 5 | …
                 Liu et al. 2023 (Ring Attention)
    zigzag       rank r has pieces r and 2p−1−r of 2p    0 7 | 1 6 | 2 5 | 3 4
                 Llama Team 2024, section 3.3.2
    striped      rank r has every p-th token             0 4 8 | 1 5 9 | …
                 Brandon et al. 2023 (Striped Attention)

Under a causal mask late tokens look at more than early ones, so a contiguous cut gives
the last rank the most work.

    T   tokens
    p   ranks; r is one of them
    Tr  tokens of this rank
    B   batch
    V   vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.parallelism.runtime import Communicator
from llmlab.parallelism.tensor import sum_over_ranks

LAYOUTS = ("contiguous", "zigzag", "striped")


def shards(T: int, p: int, layout: str = "zigzag") -> list[Int[Tensor, " Tr"]]:
    """The positions of each rank's tokens.

    T need not be a multiple of p: then some ranks have one or two tokens more.

    Raises:
        ValueError: an unknown layout, or too few tokens for every rank (every piece) to
            get one.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be one of {', '.join(LAYOUTS)}")
    pieces = 2 * p if layout == "zigzag" else p
    if pieces > T:
        raise ValueError(
            f"T={T} tokens do not make {pieces} pieces: a {layout} cut over {p} ranks"
            f" needs T ≥ {pieces}"
        )
    positions = torch.arange(T)
    if layout == "striped":
        return [positions[r::p] for r in range(p)]
    piece = positions.tensor_split(pieces)
    if layout == "contiguous":
        return list(piece)
    # zigzag: an early piece and its mirror, a late one
    return [torch.cat([piece[r], piece[2 * p - 1 - r]]) for r in range(p)]


def schedule(cut: list[Tensor], causal: bool = True) -> list[tuple[int, int, int, int]]:
    """Ring attention as data: (rank, step, source, query-key pairs that attend).

    In step s rank r has the keys of rank r − s, the source. A pair attends if the key
    is not later than the query.
    """
    p = len(cut)
    plan = []
    for r in range(p):
        for step in range(p):
            source = (r - step) % p
            if causal:
                pairs = _causal_pairs(cut[r], cut[source])
            else:
                pairs = len(cut[r]) * len(cut[source])
            plan.append((r, step, source, pairs))
    return plan


def _causal_pairs(q_pos: Int[Tensor, " T"], k_pos: Int[Tensor, " S"]) -> int:
    """How many (query, key) have key ≤ query."""
    sorted_keys = k_pos.sort().values
    keys_seen = torch.searchsorted(sorted_keys, q_pos.contiguous(), right=True)
    return int(keys_seen.sum())


def take(x: Tensor, cut: list[Tensor], rank: int, dim: int = 1) -> Tensor:
    """The tokens of one rank, from all of them."""
    return x.index_select(dim, cut[rank].to(x.device))


def join(x: Tensor, cut: list[Tensor], comm: Communicator, dim: int = 1) -> Tensor:
    """All tokens in the order of their positions, on every rank: `take` undone.

    No gradient passes through it.
    """
    in_rank_order = comm.all_gather(x, dim=dim)
    order = torch.cat(cut).argsort().to(x.device)
    return in_rank_order.index_select(dim, order)


def split_loss(
    logits: Float[Tensor, "B Tr V"],
    targets: Int[Tensor, "B Tr"],
    comm: Communicator,
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    """The mean cross-entropy over *all* ranks' targets, the same on every rank.

    Its gradient is this rank's part. The sum is divided by the number of all ranks'
    targets: in the mean of the ranks' means, a token of a short shard would count more.
    """
    total = F.cross_entropy(
        logits.flatten(0, 1),
        targets.flatten(),
        ignore_index=ignore_index,
        reduction="sum",
    )
    count = comm.all_reduce((targets != ignore_index).sum())
    return sum_over_ranks(total, comm) / count


def sum_gradients(model: nn.Module, comm: Communicator) -> None:
    """Sum every parameter's gradient over ranks, in place, in one all-reduce.

    Each rank has seen its own tokens only.
    """
    sum_over_ranks_in_place([w.grad for w in model.parameters()], comm)


def sum_over_ranks_in_place(grads: Iterable[Tensor | None], comm: Communicator) -> None:
    """Sum gradients over ranks, all of them in one message; None is skipped."""
    present = [grad for grad in grads if grad is not None]
    total = comm.all_reduce(torch.cat([grad.flatten() for grad in present]))
    pieces = total.split([grad.numel() for grad in present])
    for grad, piece in zip(present, pieces, strict=True):
        grad.copy_(piece.view_as(grad))


def check_positions(position_ids: Int[Tensor, "B Tr"], own: Int[Tensor, " Tr"]) -> None:
    """Compare the positions that a model turns by with those of this rank's tokens.

    Args:
        own: this rank's positions, as the cut has them.

    Raises:
        ValueError: they differ.
    """
    given = position_ids.to(own.device)  # (B, Tr) or (1, Tr)
    if given.shape[-1] != len(own):
        differs = f"are {given.shape[-1]} numbers for this rank's {len(own)} tokens"
    elif not (wrong := given != own).any():
        return
    else:
        row, i = wrong.nonzero()[0].tolist()
        differs = f"put token {i} at {given[row, i]}, but it stands at {own[i]}"
    raise ValueError(
        f"position_ids {differs}: call the model with position_ids=cut[rank][None]."
        " Positions that start anew (packed documents) are not supported: attention"
        " over a cut sequence does not keep documents apart"
    )
