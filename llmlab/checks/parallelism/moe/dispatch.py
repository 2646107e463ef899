"""What is wrong with a dispatch: the rows that each usual mistake brings home."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.course.grading.checking import close, diagnose


def check_dispatch(
    got: Tensor,
    xs: list[Tensor],
    chosen: list[Tensor],
    weights: Tensor,
    r: int,
    what: str,
) -> None:
    """The rows on rank r, against each row through its own expert."""
    through = lambda x, c: F.silu(torch.einsum("nd,nde->ne", x, weights[c]))  # noqa: E731
    x, mine, E, p = xs[r], chosen[r], len(weights), len(xs)
    right = through(x, mine)
    if close(got, right, 1e-4):
        return
    owner = mine // (E // p)
    by_owner, by_expert = owner.argsort(stable=True), mine.argsort(stable=True)
    here = (owner == r)[:, None]
    diagnose(
        got,
        right=right,
        mistakes={
            "the rows came home sorted by rank: put each back in its place, out[order] = back": right[
                by_owner
            ],
            "the rows came home sorted by expert: put each back in its place, out[order] = back": right[
                by_expert
            ],
            "the rows were put back with the wrong permutation: out[order] = back, not back[order]": right[
                by_owner
            ][by_owner],
            "only the rows whose expert is here were computed": right * here,
            "rows whose expert is elsewhere came back as they were": torch.where(
                here, right, x
            ),
            "nothing was computed: the rows came back as they were": x,
            "silu and the product with the weights were applied twice": through(
                right, mine
            ),
            "the numbers of the experts and the rows are in different orders: sort both": through(
                x[by_owner], mine
            )[by_owner.argsort()],
        },
        tol=1e-4,
        what=what,
    )
