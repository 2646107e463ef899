"""Wrong answers to the exercises of 04-peft/07-qlora, each with the diagnosis that it
must get.
"""

import pytest
import torch

from llmlab.checks.peft.qlora import check
from tests.checks.rejecting import Wrong, rejects, verdict


def sides(
    up,
    down,
    divide=True,
    at=lambda offset: offset,
    quantile=torch.special.ndtri,
    end=lambda x: x,
):
    """normal_float with other numbers of steps above and below 0, and other details."""

    def normal_float(bits, offset):
        half = 2 ** (bits - 1)

        def side(n):
            return quantile(torch.linspace(at(offset), 0.5, n + 1)[:-1])

        levels = (
            torch.cat([-side(half + down), torch.zeros(1), side(half + up)])
            .sort()
            .values
        )
        return end(levels / levels.max() if divide else levels)

    return normal_float


def in_a_row(bits, offset):
    levels = torch.special.ndtri(torch.linspace(1 - offset, offset, 2**bits))
    return levels / levels.max()


def even(bits, offset):
    return torch.linspace(-1, 1, 2**bits)


def table(bits, offset):
    from llmlab.peft.qlora.nf4 import NF4

    return torch.tensor(NF4)


LEVELS = [
    Wrong("normal_float", sides(-1, 0), "the other way round"),
    Wrong("normal_float", sides(0, -1, divide=False), "not divided"),
    Wrong("normal_float", sides(0, -1, end=lambda x: x.flip(0)), "falling order"),
    Wrong("normal_float", sides(0, -1, at=lambda _: 0.99), "offset is not used"),
    Wrong("normal_float", sides(0, -1, at=lambda _: 0.9677083), "wrong for 3 bits"),
    Wrong(
        "normal_float", sides(0, -1, quantile=lambda p: p - 0.5), "the probabilities"
    ),
    Wrong("normal_float", sides(0, 0), "shape (17,)"),
    Wrong("normal_float", in_a_row, "none of which is 0"),
    Wrong("normal_float", even, "evenly spaced"),
    Wrong("normal_float", table, "3 bits have 8 levels, yours are 16"),
]


def nearest(scaled, levels):
    return (scaled[..., None] - levels).abs().argmin(-1)


def rounded(
    scale=lambda b: b.abs().amax(1),
    code=nearest,
    blocks=lambda w, n: w.reshape(-1, n),
    divide=torch.div,
):
    """quantize with another scale, another rule for the code, or other blocks."""

    def quantize(w, levels, block):
        parts = blocks(w, block)
        scales = scale(parts)
        safe = torch.where(scales == 0, 1.0, scales)
        return code(divide(parts, safe[:, None]), levels), scales

    return quantize


def no_zero_guard(w, levels, block):
    blocks = w.reshape(-1, block)
    scales = blocks.abs().amax(1)
    return nearest(blocks / scales[:, None], levels), scales


def swapped(w, levels, block):
    return rounded()(w, levels, block)[::-1]


def dequantized(w, levels, block):
    codes, scales = rounded()(w, levels, block)
    return levels[codes] * scales[:, None]


def eight(w, levels, block):
    return rounded()(w, levels, 8)


WEIGHTS = [
    Wrong("quantize", rounded(lambda b: b.amax(1)), "the largest w"),
    Wrong(
        "quantize",
        rounded(lambda b: b.abs().max().expand(len(b)).clone()),
        "one scale serves all",
    ),
    Wrong(
        "quantize",
        rounded(
            code=lambda x, levels: (
                torch.searchsorted(levels, x, right=True) - 1
            ).clamp(0, 7)
        ),
        "level below",
    ),
    Wrong(
        "quantize",
        rounded(code=lambda x, levels: torch.searchsorted(levels, x).clamp(0, 7)),
        "level above",
    ),
    Wrong("quantize", rounded(divide=lambda w, s: w), "not divided"),
    Wrong("quantize", rounded(divide=torch.mul), "you multiplied"),
    Wrong(
        "quantize",
        rounded(
            code=lambda x, levels: ((x + 1) / 2 * (len(levels) - 1)).round().long()
        ),
        "evenly spaced",
    ),
    Wrong(
        "quantize", rounded(blocks=lambda w, n: w.T.reshape(-1, n)), "down the columns"
    ),
    Wrong("quantize", rounded(lambda b: b.abs().mean(1)), "the mean"),
    Wrong("quantize", no_zero_guard, "block of zeros"),
    Wrong("quantize", swapped, "wrong order"),
    Wrong("quantize", dequantized, "tuple or list"),
    Wrong("quantize", eight, "shape"),
]


def scales(shift=lambda c: c.mean(), back=None, size=None, again=True):
    """double_quantize with another shift, another way back, or another block."""

    def double_quantize(c, levels, block):
        moved, parts = c - shift(c), []
        for part in moved.split(size or block):
            c2 = part.abs().max().clamp(min=1e-38)
            parts.append(levels[nearest(part / c2, levels)] * (c2 if again else 1))
        return torch.cat(parts) + (shift if back is None else back)(c)

    return double_quantize


