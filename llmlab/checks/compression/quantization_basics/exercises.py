"""What marks the exercises of 06-compression/01-quantization-basics."""

from __future__ import annotations

import torch
from torch import Tensor

from llmlab.checks.compression.quantization_basics.answers import (
    affine_scale,
    affine_zero,
    best,
    clips,
    down_columns,
    groups,
    product,
)
from llmlab.checks.operations import Operations
from llmlab.compression import quantization_basics as qb
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect

check = Checks("06-compression/01-quantization-basics")


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        (
            "Three steps: the range, then s and z from it, then the codes. The range"
            " holds 0 whatever x is."
        ),
        (
            "b bits have 2^b levels and 2^b − 1 steps between them. z is an integer. `x"
            " / s` is rounded first, then z is added."
        ),
        (
            "After rounding and adding z, `.clamp(0, 2**bits - 1)`, then `.long()`. For"
            " s, `… or 1.0` catches a range of 0."
        ),
    ),
)
def affine_quantize(answer):
    """A tensor as unsigned codes with one scale and one zero point."""
    # −x_min / s = 2.9
    x = torch.cat([torch.tensor([-0.58, 2.42]), torch.rand(31) * 2.9 - 0.53]).reshape(
        3, 11
    )
    codes, scale, zero = _three(answer(x, 4), x.shape)
    low, high = x.min().item(), x.max().item()
    affine_scale(scale, low, high, 4)
    s = (high - low) / 15
    affine_zero(zero, low, high, s)
    free = torch.round(x / s) + 3
    mistakes = {
        "z is missing from the codes: add it after rounding": (free - 3).clamp(0, 15),
        "you rounded down: `.long()` and floor cut off, so call torch.round first": (
            (x / s + 3).clamp(0, 15)
        ),
        "you cut off x / s: call torch.round before `.long()`": (
            ((x / s).trunc() + 3).clamp(0, 15)
        ),
        (
            "you subtracted x_min before dividing: the formula rounds x / s and then"
            " adds the integer z"
        ): torch.round((x - low) / s),
        "you clamped before z was added: negative numbers are lost": (
            torch.round(x / s).clamp(0, 15) + 3
        ),
        (
            "you clamped at 2^(b−1) − 1, the largest signed code: here codes run up to"
            " 2^b − 1"
        ): free.clamp(max=7),
    }
    diagnose(
        codes,
        right=free.long(),
        mistakes={k: v.long() for k, v in mistakes.items()},
        what="your tensor of codes",
    )
    # −x_min / s = 2.2: it is to be rounded to the nearest, not up
    _, scale, zero = _three(answer(torch.tensor([-0.44, 1.0, 2.56]), 4), (3,))
    if zero != 2 and close(scale, 0.2):
        raise Mistake("the zero point is rounded up, not to the nearest")
    # s = 1/4, and both ends lie half way between two codes: they round outwards
    x = torch.tensor([-1.375, 0.1, 2.375])
    if _three(answer(x, 4), x.shape)[0].max() > 15:
        raise Mistake(
            "the codes are not clamped, or not to 0 … 2^b − 1: for some x one is 2^b"
        )
    for sign, side in ((1, "positive"), (-1, "negative")):
        _one_sided(answer, sign * (3 + torch.rand(8)), side)
    codes, scale, zero = _three(answer(torch.full((3,), 3.0), 4), (3,))
    if scale == 1 or not close(scale, 0.2):
        raise Mistake(
            "where all numbers are 3, the range is from 0 to 3, and s = 3 / 15: only a"
            " tensor of zeros gets the scale 1"
        )
    codes, scale, zero = _three(
        answer(torch.zeros(4), 4), (4,), "affine_quantize(zeros)"
    )
    if scale != 1 or codes.any() or zero:
        raise Mistake(
            "a tensor of zeros must get the scale 1, the zero point 0 and codes 0"
        )


def _three(
    value, shape, what: str = "affine_quantize(x, 4)"
) -> tuple[Tensor, float, int]:
    triple = expect(value, kind=tuple, what=what)
    if len(triple) != 3:
        raise Mistake(
            f"{what} returned {len(triple)} things: return codes, scale and zero point"
        )
    codes = expect(
        triple[0], shape=tuple(shape), dtype=torch.int64, what="your tensor of codes"
    )
    return (
        codes,
        expect(triple[1], kind=float, what="the scale"),
        expect(triple[2], kind=int, what="the zero point"),
    )


