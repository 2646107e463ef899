"""Wrong answers to the exercises of 06-compression/01-quantization-basics, each with
the diagnosis that it must get.
"""

import math

import pytest
import torch

from llmlab.checks.compression.quantization_basics import check
from tests.checks.rejecting import Wrong, rejects, verdict


def affine(
    steps=lambda b: 2**b - 1,
    zero=round,
    low=0.0,
    clamp=True,
    q_max=None,
    rounding=torch.round,
    sign=-1,
    empty=1.0,
):
    """affine_quantize with one thing changed."""

    def answer(x, bits):
        top = 2**bits - 1
        lo = min(low, x.min().item()) if low is not None else x.min().item()
        hi = max(low, x.max().item()) if low is not None else x.max().item()
        scale = (hi - lo) / steps(bits) or empty
        z = zero(sign * lo / scale)
        codes = rounding(x / scale) + z
        return (codes.clamp(0, q_max or top) if clamp else codes).long(), scale, z

    return answer


def named(function, name):
    function.__name__ = name
    return function


def signed_affine(x, bits):
    lo, hi = min(0.0, x.min().item()), max(0.0, x.max().item())
    scale = (hi - lo) / (2**bits - 1) or 1.0
    zero = round(-lo / scale) - 2 ** (bits - 1)
    return (
        (torch.round(x / scale) + zero)
        .clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        .long(),
        scale,
        zero,
    )


def symmetric_instead(x, bits):
    scale = x.abs().max().item() / (2 ** (bits - 1) - 1) or 1.0
    return torch.round(x / scale).long(), scale, 0


def float_zero(x, bits):
    codes, scale, _ = affine()(x, bits)
    return codes, scale, -min(0.0, x.min().item()) / scale


def float_codes(x, bits):
    codes, scale, zero = affine()(x, bits)
    return codes.float(), scale, zero


def zero_forgotten(x, bits):
    _, scale, zero = affine()(x, bits)
    return torch.round(x / scale).clamp(0, 2**bits - 1).long(), scale, zero


def shifted_before_rounding(x, bits):
    _, scale, zero = affine()(x, bits)
    return (
        torch.round((x - min(0.0, x.min().item())) / scale)
        .clamp(0, 2**bits - 1)
        .long(),
        scale,
        zero,
    )


def groups(
    top=lambda b: 2 ** (b - 1) - 1,
    largest=lambda g: g.abs().amax(-1),
    empty=1.0,
    offset=0,
    rounding=torch.round,
):
    """quantize_groups with one thing changed."""

    def answer(W, bits, group_size):
        g = W.unflatten(1, (-1, group_size))
        scale = largest(g) / top(bits)
        if empty is not None:
            scale = torch.where(scale > 0, scale, empty)
        return rounding(g / scale[..., None]).flatten(1).long() + offset, scale

    return answer


