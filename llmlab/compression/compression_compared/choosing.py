"""Who is not beaten, and who is best within a budget.

One point *dominates* another if it is at least as good in every coordinate and better
in one (Pareto). What nobody dominates is the front: whatever you value, your choice is
on it. Equal points do not dominate each other.

    n   points, methods say        k   coordinates: bytes, loss, seconds …
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def pareto(
    points: Float[Tensor, "n k"], larger: Sequence[int] = ()
) -> Bool[Tensor, "n"]:
    """True for each point that none dominates; smaller is better.

    Args:
        larger: coordinates of which larger is better, an accuracy say.
    Raises:
        ValueError: wrong shape, a NaN, or a coordinate that is not there.
    """
    if points.dim() != 2:
        raise ValueError(
            f"points has shape {tuple(points.shape)}; it must be (n, k), a point a row"
        )
    if points.isnan().any():
        raise ValueError("points holds NaN, which is neither better nor worse")
    sign = torch.ones(points.shape[1], dtype=points.dtype)
    for k in larger:
        if k not in range(points.shape[1]):
            raise ValueError(
                f"larger={tuple(larger)}: there is no coordinate {k!r} among"
                f" {points.shape[1]}"
            )
        sign[k] = -1
    costs = points * sign
    # [i, j]: i is at least as good as j everywhere, and somewhere better
    no_worse = (costs[:, None] <= costs).all(-1)
    better = (costs[:, None] < costs).any(-1)
    return ~(no_worse & better).any(0)


def best_within(
    size: Float[Tensor, "n"], loss: Float[Tensor, "n"], budget: float
) -> int | None:
    """The place of the smallest loss among those of at most `budget`; of equals the
    smaller. None where nothing fits.
    """
    fits = [i for i in range(len(size)) if size[i] <= budget]
    if not fits:
        return None
    return min(fits, key=lambda i: (float(loss[i]), float(size[i])))


def combined(first: float, second: float) -> float:
    """The standard error of a difference of two independent measurements."""
    return (first**2 + second**2) ** 0.5
