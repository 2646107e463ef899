"""What is wrong with a dispatch: the rows that each usual mistake returns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.course.grading.checking import Mistake, close, diagnose


def check_dispatch(
    got: Tensor,
    xs: list[Tensor],
    chosen: list[Tensor],
    weights: Tensor,
    r: int,
    what: str,
) -> None:
    """Compare the rows that returned to rank r with each row through its own expert.

    Args:
        xs: the rows of every rank.
        chosen: for every rank, the expert of each row.
        weights: one (d, d) matrix per expert.
    """

    def through(rows: Tensor, experts: Tensor) -> Tensor:
        # n: row, d: input, e: output
        return F.silu(torch.einsum("nd,nde->ne", rows, weights[experts]))

    x = xs[r]
    experts = chosen[r]
    right = through(x, experts)
    if close(got, right, 1e-4):
        return
    experts_per_rank = len(weights) // len(xs)
    owner = experts // experts_per_rank
    by_owner = owner.argsort(stable=True)
    by_expert = experts.argsort(stable=True)
    here = (owner == r)[:, None]
    every = torch.cat([through(a, c) for a, c in zip(xs, chosen, strict=True)])
    _known_rows(got, right, every)
    diagnose(
        got,
        right=right,
        mistakes={
            (
                "the rows came home sorted by rank: put each back in its place,"
                " out[order] = back"
            ): right[by_owner],
            (
                "the rows came home sorted by expert: put each back in its place,"
                " out[order] = back"
            ): right[by_expert],
            (
                "the rows were put back with the wrong permutation: out[order] = back,"
                " not back[order]"
            ): right[by_owner][by_owner],
            "only the rows whose expert is here were computed": right * here,
            "rows whose expert is elsewhere came back as they were": torch.where(
                here, right, x
            ),
            "nothing was computed: the rows came back as they were": x,
            "x was added to the results: they alone are asked": x + right,
            (
                "every row went through the first expert of the rank: send the numbers"
                " of the experts, too"
            ): through(x, owner * experts_per_rank),
            "silu and the product with the weights were applied twice": through(
                right, experts
            ),
            (
                "the numbers of the experts and the rows are in different orders: sort"
                " both"
            ): through(x[by_owner], experts)[by_owner.argsort()],
        },
        tol=1e-4,
        what=what,
    )


def _known_rows(got: Tensor, right: Tensor, every: Tensor) -> None:
    """A Mistake when each row is somebody's result, and not only this rank's mixed."""
    far = torch.cdist(got.double(), every.double(), p=torch.inf)
    own = torch.cdist(got.double(), right.double(), p=torch.inf)
    if far.numel() and (far.amin(1) < 1e-4).all() and (own.amin(1) > 1e-4).any():
        raise Mistake(
            "each row is right, but another rank's is among them: results go back to"
            " the rank that their rows came from, in the order in which they came"
        )