def _one_sided(answer, x: Tensor, side: str) -> None:
    """0 must be a level even where no value is near it."""
    codes, scale, zero = _three(
        answer(x, 8), x.shape, f"affine_quantize({side} numbers)"
    )
    if close(scale, (x.max() - x.min()).item() / 255):
        raise Mistake(
            f"for {side} numbers the range must still hold 0: take the min and max"
            " together with 0"
        )
    s = x.abs().max().item() / 255
    if not close(scale, s) or not close((codes - zero) * s, torch.round(x / s) * s):
        raise Mistake(f"right for numbers of both signs, wrong for {side} ones")


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        "Make the groups a dimension of their own: (out, in) becomes (out, in / g, g).",
        (
            "The largest |w| of a group is an `amax` over the last of the three"
            " dimensions. The largest code is 2^(b−1) − 1."
        ),
        (
            "`W.unflatten(1, (-1, group_size))`, `.abs().amax(-1)`, and `scale[...,"
            " None]` to divide. `torch.where` for zero groups."
        ),
    ),
)
def quantize_groups(answer):
    """A weight as signed codes, one scale for each group of neighbours in a row."""
    W = (
        torch.randn(8, 12)
        * torch.logspace(-1, 0, 12)
        * torch.logspace(0, -1, 8)[:, None]
    )
    W[:, 1::4].abs_()  # no group is all negative
    W[5, 6] = -4.0  # the largest of its group
    codes, scale = _pair(answer(W, 4, 4), (8, 12), (8, 3))
    right_codes, right_scale = groups(W, 4, 4)
    mistakes = _wrong_scales(W, right_scale)
    diagnose(scale, right=right_scale, mistakes=mistakes, what="your tensor of scales")
    s = scale.repeat_interleave(4, 1)
    mistakes = {
        "you cut off instead of rounding: torch.round comes before .long()": (
            (W / s).long()
        ),
        "the scales of a row are laid out in the wrong order over its weights": (
            torch.round(W / scale.repeat(1, 4)).long()
        ),
        (
            "the codes carry an offset, as affine ones do: with z = 0 the number 0 has"
            " code 0"
        ): right_codes + 7,
        (
            "the codes carry an offset, as affine ones do: with z = 0 the number 0 has"
            " the code 0"
        ): right_codes + 8,
    }
    diagnose(codes, right=right_codes, mistakes=mistakes, what="your tensor of codes")
    W[3, 8:] = 0
    codes, scale = _pair(answer(W, 3, 2), (8, 12), (8, 6))
    right = groups(W, 3, 2)
    if (scale[3, 4:] != 1).any():
        raise Mistake("a group of zeros must get the scale 1")
    if not close(scale, right[1]) or not close(codes, right[0]):
        raise Mistake(
            "right for 4 bits and groups of 4, wrong for 3 bits and groups of 2: take"
            " both from the arguments"
        )
    # an independent oracle
    config = qb.QuantConfig(bits=3, group_size=2, scale_dtype=torch.float32)
    if not close(codes * scale.repeat_interleave(2, 1), qb.fake_quantize(W, config)):
        raise Mistake(
            "codes × scales do not give back what the lesson's quantizer leaves of W"
        )


def _wrong_scales(W: Tensor, right_scale: Tensor) -> dict:
    """The scales that usual mistakes give, for 4 bits and groups of 4."""
    return {
        "you divided by 2^(b−1): the largest code is 2^(b−1) − 1": right_scale * 7 / 8,
        (
            "you divided by 2^b − 1, as an affine quantizer does: here the largest code"
            " is 2^(b−1) − 1"
        ): right_scale * 7 / 15,
        "the scale is the largest |w| itself: divide it by 2^(b−1) − 1": (
            right_scale * 7
        ),
        "you took the mean of |w|: the largest is asked": (
            W.unflatten(1, (-1, 4)).abs().mean(-1) / 7
        ),
        "you took the largest w, not the largest |w|": (
            W.unflatten(1, (-1, 4)).amax(-1) / 7
        ),
        (
            "you took the whole range, max − min: a symmetric scale comes from the"
            " largest |w|"
        ): (W.unflatten(1, (-1, 4)).amax(-1) - W.unflatten(1, (-1, 4)).amin(-1)) / 15,
        "one scale per row: each group of neighbours has its own": (
            (W.abs().amax(1, keepdim=True) / 7).expand(8, 3)
        ),
        "one scale for the whole tensor: each group has its own": (
            (W.abs().amax() / 7).expand(8, 3)
        ),
        (
            "your groups take every third weight: a group is `group_size` neighbours in"
            " a row"
        ): W.unflatten(1, (4, 3)).abs().amax(1) / 7,
        "your groups run down the columns: they run along a row, the inputs": (
            down_columns(W)
        ),
    }