def a_scale_a_row(W, bits, group_size):
    scale = (W.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(min=1e-9)
    return (
        torch.round(W / scale).long(),
        scale.expand(-1, W.shape[1] // group_size).clone(),
    )


def down_the_columns(W, bits, group_size):
    g = W.T.unflatten(1, (-1, group_size))
    scale = g.abs().amax(-1) / (2 ** (bits - 1) - 1)
    codes = torch.round(g / scale[..., None]).flatten(1).T
    return codes.long().contiguous(), scale.T.reshape(W.shape[0], -1)


def strided_groups(W, bits, group_size):
    g = W.unflatten(1, (group_size, -1))
    scale = (g.abs().amax(1) / (2 ** (bits - 1) - 1)).clamp(min=1e-9)
    return torch.round(g / scale[:, None]).flatten(1).long(), scale


def hard_coded_bits(W, bits, group_size):
    return groups()(W, 4, group_size)


def keepdim_left(W, bits, group_size):
    codes, scale = groups()(W, bits, group_size)
    return codes, scale[..., None]


def int8(
    scale_x=lambda t: t.abs().amax(1, keepdim=True),
    scale_w=lambda t: t.abs().amax(1, keepdim=True),
    top=127,
    how="right",
):
    """int8_linear with one thing changed."""

    def answer(X, W):
        s_x, s_w = scale_x(X) / top, scale_w(W) / top
        rounding = torch.trunc if how == "trunc" else torch.round
        q_x, q_w = rounding(X / s_x).long(), rounding(W / s_w).long()
        if how in ("columns of X", "columns of W"):
            return ((q_x * s_x) @ (q_w * s_w).T).float()
        y = (q_x @ q_w.T).float()
        if how == "overflow":
            return (q_x.to(torch.int8) @ q_w.to(torch.int8).T) * s_x * s_w.T
        if how == "no scale of X":
            return y * s_w.T
        if how == "no scale of W":
            return y * s_x
        if how == "wrong axis":
            return y * s_x * s_w
        if how == "divided":
            return y / s_x / s_w.T
        return y if how == "codes" else y * s_x * s_w.T

    return answer


def in_floats(X, W):
    return X @ W.T


def weight_only(X, W):
    s = W.abs().amax(1, keepdim=True) / 127
    return X @ (torch.round(W / s) * s).T


tensor, columns = (
    (lambda t: t.abs().amax().reshape(1, 1)),
    (lambda t: t.abs().amax(0, keepdim=True)),
)


def clip(
    top=lambda b: 2 ** (b - 1) - 1,
    error=lambda back, x, s, c: (back - x).square().sum(),
    clamp=True,
    choose=min,
):
    """best_clip with one thing changed."""

    def answer(x, bits, candidates):
        def cost(c):
            s, t = c / top(bits), top(bits)
            codes = torch.round(x / s)
            return error((codes.clamp(-t, t) if clamp else codes) * s, x, s, c).item()

        return choose(candidates, key=cost)

    return answer


def the_error_itself(x, bits, candidates):
    top = 2 ** (bits - 1) - 1
    return min(
        (torch.round(x * top / c).clamp(-top, top) * c / top - x).square().sum().item()
        for c in candidates
    )


def its_place(x, bits, candidates):
    return candidates.index(clip()(x, bits, candidates))


def no_clipping(x, bits, candidates):
    return max(candidates)


def until_it_rises(x, bits, candidates):
    best = clip()
    found = candidates[0]
    for c in candidates[1:]:
        if best(x, bits, [found, c]) == found:
            break
        found = c
    return found


def without_the_first(x, bits, candidates):
    return clip()(x, bits, candidates[1:])


def one_code_more(x, bits, candidates):
    top = 2 ** (bits - 1) - 1

    def cost(c):
        back = torch.round(x * top / c).clamp(-top - 1, top) * c / top
        return float((back - x).square().sum())

    return min(candidates, key=cost)


def int8_with(
    top=127,
    code=lambda q: q.to(torch.int32),
    largest=lambda t: t.abs().amax(1, keepdim=True),
):
    """int8_linear with one thing changed."""

    def int8_linear(X, W):
        s_x = largest(X) / top
        s_w = largest(W) / top
        codes = code(torch.round(X / s_x)) @ code(torch.round(W / s_w)).T
        return codes.float() * s_x * s_w.T

    return int8_linear


def always_8_bits(x, bits):
    return affine()(x, 8)


def by_groups(W, bits, group_size):
    scales = torch.stack([p.abs().amax(1) for p in W.split(group_size, 1)], 1)
    scales = scales / (2 ** (bits - 1) - 1)
    scales[scales == 0] = 1
    codes = torch.round(W / scales.repeat_interleave(group_size, 1))
    return codes.long(), scales


def groups_down_columns(W, bits, group_size):
    codes, scales = by_groups(W.T, bits, group_size)
    return codes.T, scales.T


def scale_not_divided(W, bits, group_size):
    codes, scales = by_groups(W, bits, group_size)
    return codes, scales * (2 ** (bits - 1) - 1)


def all_at_once(x, bits, candidates):
    top = 2 ** (bits - 1) - 1
    s = torch.tensor(candidates).view(-1, 1) / top
    back = torch.round(x.flatten() / s).clamp(-top, top) * s
    errors = (back - x.flatten()).square().mean(1)
    return candidates[int(errors.argmin())]


def by_numpy(x, bits):
    array = x.numpy().astype("float64")
    low, high = min(array.min(), 0), max(array.max(), 0)
    scale = float(high - low) / (2**bits - 1) if high > low else 1.0
    zero = round(-low / scale)
    codes = (array / scale).round() + zero
    return torch.from_numpy(codes.clip(0, 2**bits - 1)).long(), scale, zero


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("affine_quantize", by_numpy),
        ("quantize_groups", by_groups),
        ("int8_linear", int8_with()),
        ("best_clip", all_at_once),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)


A = "affine_quantize"
G = "quantize_groups"
INT8 = "int8_linear"
C = "best_clip"
test_wrong_answers = rejects(
    "06-compression/01-quantization-basics",
    [
        Wrong(
            A, named(affine(steps=lambda b: 2**b), "levels_not_steps"), "2^b − 1 steps"
        ),
        Wrong(
            A,
            named(affine(steps=lambda b: 2 ** (b - 1) - 1), "signed_top"),
            "largest signed code",
        ),
        Wrong(A, named(affine(zero=int), "zero_cut_off"), "cut off"),
        Wrong(A, named(affine(sign=1), "zero_sign"), "sign of the zero point"),
        Wrong(A, named(affine(low=None), "range_without_zero"), "must still hold 0"),
        Wrong(A, named(affine(clamp=False), "no_clamp"), "not clamped"),
        Wrong(A, named(affine(q_max=16), "clamp_too_high"), "not clamped"),
        Wrong(A, named(affine(rounding=torch.floor), "floored"), "rounded down"),
        Wrong(A, named(affine(empty=1e-8), "tiny_scale_for_zeros"), "tensor of zeros"),
        Wrong(A, named(affine(empty=float("nan")), "nan_for_zeros"), "NaN"),
        Wrong(A, signed_affine, "2^(b−1)"),
        Wrong(A, symmetric_instead, "symmetric scale"),
        Wrong(A, float_zero, "the zero point"),
        Wrong(A, float_codes, "int64"),
        Wrong(A, zero_forgotten, "z is missing"),
        Wrong(A, shifted_before_rounding, "before dividing"),
        Wrong(G, named(groups(top=lambda b: 2 ** (b - 1)), "top_eight"), "2^(b−1) − 1"),
        Wrong(G, named(groups(top=lambda b: 2**b - 1), "affine_top"), "affine"),
        Wrong(
            G,
            named(groups(largest=lambda g: g.amax(-1)), "largest_without_abs"),
            "largest |w|",
        ),
        Wrong(G, named(groups(empty=None), "zero_groups"), "NaN"),
        Wrong(G, named(groups(empty=1e-6), "tiny_scale"), "scale 1"),
        Wrong(G, named(groups(offset=7), "offset"), "offset"),
        Wrong(G, named(groups(rounding=torch.trunc), "truncated"), "cut off"),
        Wrong(G, a_scale_a_row, "one scale per row"),
        Wrong(G, down_the_columns, "down the columns"),
        Wrong(G, strided_groups, "neighbours"),
        Wrong(G, hard_coded_bits, "3 bits"),
        Wrong(G, keepdim_left, "1 too many"),
        Wrong(INT8, named(int8(scale_x=tensor), "x_per_tensor"), "each token"),
        Wrong(INT8, named(int8(scale_w=tensor), "w_per_tensor"), "each output channel"),
        Wrong(
            INT8,
            named(int8(scale_x=columns, how="columns of X"), "x_per_channel"),
            "for each input channel",
        ),
        Wrong(
            INT8,
            named(int8(scale_w=columns, how="columns of W"), "w_per_input"),
            "for each input channel",
        ),
        Wrong(INT8, named(int8(top=128), "over_128"), "127"),
        Wrong(INT8, named(int8(top=255), "over_255"), "127"),
        Wrong(INT8, named(int8(how="trunc"), "truncated_codes"), "cut off"),
        Wrong(INT8, named(int8(how="codes"), "no_scales"), "scales are missing"),
        Wrong(
            INT8,
            named(int8(how="no scale of X"), "no_scale_x"),
            "scale of X is missing",
        ),
        Wrong(
            INT8,
            named(int8(how="no scale of W"), "no_scale_w"),
            "scale of W is missing",
        ),
        Wrong(INT8, named(int8(how="wrong axis"), "w_on_the_wrong_axis"), "wrong axis"),
        Wrong(
            INT8,
            named(int8(how="divided"), "divided_by_scales"),
            "divided by the scales",
        ),
        Wrong(INT8, named(int8(how="overflow"), "overflow"), "overflowed"),
        Wrong(INT8, in_floats, "nothing was rounded"),
        Wrong(INT8, weight_only, "X was not quantized"),
        Wrong(C, named(clip(clamp=False), "no_clamp_in_clip"), "not clamped"),
        Wrong(
            C,
            named(
                clip(error=lambda b, x, s, c: ((b - x) / s).square().sum()),
                "error_of_codes",
            ),
            "those of codes",
        ),
        Wrong(
            C,
            named(
                clip(error=lambda b, x, s, c: (b / s - x).square().sum()),
                "codes_against_x",
            ),
            "codes with x",
        ),
        Wrong(
            C,
            named(clip(error=lambda b, x, s, c: (b - x).abs().max()), "largest_error"),
            "largest error",
        ),
        Wrong(C, named(clip(top=lambda b: 2**b - 1), "too_many_levels"), "2^(b−1) − 1"),
        Wrong(C, named(clip(choose=max), "worst"), "largest"),
        Wrong(C, the_error_itself, "not one of the candidates"),
        Wrong(C, its_place, "its place"),
        Wrong(C, no_clipping, "largest candidate"),
        Wrong(C, lambda x, bits, candidates: candidates[0], "first candidate"),
        Wrong(C, until_it_rises, "rises for the first time"),
        Wrong(C, without_the_first, "never looked at"),
        Wrong(C, clip(top=lambda b: 7), "the levels of 4 bits"),
        Wrong(C, one_code_more, "the range is symmetric"),
        Wrong(C, clip(error=lambda b, x, s, c: (b - x).abs().sum()), "absolute errors"),
        Wrong(
            INT8, int8_with(128, lambda q: q.clamp(-128, 127)), "cut the codes at 127"
        ),
        Wrong(
            INT8, int8_with(largest=lambda t: t.amax(1, keepdim=True)), "largest value"
        ),
        Wrong(INT8, int8_with(code=lambda q: q.to(torch.int16)), "overflows 16 bits"),
        Wrong(A, affine(zero=math.ceil), "rounded up"),
        Wrong(A, always_8_bits, "the scale of 8 bits"),
        Wrong(G, groups_down_columns, "down the columns"),
        Wrong(G, scale_not_divided, "divide it by"),
    ],
)
