"""Right and mistaken results for 06-compression/01-quantization-basics."""

from __future__ import annotations

import torch
from torch import Tensor

from llmlab.course.grading.checking import diagnose


def affine_scale(scale: float, low: float, high: float, bits: int) -> None:
    """Judge the scale of exercise 1."""
    mistakes = {
        "you divided by 2^b: 2^b levels have 2^b − 1 steps between them": (
            (high - low) / 2**bits
        ),
        (
            "this is the symmetric scale: the affine one divides the whole range by 2^b"
            " − 1"
        ): max(high, -low) / (2 ** (bits - 1) - 1),
        (
            "you divided by 2^(b−1) − 1, the largest signed code: here codes run up to"
            " 2^b − 1"
        ): (high - low) / (2 ** (bits - 1) - 1),
        "this is 1 / s: the scale is the size of a step": (2**bits - 1) / (high - low),
    }
    diagnose(
        scale, right=(high - low) / (2**bits - 1), mistakes=mistakes, what="the scale"
    )


def affine_zero(zero: int, low: float, high: float, s: float) -> None:
    """Judge the zero point of exercise 1."""
    mistakes = {
        (
            "the sign of the zero point is wrong: it is −x_min / s, and x_min is"
            " negative"
        ): round(low / s),
        "the zero point is cut off, not rounded": int(-low / s),
        "the zero point is the code of the number 0, from x_min: you used x_max": round(
            high / s
        ),
        (
            "the zero point is shifted by 2^(b−1), as for signed codes: here they run"
            " from 0"
        ): round(-low / s) - 8,
    }
    diagnose(zero, right=round(-low / s), mistakes=mistakes, what="the zero point")


def groups(W: Tensor, bits: int, g: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of exercise 2."""
    groups = W.unflatten(1, (-1, g))  # (out, in) -> (out, in / g, g)
    scale = groups.abs().amax(-1) / (2 ** (bits - 1) - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    codes = torch.round(groups / scale[..., None])
    return codes.flatten(1).long(), scale


def down_columns(W: Tensor) -> Tensor:
    """Scales of groups of 4 rows in each column, in the shape that is asked for."""
    return (W.unflatten(0, (-1, 4)).abs().amax(1) / 7).reshape(8, 3)


def product(
    X: Tensor, W: Tensor, scale_x, scale_w, rounding=torch.round, top: int = 127
) -> Tensor:
    """X Wᵀ through codes.

    Args:
        scale_x: the largest |x| that share a scale, from X; the scale is `top` times
            smaller. `scale_w` does the same for W.
    """
    s_x = scale_x(X) / top
    s_w = scale_w(W) / top
    X_back = rounding(X / s_x).double() * s_x.double()
    W_back = rounding(W / s_w).double() * s_w.double()
    return (X_back @ W_back.T).float()


def clips(x: Tensor, bits: int, candidates: list[float]) -> dict:
    """The candidates that mistaken searches choose."""
    top = 2 ** (bits - 1) - 1

    def back(c: float, largest: int = top) -> Tensor:
        """x after quantisation with the range −c … c."""
        s = c / largest
        return torch.round(x / s).clamp(-largest, largest) * s

    def free(c: float) -> Tensor:
        """The errors without the clamp."""
        return torch.round(x / (c / top)) * (c / top) - x

    def pick(error) -> float:
        return min(candidates, key=error)

    return {
        (
            "that is the largest candidate, and a smaller one has a smaller error: are"
            " your errors those of values, not of codes? s differs between candidates"
        ): max(candidates),
        "the codes are not clamped: without it the smallest range always wins": pick(
            lambda c: free(c).square().sum()
        ),
        "that one has the largest error: the least is asked": max(
            candidates, key=lambda c: (back(c) - x).square().sum()
        ),
        "you used 2^b − 1 levels above 0: the largest code is 2^(b−1) − 1": pick(
            lambda c: (back(c, 2 * top + 1) - x).square().sum()
        ),
        "you used 2^(b−1) levels above 0: the largest code is 2^(b−1) − 1": pick(
            lambda c: (back(c, top + 1) - x).square().sum()
        ),
        "you compared the codes with x: multiply them by s first": pick(
            lambda c: (back(c) / (c / top) - x).square().sum()
        ),
        "you took absolute errors: squared ones are asked": pick(
            lambda c: (back(c) - x).abs().sum()
        ),
        "you took the largest error: the sum of squares is asked": pick(
            lambda c: (back(c) - x).abs().max()
        ),
        "you added errors without squaring them: they cancel": pick(
            lambda c: (back(c) - x).sum()
        ),
        "you left out the values beyond c: clipping costs too": pick(
            lambda c: ((back(c) - x)[x.abs() <= c]).square().sum()
        ),
        "that is the smallest candidate: it clips nearly everything": min(candidates),
        "that is the first candidate: compare all of them": candidates[0],
    }


def best(x: Tensor, bits: int, candidates: list[float]) -> float:
    """The candidate with the least squared error."""
    top = 2 ** (bits - 1) - 1
    errors = []
    for c in candidates:
        s = c / top
        back = torch.round(x / s).clamp(-top, top) * s
        errors.append((back - x).square().sum())
    return candidates[int(torch.stack(errors).argmin())]
