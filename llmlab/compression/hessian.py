"""H = X Xᵀ of a linear's inputs: what GPTQ and SparseGPT ask of it.

W     weight, (out, in)            X    inputs, (in, tokens)
H     X Xᵀ, (in, in); a factor in it changes nothing
U     upper Cholesky factor of the inverse: H⁻¹ = Uᵀ U
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from llmlab.compression.calibration import check_finite


def inverse_factor(
    H: Float[Tensor, "in in"], damping: float = 0.01
) -> Float[Tensor, "in in"]:
    """U, upper triangular, of H⁻¹ = Uᵀ U, after damping.

    Row q of U is, but for a factor, row q of the inverse of H without what stands
    before q.

    Raises:
        ValueError: H is not positive definite even with the damping.
    """
    diagonal = H.diagonal().mean() * damping
    damped = H + diagonal * torch.eye(len(H), dtype=H.dtype)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        inverse = torch.cholesky_inverse(lower)
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    if failed:
        raise ValueError(
            f"H has no inverse with damping={damping}: use more of it, or more tokens"
            " than the linear has inputs"
        )
    return upper


def without_dead(
    W: Float[Tensor, "out in"], H: Float[Tensor, "in in"]
) -> tuple[Float[Tensor, "out in"], Float[Tensor, "in in"]]:
    """Copies of W and H, both in H's dtype, where dead columns do no harm.

    Nothing enters a dead column, so that H has no say: its weights are set to 0, and a
    1 on the diagonal keeps H invertible.
    """
    W = W.detach().to(H.dtype, copy=True)
    H = H.clone()
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    return W, H


def output_error(
    W: Float[Tensor, "out in"],
    W_hat: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
) -> float:
    """‖W X − Ŵ X‖² / ‖W X‖², from X Xᵀ alone."""
    W = W.to(gram.dtype)
    delta = W_hat.to(gram.dtype) - W
    return (((delta @ gram) * delta).sum() / ((W @ gram) * W).sum()).item()


def check(W: Tensor, H: Tensor) -> None:
    """Raises: ValueError: W and H cannot be worked with; which, and why."""
    if W.dim() != 2 or H.shape != (W.shape[1], W.shape[1]):
        raise ValueError(
            f"H has shape {tuple(H.shape)}; for W of shape {tuple(W.shape)} it must be"
            " (in, in)"
        )
    check_finite("W", W)
    check_finite("H", H)
    if not H.any():
        raise ValueError("H is all zeros: no input has entered this linear")
    if not W.any():
        raise ValueError("W is all zeros: there is nothing to compress")
