"""Who has which tokens, when a sequence is cut over ranks; and a loss that the cut does
not change.

Every rank holds the whole model and some of the tokens (NVIDIA and Meta call it context
parallelism). What is cut is data, a list with one tensor of positions for each rank, in
any order and of any lengths:

    contiguous   rank r has one stretch                    0 1 2 | 3 4 5 | …
                                                           Liu et al. 2023 (Ring
                                                           Attention)
    zigzag       rank r has pieces r and 2p−1−r of 2p      0 7 | 1 6 | 2 5 | 3 4
                                                           Llama Team 2024, section
                                                           3.3.2
    striped      rank r has every p-th token               0 4 8 | 1 5 9 | …
                                                           Brandon et al. 2023 (Striped
                                                           Attention)

Under a causal mask late tokens look at more than early ones, so a contiguous cut gives
the last rank the most to do.

    T  tokens      p  ranks      Tr  tokens of this rank
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlab.parallelism.runtime import Communicator
from llmlab.parallelism.tensor import sum_over_ranks

LAYOUTS = ("contiguous", "zigzag", "striped")


def shards(T: int, p: int, layout: str = "zigzag") -> list[Int[Tensor, " Tr"]]:
    """The positions of each rank's tokens. T need not be a multiple of p: then some
    ranks have one or two tokens more.

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
    every = torch.arange(T)
    if layout == "striped":
        return [every[r::p] for r in range(p)]
    cut = every.tensor_split(pieces)
    return (
        list(cut)
        if layout == "contiguous"
        else [torch.cat([cut[r], cut[2 * p - 1 - r]]) for r in range(p)]
    )


def schedule(cut: list[Tensor], causal: bool = True) -> list[tuple[int, int, int, int]]:
    """Ring attention as data: (rank, step, whose keys are here, query-key pairs that
    attend).

    In step s rank r holds the keys of rank r − s. A pair attends if the key is not
    later than the query.
    """
    p, plan = len(cut), []
    for r in range(p):
        for step in range(p):
            source = (r - step) % p
            pairs = len(cut[r]) * len(cut[source])
            if causal:
                keys = cut[source].sort().values
                # keys ≤ query
                pairs = int(
                    torch.searchsorted(keys, cut[r].contiguous(), right=True).sum()
                )
            plan.append((r, step, source, pairs))
    return plan


def take(x: Tensor, cut: list[Tensor], rank: int, dim: int = 1) -> Tensor:
    """The tokens of one rank, from all of them."""
    return x.index_select(dim, cut[rank].to(x.device))


def join(x: Tensor, cut: list[Tensor], comm: Communicator, dim: int = 1) -> Tensor:
    """All tokens in the order of their positions, on every rank, from each rank's own:
    `take` undone (no gradient).
    """
    return comm.all_gather(x, dim=dim).index_select(
        dim, torch.cat(cut).argsort().to(x.device)
    )


def split_loss(
    logits: Float[Tensor, "B Tr V"],
    targets: Int[Tensor, "B Tr"],
    comm: Communicator,
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    """The mean cross-entropy over *all* ranks' targets, the same on every rank; its
    gradient is this rank's part.

    The sum is divided by the number of targets in the world: the mean of the ranks'
    means would weigh a token of a short shard more.
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
    """Sum every parameter's gradient over ranks, in place, in one all-reduce: each rank
    has seen its own tokens only.
    """
    grads = [w.grad for w in model.parameters() if w.grad is not None]
    total = comm.all_reduce(torch.cat([g.flatten() for g in grads]))
    for g, piece in zip(grads, total.split([g.numel() for g in grads]), strict=True):
        g.copy_(piece.view_as(g))