def _pair(value, codes: tuple, scales: tuple) -> tuple[Tensor, Tensor]:
    pair = expect(value, kind=tuple, what="quantize_groups(W, …)")
    if len(pair) != 2:
        raise Mistake(
            f"quantize_groups returned {len(pair)} things: return codes and scales"
        )
    if getattr(pair[1], "shape", None) == (*scales, 1):
        raise Mistake(
            f"the scales have a last dimension of size 1 too many: {scales} is asked;"
            " squeeze it, or no keepdim"
        )
    out, inputs = codes
    size = inputs // scales[1]
    if getattr(pair[1], "shape", None) in (
        (out // size, inputs),
        (inputs, out // size),
    ):
        raise Mistake(
            "your groups run down the columns: they run along a row, the inputs"
        )
    scale = expect(
        pair[1], shape=scales, dtype=torch.float32, what="your tensor of scales"
    )
    if (scale == 0).any():
        raise Mistake(
            "a group of zeros has the scale 0, and dividing by it gives NaN: use 1"
            " there"
        )
    return expect(
        pair[0], shape=codes, dtype=torch.int64, what="your tensor of codes"
    ), scale


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=4,
    hints=(
        (
            "Quantize X and W each along its rows, then multiply the two matrices of"
            " codes."
        ),
        (
            "With keepdim=True the scales are (tokens, 1) and (out, 1). Which of them"
            " must be transposed to fit (tokens, out)?"
        ),
        "`(codes_x @ codes_w.T) * s_x * s_w.T`, the codes rounded, not cut off.",
    ),
)
def int8_linear(answer):
    """A linear layer's output from a product of 8-bit integers."""
    # square results, so that a scale on the wrong axis fits
    X = torch.randn(6, 16)
    W = torch.randn(6, 16)
    X[1] *= 40
    X[:, 3] *= 25  # a token and a channel of outliers
    W *= torch.linspace(0.2, 3, 6)[:, None]
    got = expect(
        answer(X, W), shape=(6, 6), dtype=torch.float32, what="int8_linear(X, W)"
    )
    right = product(X, W, rows, rows)
    mistakes = _wrong_products(X, W)
    diagnose(got, right=right, mistakes=mistakes, tol=1e-6, what="int8_linear(X, W)")
    X = X[:3]
    W = W[:, :8].repeat(1, 2)
    what = "int8_linear with 3 tokens and 6 outputs"
    with Operations() as seen:
        got = answer(X, W)
    expect(got, shape=(3, 6), what=what)
    if not close(got, product(X, W, rows, rows), tol=1e-5):
        raise Mistake(
            "right for 6 tokens and 6 outputs, wrong for 3 tokens and 6 outputs"
        )
    long = torch.ones(3, 64)
    got = answer(long[:2], long)
    if not close(got, torch.full((2, 3), 64.0)):
        raise Mistake(
            "wrong for rows of 64 codes that are all 127: their sum, 64 · 127² ="
            " 1,032,256, overflows 16 bits. Multiply in int32 or wider"
        )
    if not seen.integers:
        raise Mistake(
            "the values are right, but no integers are multiplied: multiply the codes,"
            " and scale what comes out"
        )


def rows(t: Tensor) -> Tensor:
    """The largest |t| of each row."""
    return t.abs().amax(1, keepdim=True)


def columns(t: Tensor) -> Tensor:
    """The largest |t| of each column."""
    return t.abs().amax(0, keepdim=True)


def whole(t: Tensor) -> Tensor:
    """The largest |t| of all."""
    return t.abs().amax().reshape(1, 1)


def _wrong_products(X: Tensor, W: Tensor) -> dict:
    """The outputs that usual mistakes give."""
    s_x = rows(X) / 127
    s_w = rows(W) / 127
    plain = product(X, W, rows, rows) / (s_x * s_w.T)
    return {
        "one scale for all of X: each token has its own": product(X, W, whole, rows),
        "one scale for all of W: each output channel has its own": product(
            X, W, rows, whole
        ),
        "one scale for all of X, and one for all of W: each row has its own": product(
            X, W, whole, whole
        ),
        (
            "X has one scale for each input channel: a scale for each token, a row of"
            " X, is asked"
        ): product(X, W, columns, rows),
        (
            "W has one scale for each input channel: a scale for each output, a row of"
            " W, is asked"
        ): product(X, W, rows, columns),
        "both have one scale for each input channel: each row has its own": product(
            X, W, columns, columns
        ),
        "this is X Wᵀ in floating point: nothing was rounded": X @ W.T,
        "X was not quantized": X @ (torch.round(W / s_w) * s_w).T,
        "W was not quantized": (torch.round(X / s_x) * s_x) @ W.T,
        "the scales are missing: these are sums of products of codes": plain,
        "the scale of X is missing from the result": plain * s_w.T,
        "the scale of W is missing from the result": plain * s_x,
        "the scale of W is on the wrong axis: outputs are the columns of Y": (
            plain * s_x * s_w
        ),
        "the scale of X is on the wrong axis: tokens are the rows of Y": (
            plain * s_x.T * s_w.T
        ),
        "both scales are on the wrong axis": plain * s_x.T * s_w,
        "you divided by the scales: the codes are multiplied by them": (
            plain / (s_x * s_w.T)
        ),
        "you divided by 128: the largest code is 127": product(
            X, W, rows, rows, top=128
        ),
        "you divided by 128, and cut the codes at 127: the largest code is 127": (
            product(X, W, rows, rows, lambda q: q.round().clamp(-128, 127), top=128)
        ),
        "you took the largest value of a row, not the largest |value|": product(
            X, W, *[lambda t: t.amax(1, keepdim=True)] * 2
        ),
        "you rounded up: torch.round is to the nearest": product(
            X, W, rows, rows, torch.ceil
        ),
        "the largest code of 8 bits is 127: this is that of 4 bits": product(
            X, W, rows, rows, top=7
        ),
        "the sums of products are cut at 127: only codes have 8 bits": (
            plain.clamp(-128, 127) * s_x * s_w.T
        ),
        "the two scales are added: they are multiplied": plain * (s_x + s_w.T),
        "you divided by 127 once more: the scales have it": plain * s_x * s_w.T / 127,
        "you divided by 127² once more: the scales have it": (
            plain * s_x * s_w.T / 127**2
        ),
        "you rounded down: torch.round is to the nearest": product(
            X, W, rows, rows, torch.floor
        ),
        "you divided by 255: symmetric codes end at 127": product(
            X, W, rows, rows, top=255
        ),
        "you cut off instead of rounding: torch.round comes before the cast": product(
            X, W, rows, rows, torch.trunc
        ),
        (
            "the product of the codes overflowed 8 bits: cast them to int32 or wider"
            " first"
        ): plain.round().long().to(torch.int8) * s_x * s_w.T,
    }


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=3,
    hints=(
        (
            "Write the error of one candidate as a function, then take the candidate"
            " with the least."
        ),
        (
            "Values beyond c are clamped to the largest code, so they come back as ±c."
            " Multiply codes by s before you compare with x."
        ),
        (
            "`torch.round(x / s).clamp(-top, top) * s`, then `.sub(x).square().sum()`."
            " `min(candidates, key=error)` does the rest."
        ),
    ),
)
def best_clip(answer):
    """The range that leaves the least squared error, of those offered."""
    cases = _clip_cases()
    found = []
    for x, bits, candidates in cases:
        got = expect(
            answer(x, bits, list(candidates)),
            kind=float,
            what="best_clip(x, bits, candidates)",
        )
        if not any(abs(got - c) < 1e-6 * c for c in candidates):
            raise Mistake(
                "that is not one of the candidates: return the candidate itself, not"
                " its error or its place"
            )
        found.append(got)
    right = [best(*case) for case in cases]
    if close(found, right):
        return
    for text, picks in clips(cases).items():
        if close(found, picks()):
            raise Mistake(text)
    i = [close(f, r) for f, r in zip(found, right, strict=True)].index(False)
    x, bits, candidates = cases[i]
    size = "larger" if found[i] < right[i] else "smaller"
    raise Mistake(
        f"for {bits} bits and {len(candidates)} candidates a {size} one has a smaller"
        " squared error",
        foreseen=False,
    )


def _clip_cases() -> list[tuple[Tensor, int, list[float]]]:
    """x, bits and candidates in no order; the best is in the middle, first, last or
    the largest.
    """
    cases = []
    for bits, heavy in ((3, 8.0), (4, 8.0), (2, 4.0), (5, 8.0), (3, 3.0)):
        x = 2 * torch.randn(600)
        x[:3] *= heavy
        largest = x.abs().max().item()
        candidates = [share * largest for share in torch.linspace(0.05, 1, 39).tolist()]
        cases.append((x, bits, [candidates[i] for i in torch.randperm(39)]))
    x, bits, candidates = cases[0]
    least = best(x, bits, candidates)
    others = [c for c in candidates if c != least]
    cases.append((x.reshape(20, 30), bits, [least, *others]))
    cases.append((x, bits, [*others, least]))
    cases.append((x, bits, [least / 4, least / 3, least / 2, least]))
    cases.append((x, bits, [least * 2, least]))
    return cases
