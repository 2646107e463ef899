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
        "this is the scale of 8 bits: take `bits` from the argument": (
            (high - low) / 255
        ),
        "this is the whole range: divide it by the steps, 2^b − 1": high - low,
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


Case = tuple[Tensor, int, list[float]]  # x, bits, candidates


def clips(cases: list[Case]) -> dict:
    """The candidates that mistaken searches choose, one for each case."""
    picks = {}
    for text, choose in WRONG_CHOICES.items():
        picks[text] = lambda choose=choose: [choose(*case) for case in cases]
    for text, (error, rounding) in WRONG_ERRORS.items():
        picks[text] = lambda error=error, rounding=rounding: [
            least(case, error, rounding) for case in cases
        ]
    return picks


def least(case: Case, error, rounding=torch.round) -> float:
    """The candidate with the least `error(x, codes before clamping, s, top)`."""
    x, bits, candidates = case
    top = 2 ** (bits - 1) - 1
    return min(
        candidates,
        key=lambda c: float(error(x, rounding(x / (c / top)), c / top, top)),
    )


def squared(x: Tensor, q: Tensor, s: float, top: int) -> Tensor:
    """What is asked for."""
    return (q.clamp(-top, top) * s - x).square().sum()


def at_first_rise(x: Tensor, bits: int, candidates: list[float]) -> float:
    """The last candidate before the error rises for the first time."""
    found = candidates[0]
    for c in candidates[1:]:
        if best(x, bits, [found, c]) == found:
            break
        found = c
    return found


def finer(levels) -> tuple:
    """The error with another number of levels above 0."""

    def error(x: Tensor, q: Tensor, s: float, top: int) -> Tensor:
        n = levels(top)
        step = s * top / n
        return (torch.round(x / step).clamp(-n, n) * step - x).square().sum()

    return error, torch.round


# what is said -> the error that is minimised, and how codes are rounded
WRONG_ERRORS = {
    "the codes are not clamped: without it the smallest range always wins": (
        lambda x, q, s, top: (q * s - x).square().sum(),
        torch.round,
    ),
    "the codes are clamped at −2^(b−1): the range is symmetric, ±(2^(b−1) − 1)": (
        lambda x, q, s, top: (q.clamp(-top - 1, top) * s - x).square().sum(),
        torch.round,
    ),
    "you used 2^b − 1 levels above 0: the largest code is 2^(b−1) − 1": finer(
        lambda top: 2 * top + 1
    ),
    "you used 2^(b−1) levels above 0: the largest code is 2^(b−1) − 1": finer(
        lambda top: top + 1
    ),
    "bits is not used: these are the levels of 4 bits": finer(lambda top: 7),
    "bits is not used: these are the levels of 8 bits": finer(lambda top: 127),
    "your errors are those of codes, in units of s: multiply the codes by s": (
        lambda x, q, s, top: (q.clamp(-top, top) - x / s).square().sum(),
        torch.round,
    ),
    "you compared the codes with x: multiply them by s first": (
        lambda x, q, s, top: (q.clamp(-top, top) - x).square().sum(),
        torch.round,
    ),
    "you took absolute errors: squared ones are asked": (
        lambda x, q, s, top: (q.clamp(-top, top) * s - x).abs().sum(),
        torch.round,
    ),
    "you took the largest error: the sum of squares is asked": (
        lambda x, q, s, top: (q.clamp(-top, top) * s - x).abs().max(),
        torch.round,
    ),
    "you took the fourth power of the errors: the second is asked": (
        lambda x, q, s, top: (q.clamp(-top, top) * s - x).pow(4).sum(),
        torch.round,
    ),
    "you divided each error by x: errors count as they are": (
        lambda x, q, s, top: (
            ((q.clamp(-top, top) * s - x) / x.abs().clamp(min=1e-3)).square().sum()
        ),
        torch.round,
    ),
    "you added errors without squaring them: they cancel": (
        lambda x, q, s, top: (q.clamp(-top, top) * s - x).sum(),
        torch.round,
    ),
    "you left out the values beyond c: clipping costs too": (
        lambda x, q, s, top: (
            (q.clamp(-top, top) * s - x)[x.abs() <= top * s].square().sum()
        ),
        torch.round,
    ),
    "that one has the largest error: the least is asked": (
        lambda x, q, s, top: -squared(x, q, s, top),
        torch.round,
    ),
    "the codes are rounded down: to the nearest is asked": (squared, torch.floor),
    "the codes are cut off: call torch.round": (squared, torch.trunc),
    "nothing is rounded": (squared, torch.clone),
}
WRONG_CHOICES = {
    "that is the largest candidate: compare the errors of all": (
        lambda x, bits, candidates: max(candidates)
    ),
    "that is the smallest candidate. Codes that are not clamped, or an x that is"
    " clipped before you compare, make the smallest range win always": (
        lambda x, bits, candidates: min(candidates)
    ),
    "that is the first candidate: compare all of them": (
        lambda x, bits, candidates: candidates[0]
    ),
    "that is the last candidate: compare all of them": (
        lambda x, bits, candidates: candidates[-1]
    ),
    "that is the second best": lambda x, bits, candidates: best(
        x, bits, [c for c in candidates if c != best(x, bits, candidates)]
    ),
    "you stop where the error rises for the first time: the candidates are in no"
    " order": at_first_rise,
    "the first candidate is never looked at": (
        lambda x, bits, candidates: best(x, bits, candidates[1:] or candidates)
    ),
    "the last candidate is never looked at": (
        lambda x, bits, candidates: best(x, bits, candidates[:-1] or candidates)
    ),
}


def best(x: Tensor, bits: int, candidates: list[float]) -> float:
    """The candidate with the least squared error."""
    return least((x, bits, candidates), squared)
