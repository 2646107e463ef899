"""Calibration: from what a tensor held, the range that its 8-bit codes shall cover.

Migacz 2017, "8-bit inference with TensorRT" (GTC, S7310). One scale s for the whole
tensor and no zero point; what lies beyond the threshold T is clipped:

    q = clamp(⌊x / s⌉, −q_max, q_max)      x̂ = s q      s = T / q_max

A small T gives small steps and clips much, a large T the other way round. Calibrators
choose T from a histogram of |x|, and nothing else:

    max          the largest |x|: nothing is clipped
    percentile   p% of the values lie below
    entropy      the histogram, put into 128 levels, tells least about the difference
    mse          the smallest mean of (x − x̂)²

    c      counts of the bins, (B,); bin j holds j w ≤ |x| < (j + 1) w
    w      width of a bin
    i      bins that are kept by a candidate: T = i w
    L      levels of a code without its sign, 128 for 8 bits
    P, Q   the histogram with all that is clipped in its last bin; that of L levels

FP8 has as many codes, but most of them near zero: a wide range costs it little, so its
calibration is the maximum: s = T / 448 (E4M3) or T / 57344 (E5M2).

Simplified: bins for |x| and no zero point, as in TensorRT. `entropy_two_sided` is what
ONNX Runtime makes of the same idea.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Real
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """Numbers of 8 bits.

    Attributes:
        largest: what a code holds at most.
        dtype: in which codes are stored.
    """

    name: str
    largest: float
    dtype: torch.dtype

    def codes(self, x: Tensor, scale: Tensor | float) -> Tensor:
        """x in units of the scale, rounded to what the format has, as floats."""
        scaled = (x / scale).clamp(-self.largest, self.largest)
        if self.dtype == torch.int8:
            return scaled.round()
        return scaled.to(self.dtype).to(x.dtype)

    def fake(self, x: Tensor, scale: Tensor | float) -> Tensor:
        """x̂: quantised, and back again."""
        return self.codes(x, scale) * scale


FORMATS = {
    "int8": Format("int8", 127.0, torch.int8),
    "e4m3": Format("e4m3", 448.0, torch.float8_e4m3fn),
    "e5m2": Format("e5m2", 57344.0, torch.float8_e5m2),
}


def format_of(name: str) -> Format:
    """The format of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in FORMATS:
        raise ValueError(f"format={name!r} must be one of {', '.join(FORMATS)}")
    return FORMATS[name]


@dataclass(frozen=True)
class Histogram:
    """How often |x| fell into each bin.

    Attributes:
        counts: c.
        width: w.
        largest: the largest |x|, which lies in the last bin.
    """

    counts: Real[Tensor, "B"]
    width: float
    largest: float

    @property
    def centres(self) -> Float[Tensor, "B"]:
        return (torch.arange(len(self.counts), dtype=torch.float64) + 0.5) * self.width


def absolute_max(tensors: Iterable[Tensor]) -> float:
    """The largest |x| of all tensors.

    Raises:
        ValueError: there is no number, or one is NaN or infinite.
    """
    found = [float(x.abs().amax()) for x in tensors if x.numel()]
    if not found:
        raise ValueError("tensors is empty: calibration needs numbers")
    if not np.isfinite(found).all():
        raise ValueError("tensors holds NaN or infinity: no range covers that")
    return max(found)


def counted(x: Tensor, largest: float, bins: int = 2048) -> Int[Tensor, "bins"]:
    """How often |x| lies in each of the bins from 0 to `largest`."""
    place = (x.abs().flatten().double() * (bins / largest)).long()
    return torch.bincount(place.clamp_(max=bins - 1), minlength=bins)


def histogram(tensors: Iterable[Tensor], bins: int = 2048) -> Histogram:
    """Of all numbers of all tensors, in two passes: their range, then the counts.

    Raises:
        ValueError: as `absolute_max`; or too few bins.
    """
    if bins < 256:
        raise ValueError(f"bins={bins} must be at least 256, twice the levels")
    tensors = list(tensors)
    largest = absolute_max(tensors) or 1.0  # a tensor of zeros: any range will do
    counts = sum(counted(x, largest, bins) for x in tensors)
    return Histogram(counts, largest / bins, largest)


# Calibrators: histogram → T ----------------------------------------------------------


def by_max(h: Histogram) -> float:
    """Nothing is clipped."""
    return h.largest


