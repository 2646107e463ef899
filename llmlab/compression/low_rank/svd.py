"""A matrix as a product of two thin ones: the best for W, and the best for W X.

Eckart & Young 1936, https://doi.org/10.1007/BF02288367: with W = U Σ Vᵀ, no matrix of
rank r is nearer to W than its first r terms,

    min ‖W − A B‖²  =  Σ_{i>r} σ_i²        A = U_r Σ_r^½,  B = Σ_r^½ V_rᵀ

A layer needs W X, not W. SVD-LLM (Wang et al. 2024, https://arxiv.org/abs/2403.07378)
whitens the inputs first: S Sᵀ = X Xᵀ, so that ‖(W − A B) X‖ = ‖(W − A B) S‖, and

    W S = U Σ Vᵀ        A = U_r Σ_r^½,  B = Σ_r^½ V_rᵀ S⁻¹
    min ‖(W − A B) X‖²  =  Σ_{i>r} σ_i²

ASVD (Yuan et al. 2023, https://arxiv.org/abs/2312.05821) takes a diagonal S, a power of
each channel's mean |x|, and is near to this, not equal.

    W     weight, (out, in)        A     (out, r)       σ_i   singular values, falling
    X     inputs, (in, tokens)     B     (r, in)        S     lower Cholesky factor
    gram  X Xᵀ, (in, in)           r     rank           λ     damping, in mean diagonals

Σ^½ on both sides keeps the factors of one size, as in ZeroQuant-V2: both are stored in
few bits. Simplified: SVD-LLM's later update of A is left out.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Factors = tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]


def truncate(W: Float[Tensor, "out in"], rank: int) -> Factors:
    """A and B, whose product is the nearest to W of all matrices of this rank.

    Raises:
        ValueError: W is no finite matrix, or has no such rank.
    """
    check(W, rank)
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    root = sigma[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vt[:rank]


def whitening(
    gram: Float[Tensor, "in in"], damping: float = 0.0
) -> Float[Tensor, "in in"]:
    """S, lower triangular, of S Sᵀ = X Xᵀ after damping.

    Raises:
        ValueError: X Xᵀ has no such factor even with the damping.
    """
    share = damping * gram.diagonal().mean()
    damped = gram + share * torch.eye(len(gram), dtype=gram.dtype)
    S, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise ValueError(
            f"X Xᵀ has no Cholesky factor with damping={damping}: use more of it, or"
            " more tokens than the linear has inputs"
        )
    return S


def truncate_whitened(
    W: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    rank: int,
    damping: float = 0.0,
) -> Factors:
    """A and B, whose product changes W X least of all matrices of this rank.

    A factor in `gram` changes nothing.

    Raises:
        ValueError: as `truncate` and `whitening`, or `gram` does not fit W.
    """
    check(W, rank)
    if gram.shape != (W.shape[1], W.shape[1]):
        raise ValueError(
            f"gram has shape {tuple(gram.shape)}; for W of shape {tuple(W.shape)} it"
            " must be (in, in)"
        )
    check_finite("gram", gram)
    scale = gram.diagonal().mean()  # so that A and B keep the size of W's own factors
    if not scale > 0:
        raise ValueError("gram is all zeros: no input has entered this linear")
    S = whitening(gram / scale, damping).to(W.dtype)
    U, sigma, Vt = torch.linalg.svd(W @ S, full_matrices=False)
    root = sigma[:rank].sqrt()
    # B S = Σ_r^½ V_rᵀ, with S lower triangular
    B = torch.linalg.solve_triangular(
        S, root[:, None] * Vt[:rank], upper=False, left=False
    )
    return U[:, :rank] * root, B


def output_error(
    W: Float[Tensor, "out in"],
    W_hat: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
) -> float:
    """‖W X − Ŵ X‖² / ‖W X‖², from X Xᵀ alone."""
    W = W.to(gram.dtype)
    delta = W_hat.to(gram.dtype) - W
    return (((delta @ gram) * delta).sum() / ((W @ gram) * W).sum()).item()


def parameters(out: int, columns: int, rank: int) -> int:
    """Numbers in A and B."""
    return rank * (out + columns)


def break_even(out: int, columns: int) -> float:
    """The rank at which A and B hold as many numbers as W: mn / (m + n)."""
    return out * columns / (out + columns)


def rank_within(bits: float, out: int, columns: int, factor_bits: int = 16) -> int:
    """The largest rank whose factors take at most `bits` per weight of W.

    Raises:
        ValueError: not even rank 1 fits.
    """
    each = factor_bits * (out + columns) + factor_overhead(factor_bits)
    rank = int(bits * out * columns // each)
    if rank < 1:
        raise ValueError(
            f"bits={bits} must be at least {each / (out * columns):.3f} for rank 1 of a"
            f" weight of {out} × {columns}"
        )
    return min(rank, out, columns)


def factor_overhead(factor_bits: int) -> int:
    """Bits of the two float16 scales per rank, where factors are stored in 8 bits."""
    return 32 if factor_bits == 8 else 0


def check(W: Tensor, rank: int) -> None:
    """Raises: ValueError: W is no finite matrix, or has no such rank."""
    if W.dim() != 2:
        raise ValueError(f"W has shape {tuple(W.shape)}; it must be (out, in)")
    check_finite("W", W)
    if not 1 <= rank <= min(W.shape):
        raise ValueError(
            f"rank={rank} must be from 1 to {min(W.shape)} for W of shape"
            f" {tuple(W.shape)}"
        )


def check_finite(name: str, x: Tensor) -> None:
    """Raises: ValueError: the tensor called `name` holds NaN or ∞."""
    bad = int((~x.detach().isfinite()).sum())
    if bad:
        raise ValueError(f"{name} holds {bad} values that are NaN or infinite")
