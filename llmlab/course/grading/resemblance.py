"""In what way one tensor is nearly another: a factor, a sign, one wrong row.

Each rule takes (got, right, same) with `same(a)` = "a is close to right", and returns a
phrase or None. None of them reveals a right value to someone who has not computed it up
to that flaw.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from llmlab.course.grading.closeness import close, wrong_places

# said only where all numbers are at that level
NEAR = ": near, but more than rounding; a lower precision, or another epsilon?"
Same = Callable[[Tensor], bool]


def resemblances(got: Tensor, right: Tensor, tol: float, what: str) -> Iterator[str]:
    """All that is recognised about `got`, the plainest first; never empty.

    `got` is float64 or integer, and has the shape of `right`.
    """
    bad = wrong_places(got, right, tol)
    g, r = got.double(), right.double()
    if not g.isfinite().all() and r.isfinite().all():
        n = int((~g.isfinite()).sum())
        yield f"{what} holds NaN or infinity in {n} of {g.numel()} places"
    elif (g.isinf() != r.isinf()).any():
        n = int((g.isinf() != r.isinf()).sum())
        kinds = "infinite and finite ones are not those of the right answer"
        yield f"{what}: {kinds} in {n} of {g.numel()} places"
    elif got.numel():

        def same(a: Tensor) -> bool:
            return close(a, r, tol)

        phrases = [rule(g, r, same) for rule in RULES]
        phrases += [_where(bad), _factor_along(g, r, same)]
        yield from (f"{what} {phrase}" for phrase in phrases if phrase)
    yield _statistics(g, r, bad, what)


def without_guess(text: str) -> str:
    """A sentence without what it guesses, for where the reason is known."""
    text = text.removesuffix(NEAR)
    return re.sub(r" \([^()]*\?\)$", "", text)


def _all_zero(g: Tensor, r: Tensor, same: Same) -> str | None:
    return "is zero everywhere" if g.numel() > 1 and not g.any() else None


def _all_equal(g: Tensor, r: Tensor, same: Same) -> str | None:
    if g.numel() < 2:
        return None
    got_is_constant = (g == g.flatten()[0]).all()
    right_is_constant = (r == r.flatten()[0]).all()
    if got_is_constant and not right_is_constant:
        return "is the same number everywhere"
    return None


def _sign(g: Tensor, r: Tensor, same: Same) -> str | None:
    return "has the wrong sign" if same(-g) else None


def _factor(g: Tensor, r: Tensor, same: Same) -> str | None:
    finite = g.isfinite() & r.isfinite()
    power = float((r[finite] ** 2).sum())
    k = float((g[finite] * r[finite]).sum()) / power if power else 0.0
    if k == 0 or not math.isfinite(k) or not same(g / k):
        return None
    if g.numel() == 1 and named_factor(abs(k), ()) is None:
        # Any number is a multiple of another: name only factors that mean something.
        return None
    size = abs(k) if abs(k) > 1 else 1 / abs(k)
    direction = "large" if abs(k) > 1 else "small"
    where = "" if g.numel() == 1 else " everywhere"
    sign = ", and has the wrong sign" if k < 0 else ""
    name = named_factor(abs(k), tuple(g.shape))
    origin = f" ({name})" if name else ""
    return f"is {size:.6g} times too {direction}{where}{sign}{origin}"


def named_factor(k: float, shape: tuple[int, ...]) -> str | None:
    """What a factor may come from: bits and bytes, units, a dimension of the tensor."""
    size = k if k > 1 else 1 / k
    for value, name in FACTORS:
        if abs(size / value - 1) < 1e-6:
            return name
    for dim, n in enumerate(shape):
        if n > 2 and abs(size / n - 1) < 1e-6:
            return (
                f"dimension {dim} has size {n}:"
                " a sum where a mean belongs, or the other way round?"
            )
        if n > 2 and abs(size**2 / n - 1) < 1e-6:
            return f"the square root of {n}, the size of dimension {dim}"
    return None


FACTORS = [
    (2.0, "a factor of 2"),
    (8.0, "8: bits for bytes?"),
    (1000.0, "1000: a wrong prefix, or ms for s?"),
    (1024.0, "1024: a wrong prefix?"),
    (1e6, "10⁶: a wrong prefix?"),
    (1e9, "10⁹: GB for bytes?"),
    (1e12, "10¹²: TB for bytes?"),
    (2.0**20, "2²⁰: MiB for bytes?"),
    (2.0**30, "2³⁰: GiB for bytes?"),
    (1.024**2, "MiB for MB?"),
    (1.024**3, "GiB for GB?"),
    (1.024**4, "TiB for TB?"),
    (math.log(2), "ln 2: bits for nats?"),
    (1 / math.log(2), "1/ln 2: bits for nats?"),
    (math.pi, "π"),
    (math.sqrt(2), "√2"),
    (60.0, "60: minutes for seconds?"),
    (3600.0, "3600: hours for seconds?"),
    (4.0, "a factor of 4"),
    (100.0, "100: percent for a fraction?"),
]


def _offset(g: Tensor, r: Tensor, same: Same) -> str | None:
    if g.numel() < 2:
        return None
    gap = float((g - r).nanmean())
    if not math.isfinite(gap) or gap == 0 or not same(g - gap):
        return None
    direction = "large" if gap > 0 else "small"
    return f"is too {direction} by the same {abs(gap):.6g} everywhere"


def _inverse(g: Tensor, r: Tensor, same: Same) -> str | None:
    if g.all() and same(1 / g):
        return "is upside down: one over the right value"
    return None


def _powers(g: Tensor, r: Tensor, same: Same) -> str | None:
    if g.numel() < 2:
        return None
    zero_stays = not g[r == 0].any()  # else 0 and 1 would pass for squares
    if (g >= 0).all() and zero_stays and same(g.sqrt() * r.sign()):
        return "is the square of the right values: is a square root missing?"
    if same(g**2):
        return "is the square root of the right values"
    if (g > 0).all() and same(g.log()):
        return "is the exponential of the right values"
    if same(g.exp()):
        return "is the logarithm of the right values"
    return None


def _transposed(g: Tensor, r: Tensor, same: Same) -> str | None:
    for i, j in itertools.combinations(range(g.ndim), 2):
        if g.shape[i] == g.shape[j] > 1 and same(g.transpose(i, j)):
            return f"is transposed: dimensions {i} and {j} are swapped"
    return None


def _moved(g: Tensor, r: Tensor, same: Same) -> str | None:
    for dim in range(g.ndim):
        if g.shape[dim] < 2:
            continue
        if same(g.flip(dim)):
            return f"is in reverse order along dimension {dim}"
        for step in (1, -1):
            if g.shape[dim] > 2 and same(g.roll(step, dim)):
                return f"is shifted by one along dimension {dim}"
    return None


def _permuted(g: Tensor, r: Tensor, same: Same) -> str | None:
    for dim in range(g.ndim - 1, -1, -1):
        if g.shape[dim] > 1 and close(g.sort(dim).values, r.sort(dim).values):
            return f"has the right values in the wrong order along dimension {dim}"
    if g.numel() > 1 and close(g.flatten().sort().values, r.flatten().sort().values):
        return (
            "has the right values in the wrong places"
            " (a reshape where a transpose belongs?)"
        )
    return None


def _factor_along(g: Tensor, r: Tensor, same: Same) -> str | None:
    """One factor per row, or per column: a normalisation over the wrong set."""
    if not (g.isfinite() & r.isfinite()).all():
        return None
    for dim in range(g.ndim - 1, -1, -1):
        if g.shape[dim] < 2 or g.numel() == g.shape[dim]:
            continue
        k = (g * r).sum(dim, keepdim=True) / (r * r).sum(dim, keepdim=True)
        if k.isfinite().all() and k.all() and same(g / k):
            return (
                f"is right along dimension {dim}"
                " up to a factor that differs from one slice to the next"
            )
    return None


RULES: list[Callable[[Tensor, Tensor, Same], str | None]] = [
    _all_zero,
    _all_equal,
    _sign,
    _factor,
    _offset,
    _inverse,
    _powers,
    _transposed,
    _moved,
    _permuted,
]


def _where(bad: Tensor) -> str | None:
    """One slice that alone is wrong, or alone is right."""
    if bad.ndim >= 2 and bad.shape[-1] == bad.shape[-2] > 2:
        diagonal = torch.eye(bad.shape[-1], dtype=torch.bool)
        for part, where in (
            (torch.triu(bad, 1), "above"),
            (torch.tril(bad, -1), "below"),
            (bad & diagonal, "on"),
        ):
            if torch.equal(part, bad):
                return f"is wrong only {where} the diagonal of its last two dimensions"
    for dim in range(bad.ndim):
        n = bad.shape[dim]
        if n < 2:
            continue
        is_wrong = bad.movedim(dim, 0).reshape(n, -1).any(1)  # [n]
        for flags, verb in ((is_wrong, "wrong"), (~is_wrong, "right")):
            if int(flags.sum()) == 1:
                place = _position(int(flags.nonzero()), n)
                return f"is {verb} only at {place} along dimension {dim}"
    return None


def _position(i: int, n: int) -> str:
    """'the first of 4', 'index 2 of 4', 'the last of 4'."""
    if i == 0:
        return f"the first of {n}"
    if i == n - 1:
        return f"the last of {n}"
    return f"index {i} of {n}"


def _statistics(g: Tensor, r: Tensor, bad: Tensor, what: str) -> str:
    if g.numel() == 1:
        gap = float((g - r).abs()) / max(float(r.abs()), 1e-30)
        direction = "large" if g > r else "small"
        text = f"{what} is {float(g):.6g}, which is too {direction}"
        if 0 < gap < 0.1:
            bound = max(0.01, 10 ** math.ceil(math.log10(gap)))
            text += f" (by less than {bound:.0%}: look for a small term)"
        return text
    gap = (g - r).abs()
    whole = _whole_numbers(g, r, bad)
    if whole:
        return f"{what} {whole}"
    gap = gap[gap.isfinite()]
    largest = float(gap.max()) if gap.numel() else math.inf
    scale = float(r[r.isfinite()].abs().mean()) or 1.0
    places = f"{int(bad.sum())} of {g.numel()} places"
    text = f"{what} differs in {places}, by up to {largest:.3g}"
    if is_rounded(g, gap, scale):
        text += NEAR
    elif largest < 1e-2 * scale:
        text += ": near, but not by rounding; look for a small term"
    return text


def _whole_numbers(g: Tensor, r: Tensor, bad: Tensor) -> str | None:
    """What is said of truth values, and of whole numbers that are one off.

    Of these a lower precision is never the reason.
    """
    if not (torch.equal(g, g.round()) and torch.equal(r, r.round())):
        return None
    gap = (g - r)[bad]
    places = f"{int(bad.sum())} of {g.numel()} places"
    if not (gap.abs() == 1).all():
        return None
    up = int((gap > 0).sum())
    if torch.cat([g, r]).unique().tolist() == [0, 1]:
        down = len(gap) - up
        return (
            f"is wrong in {places}: 1 (true) for 0 (false) in {up} of them, the"
            f" other way round in {down}"
        )
    way = {0: "too small by 1", len(gap): "too large by 1"}.get(up, "off by 1")
    return f"is {way} in {places}"


def is_rounded(g: Tensor, gap: Tensor, scale: float) -> bool:
    """Whether numbers look like right ones in a lower precision.

    Either all of them are numbers of bfloat16 or float16, near the right ones; or they
    differ by no more than float16 would, in every place.
    """
    largest = float(gap.max()) if gap.numel() else math.inf
    if largest < 2.0**-11 * scale:
        return True
    short = any(torch.equal(g, g.to(d).double()) for d in (torch.bfloat16, torch.half))
    return short and largest < 2.0**-6 * scale * max(1.0, float(g.abs().max()) / scale)