def mean_of_each_block(c, levels, block):
    return torch.cat([scales()(part, levels, block) for part in c.split(block)])


def in_place(c, levels, block):
    c -= c.mean()
    return c


SCALES = [
    Wrong("double_quantize", scales(lambda c: 0), "not subtracted"),
    Wrong("double_quantize", scales(back=lambda c: 0), "not added again"),
    Wrong("double_quantize", scales(size=10_000), "one c₂ serves all"),
    Wrong("double_quantize", scales(lambda c: c.min()), "smallest"),
    Wrong("double_quantize", scales(lambda c: c.median()), "median"),
    Wrong("double_quantize", scales(again=False), "not multiplied back"),
    Wrong("double_quantize", scales(size=16), "blocks of 256"),
    Wrong("double_quantize", mean_of_each_block, "not of each block"),
    Wrong("double_quantize", lambda c, levels, block: c, "nothing is rounded"),
    Wrong("double_quantize", in_place, "in place"),
]


def gradients(
    x=lambda g, W, A, B, s: g @ W + s * g @ B @ A, A=lambda s: s, B=lambda s: s, W=None
):
    """backward with another gradient of x, other scales, or another Ŵ."""

    def backward(g, inputs, codes, c, levels, a, b, s):
        weight = (
            (levels[codes] * c[:, None]).reshape(len(b), a.shape[1])
            if W is None
            else W(codes, c, levels, a, b)
        )
        return (
            x(g, weight, a, b, s),
            A(s) * (g @ b).T @ inputs,
            B(s) * g.T @ (inputs @ a.T),
        )

    return backward


def two_things(g, x, codes, c, levels, A, B, s):
    return gradients()(g, x, codes, c, levels, A, B, s)[1:]


def transposed_A(g, x, codes, c, levels, A, B, s):
    dx, dA, dB = gradients()(g, x, codes, c, levels, A, B, s)
    return dx, dA.T, dB


BACK = [
    Wrong("backward", gradients(lambda g, W, A, B, s: g @ W), "through B A is missing"),
    Wrong(
        "backward",
        gradients(lambda g, W, A, B, s: s * g @ B @ A),
        "through Ŵ is missing",
    ),
    Wrong(
        "backward",
        gradients(lambda g, W, A, B, s: g @ W + g @ B @ A),
        "s is missing in the gradient through",
    ),
    Wrong(
        "backward", gradients(lambda g, W, A, B, s: s * (g @ W + g @ B @ A)), "not Ŵ"
    ),
    Wrong("backward", gradients(A=lambda s: 1), "s is missing in ∂E/∂A"),
    Wrong("backward", gradients(A=lambda s: s * s), "twice in ∂E/∂A"),
    Wrong("backward", gradients(B=lambda s: 1), "s is missing in ∂E/∂B"),
    Wrong("backward", gradients(B=lambda s: s * s), "twice in ∂E/∂B"),
    Wrong(
        "backward",
        gradients(
            W=lambda codes, c, levels, A, B: levels[codes].reshape(len(B), A.shape[1])
        ),
        "scales are missing",
    ),
    Wrong(
        "backward",
        gradients(
            W=lambda codes, c, levels, A, B: (
                (levels[codes] * c[:, None]).reshape(A.shape[1], len(B)).T
            )
        ),
        "transposed",
    ),
    Wrong(
        "backward",
        gradients(
            W=lambda codes, c, levels, A, B: (codes * c[:, None]).reshape(
                len(B), A.shape[1]
            )
        ),
        "as if they were the levels",
    ),
    Wrong("backward", two_things, "2 things"),
    Wrong("backward", transposed_A, "shape"),
]

# Kinds of mistake that once had no sentence, or got through.


def levels_of(down, up):
    """normal_float from the probabilities of each side, given the positive ones."""

    def normal_float(bits, offset):
        n = 2 ** (bits - 1)
        sides = [down(offset, n), torch.zeros(1), up(offset, n)]
        levels = torch.cat(sides).sort().values
        return levels / levels.max()

    return normal_float


def quantiles(offset, n, part=slice(-1)):
    return torch.special.ndtri(torch.linspace(offset, 0.5, n + 1)[part])


def without_zero(bits, offset):
    side = quantiles(offset, 2 ** (bits - 1))
    levels = torch.cat([-side, side]).sort().values
    return levels / levels.max()


def up(offset, n):
    return quantiles(offset, n)


def nearest(x, levels):
    return (x[..., None] - levels).abs().argmin(-1)


def coded(scale, shown=lambda s: s, cut=lambda w, n: w.reshape(-1, n)):
    """quantize with another scale, or with one scale for dividing and one shown."""

    def quantize(w, levels, block):
        blocks = cut(w, block)
        s = scale(blocks)
        return nearest(blocks / s.clamp(min=1e-30)[:, None], levels), shown(s)

    return quantize


def largest(blocks):
    return blocks.abs().amax(1)


