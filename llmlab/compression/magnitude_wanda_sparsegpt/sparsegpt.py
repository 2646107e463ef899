"""SparseGPT: weights are pruned column by column, and those to come make up for it.

Frantar & Alistarh 2023, https://arxiv.org/abs/2301.00774, algorithm 1. For a given mask
the best that the kept weights of a row can do is a least-squares problem of its own, as
each row keeps others: an inverse for each row, O(out · in³). SparseGPT lets only the
columns to the right make up for a weight. Then all rows share one H⁻¹, and what is
needed of it at column q is a row of U, its upper Cholesky factor: H⁻¹ = Uᵀ U.

    for q = 1 … in
        every B_s columns: M of the next B_s, so that the share s with the
            lowest w² / U_qq² goes, among all rows of the block together
        ŵ_q = w_q · M_q
        E_q = (w_q − ŵ_q) / U_qq
        w_j = w_j − E_q · U_qj               for all columns j > q

With N:M the mask of a group of M is chosen when its first column comes. So it is chosen
from weights that have made up for what was pruned before.

    W     weight, (out, in)            H    X Xᵀ, (in, in); a factor changes nothing
    Ŵ     the weight that is kept      M    mask, True where a weight is kept
    B     columns per lazy update      B_s  columns per choice of the mask
    E     errors over U_qq, (B, out)

The authors' code has one number for B and B_s. Here B is a matter of speed alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmlab.compression import quantization_basics as qb
from llmlab.compression.hessian import check, inverse_factor, without_dead
from llmlab.compression.magnitude_wanda_sparsegpt.config import PruneConfig, n_and_m
from llmlab.compression.magnitude_wanda_sparsegpt.masks import (
    from_matrix,
    n_of_m,
    obs_scores,
)


def sparsegpt(
    W: Float[Tensor, "out in"], H: Float[Tensor, "in in"], config: PruneConfig
) -> Float[Tensor, "out in"]:
    """Ŵ: W with zeros, and what is left updated for inputs X with H ~ X Xᵀ.

    Columns whose input was always 0 are set to 0.

    Raises:
        ValueError: W or H is not finite, H does not fit W or is all zeros, or M does
            not divide the columns.
    """
    check(W, H)
    W, H = without_dead(W, H)  # columns that nothing enters become 0
    columns = W.shape[1]
    size = config.mask_block
    if config.pattern:
        _, size = n_and_m(config.pattern)
        if columns % size:
            raise ValueError(f"m={size} must divide the columns, {columns}")
    U = inverse_factor(H, config.damping)
    scale, zero = row_scales(W, config)

    # From here on transposed, so that a column of W lies in one piece: (in, out).
    W = W.T.contiguous()
    W_hat = torch.empty_like(W)
    keep = torch.ones_like(W, dtype=torch.bool)
    for start in range(0, columns, config.block_size):
        stop = min(start + config.block_size, columns)
        block = W[start:stop].clone()  # (B, out), each error passed on at once
        E = torch.zeros_like(block)
        for q in range(start, stop):
            if q % size == 0:
                # as they are now: the errors of this block are not in W yet
                now = W[q : q + size] - U[start:stop, q : q + size].T @ E
                d = U.diagonal()[q : q + size]
                keep[q : q + size] = choose(now.T, d, config).T
            w = block[q - start]
            W_hat[q] = w.where(keep[q], 0.0)
            if config.grid is not None:
                codes = qb.quantize(W_hat[q], scale, zero, *config.grid.range)
                W_hat[q] = qb.dequantize(codes, scale, zero)
            E[q - start] = (w - W_hat[q]) / U[q, q]
            # the step of Optimal Brain Surgeon, for all rows at once
            block[q - start :].addr_(U[q, q:stop], E[q - start], alpha=-1)
        # lazily, for all columns after the block, in one product of matrices
        W[stop:] -= U[start:stop, stop:].T @ E
    return W_hat.T.contiguous()


def choose(
    now: Float[Tensor, "out columns"],
    d: Float[Tensor, "columns"],
    config: PruneConfig,
) -> Bool[Tensor, "out columns"]:
    """M of a few columns as they are now; d is their part of U's diagonal."""
    scores = obs_scores(now, d)
    if config.pattern:
        return n_of_m(scores, *n_and_m(config.pattern))
    return from_matrix(scores, config.sparsity)


def row_scales(
    W: Float[Tensor, "out in"], config: PruneConfig
) -> tuple[Tensor | None, Tensor | None]:
    """s and z of each row, from all its weights before one is pruned: (out,) each."""
    if config.grid is None:
        return None, None
    low, high = qb.RANGES[config.grid.calibration](W.float(), config.grid)
    scale, zero = qb.scale_and_zero(low, high, config.grid)  # (out, 1)
    return scale[:, 0].to(W.dtype), zero[:, 0].to(W.dtype)


def best_update(
    W: Float[Tensor, "out in"],
    keep: Bool[Tensor, "out in"],
    H: Float[Tensor, "in in"],
) -> Float[Tensor, "out in"]:
    """The weights within a mask that are nearest in output: least squares, row by row.

    With K the kept and P the pruned weights of a row, w_K + (H_KK)⁻¹ H_KP w_P. It costs
    O(out · in³), to learn from and to test against.
    """
    best = W.where(keep, 0.0)
    for row, kept, w in zip(best, keep, W, strict=True):
        if kept.any():
            H_kp = H[kept][:, ~kept]
            row[kept] += torch.linalg.solve(H[kept][:, kept], H_kp @ w[~kept])
    return best
