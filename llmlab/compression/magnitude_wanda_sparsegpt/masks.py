"""Which weights go: a score for each weight, and a mask that drops the lowest.

The loss of outputs when one weight w_ij of a linear is set to 0, for inputs X:

    magnitude  |w_ij|                 as if all inputs were alike
    Wanda      |w_ij| · ‖X_j‖₂        its square is the loss, if nothing else changes
    OBS        w_ij² / [H⁻¹]_jj       the loss, if all other weights make up for it

Wanda: Sun et al. 2023, https://arxiv.org/abs/2306.11695, equation 1; weights are
compared within a row, which makes one output. OBS, Optimal Brain Surgeon, is Hassibi &
Stork 1992; SparseGPT asks for it with the columns before j already fixed, and then
[H⁻¹]_jj is U_jj², from the Cholesky factor.

    W     weight, (out, in)            X_j  all inputs of channel j, (tokens,)
    M     mask: True where the weight is kept; the pruned weight is W · M
    s     sparsity: the share of weights that go
    N:M   N of each M neighbours in a row are kept

Libraries count N:M otherwise: N are pruned. That is the same for 2:4 and 4:8.

Of equal scores those that come first go, in the order of rows: so a mask has exactly as
many zeros as was said, whatever the weights.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Scores ------------------------------------------------------------------------------


def wanda_scores(
    W: Float[Tensor, "out in"], norm: Float[Tensor, "in"]
) -> Float[Tensor, "out in"]:
    """|w_ij| · ‖X_j‖₂."""
    return W.abs() * norm


def obs_scores(
    W: Float[Tensor, "out columns"], d: Float[Tensor, "columns"]
) -> Float[Tensor, "out columns"]:
    """w_ij² / U_jj², where d is the diagonal of U, H⁻¹ = Uᵀ U."""
    return (W / d).square()


# Masks -------------------------------------------------------------------------------


def pruned_count(n: int, sparsity: float) -> int:
    """⌊n · s⌋, with s as it is written: 29 of 100 for 0.29.

    As floats, 100 · 0.29 is a little less than 29.
    """
    return math.floor(n * Fraction(str(sparsity)))


def keep_best(scores: Float[Tensor, "... n"], count: int) -> Bool[Tensor, "... n"]:
    """False for the `count` lowest of the last dimension; of equal ones the first."""
    order = scores.argsort(dim=-1, stable=True)
    keep = torch.ones_like(scores, dtype=torch.bool)
    return keep.scatter_(-1, order[..., :count], False)


def from_each_row(
    scores: Float[Tensor, "out in"], sparsity: float
) -> Bool[Tensor, "out in"]:
    """⌊in · s⌋ weights of each row go."""
    return keep_best(scores, pruned_count(scores.shape[-1], sparsity))


def from_matrix(
    scores: Float[Tensor, "out in"], sparsity: float
) -> Bool[Tensor, "out in"]:
    """⌊out · in · s⌋ weights of the matrix go, wherever they are."""
    flat = keep_best(scores.flatten(), pruned_count(scores.numel(), sparsity))
    return flat.reshape(scores.shape)  # (out · in,) → (out, in)


def n_of_m(scores: Float[Tensor, "out in"], n: int, m: int) -> Bool[Tensor, "out in"]:
    """N of each M neighbours in a row are kept.

    Raises:
        ValueError: M does not divide the columns, or N is not between 0 and M.
    """
    if not 0 <= n <= m or m < 1:
        raise ValueError(f"n={n} must lie between 0 and m={m}, and m be at least 1")
    if scores.shape[-1] % m:
        raise ValueError(f"m={m} must divide the columns, {scores.shape[-1]}")
    groups = scores.unflatten(-1, (-1, m))  # (out, in) → (out, in / m, m)
    return keep_best(groups, m - n).flatten(-2)  # → (out, in)
