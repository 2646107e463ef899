"""Where A and B start, and whether the base's own directions are taken out for it.

    default, gaussian   A random, B = 0: ΔW = 0 (Hu et al. 2021)
    pissa               the r largest singular directions of W₀: (α/r) B A = U S Vᵀ
                        (Meng et al. 2024, https://arxiv.org/abs/2404.02948)
    olora               the first r columns of Q and rows of R of W₀ = Q R
                        (Büyükakyüz 2024, https://arxiv.org/abs/2406.01775)

With the last two B A is not 0 at the start, and what it is leaves the base: what is
frozen is W₀ − (α/r) B₀ A₀. `peft` writes that into the base's weight, and computes it
anew whenever the folder is opened. Here the base stays, and the layer subtracts the
start: ΔW = (α/r)(B A − B₀ A₀).

    W₀ (d, k)  frozen weight         A, A₀ (r, k)         B, B₀ (d, r)
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

PAIR = tuple[Float[Tensor, "r k"], Float[Tensor, "d r"]]
MOVED = ("pissa", "olora")  # B A is not 0 at the start
STARTS = ("default", "gaussian", *MOVED)


def start(
    kind: str,
    linear: nn.Linear,
    r: int,
    scaling: float,
    generator: torch.Generator | None = None,
) -> PAIR:
    """(A, B) of a new adapter, in fp32 or better, on the device of the weight.

    Args:
        kind: one of `STARTS`.
        scaling: α/r; what B A is multiplied by.

    Raises:
        ValueError: as `check`.
    """
    check(kind, linear, r)
    d, k = linear.out_features, linear.in_features
    if kind == "pissa":
        return pissa(float_weight(linear), r, scaling)
    if kind == "olora":
        return olora(float_weight(linear), r)
    dtype = torch.promote_types(linear.weight.dtype, torch.float32)
    like = {"dtype": dtype, "device": linear.weight.device}
    A = torch.empty(r, k, **like)
    if kind == "gaussian":
        nn.init.normal_(A, std=1 / r, generator=generator)  # as in peft
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
    return A, torch.zeros(d, r, **like)


def check(kind: str, linear: nn.Linear, r: int) -> None:
    """Raises: ValueError: the start is read off W₀, which has fewer than r directions
    or is quantised."""
    if kind not in MOVED:
        return
    directions = min(linear.out_features, linear.in_features)
    if r > directions:
        raise ValueError(
            f"r={r} with init={kind!r}: a {linear.out_features} × {linear.in_features}"
            f" weight has {directions} directions"
        )
    is_float(linear)


def is_float(linear: nn.Linear) -> None:
    """Raises: ValueError: its weight is quantised, by another than our own 4 bits."""
    if not hasattr(linear, "dequantized") and not linear.weight.is_floating_point():
        raise ValueError(
            f"the weight of a {type(linear).__name__} is {linear.weight.dtype}: PiSSA,"
            " OLoRA and DoRA read the base's weights, so dequantise it first"
        )


def float_weight(linear: nn.Linear) -> Float[Tensor, "d k"]:
    """W₀ in fp32 or better, without gradient; of our 4-bit linears what they stand for.

    Raises:
        ValueError: as `is_float`.
    """
    is_float(linear)
    if hasattr(linear, "dequantized"):
        linear = linear.dequantized()
    W = linear.weight.detach()
    return W.to(torch.promote_types(W.dtype, torch.float32))


def pissa(W: Float[Tensor, "d k"], r: int, scaling: float) -> PAIR:
    """The r largest singular directions of W, shared evenly by A and B.

    scaling · B A is the best approximation of W by a matrix of rank r.
    """
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[:r] / scaling).sqrt()  # (r,)
    return root[:, None] * Vh[:r], U[:, :r] * root


def olora(W: Float[Tensor, "d k"], r: int) -> PAIR:
    """The first r rows of R and columns of Q, where W = Q R."""
    Q, R = torch.linalg.qr(W)
    return R[:r].clone(), Q[:, :r].clone()