def padded_first(mean_of_all):
    """double_quantize of whole blocks, filled up with zeros before the mean."""

    def double_quantize(c, levels, block):
        filled = torch.cat([c, torch.zeros(-len(c) % block)])
        mean = (filled if mean_of_all else c).mean()
        parts = (filled - mean).reshape(-1, block)
        c2 = parts.abs().amax(1, keepdim=True)
        return (levels[nearest(parts / c2, levels)] * c2).flatten()[: len(c)] + mean

    return double_quantize


def trip(
    c2=lambda p: p.abs().max().clamp(min=1e-30),
    code=None,
    split=lambda c, n: c.split(n),
):
    def double_quantize(c, levels, block):
        out = []
        for part in split(c - c.mean(), block):
            s = c2(part)
            there = code(part / s) if code else levels[nearest(part / s, levels)]
            out.append(there * s)
        return torch.cat(out) + c.mean()

    return double_quantize


def last_block_joined(c, block):
    whole = len(c) // block - 1
    return [*c[: whole * block].split(block), c[whole * block :]]


def last_block_left(c, levels, block):
    whole = len(c) // block * block
    return torch.cat([trip()(c, levels, block)[:whole], c[whole:]])


def returns(change):
    """backward with the three gradients changed."""

    def backward(g, x, codes, scales, levels, A, B, s):
        W = (levels[codes] * scales[:, None]).reshape(len(B), A.shape[1])
        return change(
            g @ W + s * g @ B @ A, s * (g @ B).T @ x, s * g.T @ (x @ A.T), len(x)
        )

    return backward


def scales_in_turn(g, x, codes, scales, levels, A, B, s):
    flat = levels[codes].flatten() * scales.repeat(codes.shape[1])
    W = flat.reshape(len(B), A.shape[1])
    return g @ W + s * g @ B @ A, s * (g @ B).T @ x, s * g.T @ (x @ A.T)


MORE = [
    Wrong("normal_float", without_zero, "the level 0 is missing"),
    Wrong(
        "normal_float",
        levels_of(
            lambda p, n: -quantiles(p, n - 2, slice(None)),
            lambda p, n: quantiles(p, n - 1, slice(None)),
        ),
        "½ is among your probabilities",
    ),
    Wrong(
        "normal_float",
        levels_of(
            lambda p, n: -quantiles(p, n - 1, slice(1, None)),
            lambda p, n: quantiles(p, n, slice(1, None)),
        ),
        "left out the first probability",
    ),
    Wrong("normal_float", levels_of(lambda p, n: -up(p, n)[:-1], up), "mirrored"),
    Wrong("normal_float", levels_of(lambda p, n: -up(p, n)[1:], up), "mirrored"),
    Wrong("quantize", coded(lambda b: b.std(1)), "standard deviation"),
    Wrong("quantize", coded(lambda b: largest(b).clamp(min=1e-3)), "small weights"),
    Wrong(
        "quantize",
        coded(largest, lambda s: torch.where(s == 0, 1.0, s)),
        "put a stand-in only",
    ),
    Wrong(
        "quantize",
        coded(largest, cut=lambda w, n: w.reshape(n, -1).T),
        "every ninth weight",
    ),
    Wrong("double_quantize", padded_first(True), "count in the mean"),
    Wrong("double_quantize", padded_first(False), "count in the last c₂"),
    Wrong("double_quantize", last_block_left, "is not rounded"),
    Wrong("double_quantize", trip(split=last_block_joined), "the one before it"),
    Wrong("double_quantize", trip(lambda p: p.max()), "took the largest value"),
    Wrong("double_quantize", trip(code=lambda x: (x * 127).round() / 127), "1/127"),
    Wrong("backward", scales_in_turn, "dealt out in turn"),
    Wrong("backward", returns(lambda x, A, B, n: (x, B, A)), "wrong order"),
    Wrong("backward", returns(lambda x, A, B, n: (x, A / n, B / n)), "averaged"),
]


def between_levels(w, levels, block):
    blocks = w.reshape(-1, block)
    scales = largest(blocks)
    inside = blocks / torch.where(scales == 0, 1.0, scales)[:, None]
    return torch.bucketize(inside, (levels[1:] + levels[:-1]) / 2), scales


def by_autograd(g, x, codes, scales, levels, A, B, s):
    W = (levels[codes] * scales[:, None]).reshape(len(B), A.shape[1])
    x, A, B = (t.clone().requires_grad_() for t in (x, A, B))
    return torch.autograd.grad(x @ W.T + s * x @ A.T @ B.T, (x, A, B), g)


def one_by_one(bits, offset):
    n = 2 ** (bits - 1)
    levels = [0.0]
    for sign, count in ((1, n), (-1, n - 1)):
        for i in range(count):
            p = torch.tensor(offset + (0.5 - offset) * i / count).double()
            levels.append(sign * torch.special.ndtri(p).item())
    return torch.tensor([level / max(levels) for level in sorted(levels)])


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("normal_float", one_by_one),
        ("quantize", between_levels),
        ("double_quantize", trip()),
        ("backward", by_autograd),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)


test_wrong_answers = rejects(
    "04-peft/07-qlora", LEVELS + WEIGHTS + SCALES + BACK + MORE
)