def by_percentile(h: Histogram, percentile: float = 99.99) -> float:
    """The upper edge of the bin where this many per cent of the values are reached.

    Raises:
        ValueError: no percentile.
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile={percentile} must lie above 0, at most 100")
    below = torch.cumsum(h.counts, 0).double()
    needed = below[-1] * percentile / 100
    last = min(int(torch.searchsorted(below, needed)), len(below) - 1)
    return min(h.largest, (last + 1) * h.width)


def by_entropy(h: Histogram, levels: int = 128) -> float:
    """Of the candidates with the least KL(P ‖ Q), the largest.

    Raises:
        ValueError: the histogram has fewer bins than there are levels.
    """
    divergences = divergence(h.counts, levels)
    best = len(divergences) - 1 - int(divergences.flip(0).argmin())
    return min(h.largest, (levels + best) * h.width)


def divergence(counts: Real[Tensor, "B"], levels: int = 128) -> Float[Tensor, "i"]:
    """KL(P ‖ Q) of each candidate i = L … B.

    P has i bins, and the last has all that is clipped as well. Q does not know what is
    clipped: its i bins are put into L levels, and each level's count is divided among
    those of its bins that are not empty. Where Q is 0 and P is not (the last bin held
    nothing before), the divergence is infinite.

    With sums over the bins of each level, from cumulative sums, a candidate costs L
    steps, not i:

        Σ_j P_j log(P_j / Q_j) = Σ_j P_j log P_j − Σ_l log(Q of level l) Σ_{j in l} P_j

    As in NVIDIA's code, the bin at zero is first given the count of the next: zeros are
    exact with any T, and there may be very many.
    """
    if len(counts) < levels:
        raise ValueError(f"counts has {len(counts)} bins, fewer than levels={levels}")
    c = counts.double().clone()
    c[0] = c[1]
    kept = torch.arange(levels, len(counts) + 1)  # i, (candidates,)
    # the bins of level l begin at the first j with j L / i ≥ l; (candidates, L + 1)
    edges = (kept[:, None] * torch.arange(levels + 1) + levels - 1) // levels
    inside = from_start(c)
    filled = from_start((c > 0).double())
    in_level = inside[edges].diff(dim=1)  # (candidates, L)
    bins_in_level = filled[edges].diff(dim=1)
    Q = in_level / bins_in_level.clamp(min=1)
    log_Q = torch.where(Q > 0, Q, 1.0).log()

    last = c[kept - 1]
    clipped = c.sum() - inside[kept]
    # the terms of all bins, then the last bin's anew: it has what is clipped as well
    own = from_start(torch.special.xlogy(c, c))[kept]
    own += torch.special.xlogy(last + clipped, last + clipped)
    own -= torch.special.xlogy(last, last)
    cross = (in_level * log_Q).sum(1) + clipped * log_Q[:, -1]
    total = c.sum()
    divergences = (own - cross) / total - total.log() + inside[kept].log()
    return divergences.masked_fill((last == 0) & (clipped > 0), torch.inf)


def from_start(x: Float[Tensor, "n"]) -> Float[Tensor, "n+1"]:
    """Sums of the first 0, 1, … n numbers."""
    return torch.cat([x.new_zeros(1), x.cumsum(0)])


def by_mse(h: Histogram, form: str = "int8", first: int = 128) -> float:
    """The T with the least Σ c (x − x̂)², x at the centres of the bins.

    Args:
        first: bins that a candidate keeps at least.
    """
    kind = format_of(form)
    x = h.centres
    weights = h.counts.double()
    best, least = h.largest, float("inf")
    for kept in range(first, len(x) + 1):
        threshold = min(h.largest, kept * h.width)
        error = (kind.fake(x, threshold / kind.largest) - x).square_()
        total = float(error @ weights)
        if total < least:
            best, least = threshold, total
    return best


CALIBRATORS: dict[str, Callable[[Histogram], float]] = {
    "max": by_max,
    "entropy": by_entropy,
    "percentile": by_percentile,
    "mse": by_mse,
}


def scale_of(h: Histogram, method: str = "max", form: str = "int8") -> float:
    """s = T / (largest code), with T from this calibrator.

    Raises:
        ValueError: no such calibrator, or no such format.
    """
    if method not in CALIBRATORS:
        raise ValueError(f"method={method!r} must be one of {', '.join(CALIBRATORS)}")
    kind = format_of(form)
    threshold = by_mse(h, form) if method == "mse" else CALIBRATORS[method](h)
    return threshold / kind.largest


# ONNX Runtime's entropy --------------------------------------------------------------


def entropy_two_sided(
    counts: Real[Tensor, "B"], edges: Float[Tensor, "B+1"], levels: int = 128
) -> tuple[float, float]:
    """(low, high), as ONNX Runtime 1.32 finds them on a histogram from −max to max.

    Its three ways of its own: a candidate keeps 2i + 1 bins around zero; all bins of a
    level are filled, empty ones too, with whole numbers; and what is left over by the
    division into levels is empty in Q. Zeros of P and Q are replaced by 1e-4 counts.

    With as many levels as bins (the default of `quantize_static`: 128 and 128) there is
    one candidate, which is the whole range.
    """
    c = counts.double().numpy()
    middle = len(c) // 2
    best, least = (0.0, 0.0), float("inf")
    for i in range(levels // 2, middle + 1):
        start, end = middle - i, min(middle + i + 1, len(c))
        P = c[start:end].copy()
        size = len(P) // levels
        cells = P[: size * levels].reshape(levels, size)
        sums = cells.sum(1)
        sums[-1] += P[size * levels :].sum()
        P[0] += c[:start].sum()
        P[-1] += c[end:].sum()
        filled = (P != 0)[: size * levels].reshape(levels, size).sum(1)
        Q = np.zeros_like(P)
        level = np.where(filled > 0, sums // np.maximum(filled, 1), 0)
        Q[: size * levels] = np.repeat(level, size)
        if not P.any() or not Q.any():
            continue
        found = kl(smoothed(P), smoothed(Q))
        if found < least:
            best, least = (float(edges[start]), float(edges[end])), found
    return best


def smoothed(counts: np.ndarray, little: float = 1e-4) -> np.ndarray:
    """Zeros become a little, and the others pay for it."""
    zeros = (counts == 0).astype(np.float32)
    paid = little * float(zeros.sum()) / float(len(counts) - zeros.sum())
    return counts.astype(np.float32) + (little * zeros - paid * (1 - zeros))


def kl(P: np.ndarray, Q: np.ndarray) -> float:
    """Σ P log(P / Q), both made to sum to one."""
    P, Q = P / P.sum(), Q / Q.sum()
    return float((P * np.log(P / Q)).sum())
