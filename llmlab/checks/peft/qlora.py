"""What marks the exercises of 04-peft/07-qlora."""

from __future__ import annotations

import torch
from torch import Tensor

from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect
from llmlab.peft.qlora import nf4

check = Checks("04-peft/07-qlora")


def _sides(bits: int, offset: float, up: int, down: int) -> Tensor:
    """Quantiles of `up` steps above 0 and of `down` below, and 0."""

    def quantiles(n):
        return torch.special.ndtri(
            torch.linspace(offset, 0.5, n + 1)[:-1].double()
        ).float()

    return torch.cat([-quantiles(down), torch.zeros(1), quantiles(up)]).sort().values


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=4,
    hints=(
        (
            "`torch.linspace(offset, 0.5, n + 1)[:-1]` has n probabilities;"
            " `torch.special.ndtri` makes quantiles of them."
        ),
        (
            "The two sides differ: 2^(k−1) steps for the positive one, 2^(k−1) − 1 for"
            " the negative one. Both begin at offset."
        ),
        (
            "Concatenate −negative side, one 0 and the positive side, sort, and divide"
            " by the largest."
        ),
    ),
)
def normal_float(answer):
    """The levels of NF4, and of other widths, from quantiles of the normal
    distribution.
    """
    bits, offset, what = 4, 0.9677083, "normal_float(4, 0.9677083)"
    got = expect(answer(bits, offset), shape=(16,), dtype=torch.float32, what=what)
    right = nf4.normal_float()
    raw = _sides(bits, offset, 8, 7)
    ndtri = torch.special.ndtri
    up = ndtri(torch.linspace(offset, 0.5, 9))  # with the last, which is 0
    down = -ndtri(torch.linspace(offset, 0.5, 8))
    zero = torch.zeros(1)
    # one probability too few, so that ½ is among them
    short = [ndtri(torch.linspace(offset, 0.5, n)) for n in (7, 8)]

    def scaled(*pieces):
        levels = torch.cat(pieces).sort().values
        return levels / levels.max()

    even = torch.special.ndtri(torch.linspace(1 - offset, offset, 16))
    mirrored = _sides(bits, offset, 7, 8)
    integers = torch.linspace(-1, 1, 16)
    mistakes = {
        "8 levels below 0 and 7 above: it is the other way round": (
            mirrored / mirrored.max()
        ),
        "these are 16 quantiles in a row, none of which is 0: take each side"
        " apart": even / even.max(),
        "the levels are not divided by the largest": raw,
        "they are in falling order": right.flip(0),
        "these are evenly spaced levels, as integers have: take quantiles": integers,
        "each side is evenly spaced: the probabilities are, and `ndtri` makes levels"
        " of them that are not": (
            p := torch.cat(
                [
                    0.5 - torch.linspace(offset, 0.5, 8)[:-1],
                    torch.zeros(1),
                    torch.linspace(offset, 0.5, 9)[:-1] - 0.5,
                ]
            )
            .sort()
            .values
        )
        / p.max(),
        "the levels are divided by their sum: by the largest": raw / raw.abs().sum(),
        "`erfinv` of a probability is not its quantile: use `ndtri`": (
            e := torch.cat(
                [
                    -torch.erfinv(torch.linspace(offset, 0.5, 8)[:-1]),
                    torch.zeros(1),
                    torch.erfinv(torch.linspace(offset, 0.5, 9)[:-1]),
                ]
            )
            .sort()
            .values
        )
        / e.max(),
        "the level 0 is missing: one side has a level too many": scaled(
            -up[:-1], up[:-1]
        ),
        "½ is among your probabilities: its quantile is 0, so take one more and leave"
        " it out": scaled(-short[0], zero, short[1]),
        "you left out the first probability, `offset`: leave out the last, ½": scaled(
            down[1:], zero, up[1:]
        ),
        "the negative side is the positive one mirrored, without a level: it has"
        " probabilities of its own": scaled(-up[:-2], zero, up[:-1]),
        "the negative side is the positive one mirrored, without its largest: it has"
        " probabilities of its own": scaled(-up[1:-1], zero, up[:-1]),
        "offset is not used: it is the largest probability": (
            m := _sides(bits, 0.99, 8, 7)
        )
        / m.max(),
    }
    diagnose(got, right=right, mistakes=mistakes, tol=1e-5, what=what)
    # the oracle: the published table
    if not close(got, torch.tensor(nf4.NF4), tol=1e-5):
        raise Mistake("the levels differ from those that are published")
    _three_bits(answer(3, 0.95))


def _three_bits(got) -> None:
    """Another width and another offset."""
    if getattr(got, "shape", None) == (16,):
        raise Mistake("3 bits have 8 levels, yours are 16: take the bits' number")
    expect(got, shape=(8,), dtype=torch.float32, what="normal_float(3, 0.95)")
    if not close(got, nf4.normal_float(3, 0.95), tol=1e-5):
        raise Mistake(
            "right for 4 bits, wrong for 3 bits with an offset of 0.95: take both from"
            " the arguments"
        )


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=5,
    hints=(
        (
            "`w.reshape(-1, block)` has one block a row; its scale is the largest"
            " absolute value of that row."
        ),
        (
            "The distance of each weight to each level is a tensor of one dimension"
            " more: (blocks, block, 1) − (L,)."
        ),
        (
            "argmin over that last dimension is the code. Clamp the scale from below"
            " before you divide."
        ),
    ),
)
def quantize(answer):
    """Codes of the nearest levels, block by block, and the scales."""
    levels = torch.tensor([-1.0, -0.55, -0.2, 0.0, 0.3, 0.4, 0.62, 1.0])
    w = torch.randn(6, 12) * torch.tensor([0.2, 1, 5, 1, 0.5, 2])[:, None]
    w[0, 0], w[2, 3] = -7.0, 30.0  # the largest of a block is negative; an outlier
    codes, scales = _pair(answer(w, levels, 8), (9, 8), (9,))
    right, mistakes = _quantized(w, levels)
    diagnose(
        torch.cat([codes.float(), scales[:, None]], dim=1),
        right=right,
        mistakes=mistakes,
        parts={
            "your tensor of scales": (slice(None), -1),
            "your tensor of codes": (slice(None), slice(None, -1)),
        },
    )
    normal = torch.randn(4, 64)
    q = nf4.quantize(normal, double=False)  # an independent reference
    codes, scales = _pair(answer(normal, torch.tensor(nf4.NF4), 64), (4, 64), (4,))
    if not close(torch.tensor(nf4.NF4)[codes] * scales[:, None], nf4.dequantize(q)):
        raise Mistake(
            "right for these 8 levels and blocks of 8, wrong for NF4 and blocks of 64"
        )
    tiny = normal * 1e-4
    _, small = _pair(answer(tiny, levels, 64), (4, 64), (4,))
    if not close(small, tiny.abs().amax(1)):
        raise Mistake(
            "the scales of small weights are too large: guard the division against 0,"
            " and let the scale be the largest |w| as it is"
        )
    zeros, nothing = _pair(answer(torch.zeros(16), levels, 8), (2, 8), (2,))
    if not close(levels[zeros], torch.zeros(2, 8)):
        raise Mistake("a block of zeros must get the code of the level 0")
    if nothing.any():
        raise Mistake(
            "the scale of a block of zeros is its largest |w|, 0: put a stand-in only"
            " where you divide"
        )


def _quantized(w: Tensor, levels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes and scales of blocks of 8, side by side, and what mistakes make of them."""
    blocks = w.reshape(-1, 8)
    c = blocks.abs().amax(1)

    def coded(scale: Tensor) -> Tensor:
        return ((blocks / scale)[..., None] - levels).abs().argmin(-1)

    signed, whole = blocks.amax(1), w.abs().max()
    pair = lambda q, s: torch.cat([q.float(), s.expand(9)[:, None]], dim=1)  # noqa: E731
    below = (torch.searchsorted(levels, blocks / c[:, None], right=True) - 1).clamp(
        0, 7
    )
    columns = w.T.reshape(-1, 8)
    mistakes = {
        "the scale is the largest |w|: you took the largest w": pair(
            coded(signed[:, None]), signed
        ),
        "one scale serves all: each block has its own": pair(coded(whole), whole),
        "you took the level below, not the nearest": pair(below, c),
        "you took the next level above, not the nearest": pair(
            torch.searchsorted(levels, blocks / c[:, None]).clamp(0, 7), c
        ),
        "the weights are not divided by the scale": pair(coded(torch.ones(1)), c),
        "you multiplied by the scale: divide": pair(coded(1 / c[:, None]), c),
        "round is for evenly spaced levels: look for the nearest of these": pair(
            ((blocks / c[:, None] + 1) / 2 * 7).round(), c
        ),
        "blocks run along the rows: yours run down the columns": _pair_of(
            columns, levels
        ),
        "the scale is the largest |w|: you took the mean": pair(
            coded((s := blocks.abs().mean(1))[:, None]), s
        ),
        "the scale is the largest |w|: you took the standard deviation": pair(
            coded((s := blocks.std(1))[:, None]), s
        ),
        "the scale is the largest |w|: you took the root of the mean square": pair(
            coded((s := blocks.square().mean(1).sqrt())[:, None]), s
        ),
        "the scale is the largest |w|: you took half of the range, max − min": pair(
            coded((s := (blocks.amax(1) - blocks.amin(1)) / 2)[:, None]), s
        ),
        "the codes count from the largest level down: levels[code] is the nearest": (
            pair(7 - coded(c[:, None]), c)
        ),
        "the codes count from 1: levels[code] is the nearest": pair(
            coded(c[:, None]) + 1, c
        ),
        "your blocks take every ninth weight: a block is `block` neighbours": _pair_of(
            w.reshape(8, -1).T, levels
        ),
    }
    return pair(coded(c[:, None]), c), mistakes


def _pair_of(blocks: Tensor, levels: Tensor) -> Tensor:
    """Codes and scales of other blocks, side by side."""
    scale = blocks.abs().amax(1, keepdim=True)
    codes = ((blocks / scale)[..., None] - levels).abs().argmin(-1)
    return torch.cat([codes.float(), scale], dim=1)


def _pair(value: object, codes: tuple, scales: tuple) -> tuple[Tensor, Tensor]:
    expect(value, kind=(tuple, list), what="quantize(…)")
    if len(value) != 2:
        raise Mistake(
            f"quantize returned {len(value)} things: return the codes, then the scales"
        )
    if (
        getattr(value[0], "shape", None) == scales
        and getattr(value[1], "shape", None) == codes
    ):
        raise Mistake("they are in the wrong order: return the codes, then the scales")
    return (
        expect(value[0], shape=codes, dtype=torch.int64, what="codes"),
        expect(value[1], shape=scales, dtype=torch.float32, what="scales"),
    )


@check.exercise(
    points=2,
    minutes=10,
    difficulty=3,
    importance=3,
    hints=(
        (
            "The steps are: subtract the mean of all scales, block, divide by c₂,"
            " nearest level. Then each step undone, backwards."
        ),
        (
            "`tensor.split(block)` gives blocks and a shorter last one. c₂ is a block's"
            " largest |c − mean|."
        ),
        (
            "For one block: levels[(part[:, None] / c2 - levels).abs().argmin(1)] * c2"
            " + mean."
        ),
    ),
)
def double_quantize(answer):
    """The scales after a trip through 8 bits, their mean subtracted first."""
    levels = torch.linspace(-1, 1, 256)
    c, block, what = torch.rand(50) ** 2 + 2.0, 16, "double_quantize(…)"
    got = expect(answer(c, levels, block), shape=(50,), dtype=torch.float32, what=what)

    right, mistakes = _trips(c, levels, block)
    diagnose(got, right=right, mistakes=mistakes, tol=1e-6, what=what)
    many = torch.rand(700) + 1
    # the reference, another codebook
    codes, c2 = nf4.encode_8bit(many - many.mean(), grid=None)
    right = (
        nf4.dynamic_map()[codes.int()] * c2.repeat_interleave(256)[:700] + many.mean()
    )
    if not close(answer(many, nf4.dynamic_map(), 256), right, tol=1e-5):
        raise Mistake(
            "right for blocks of 16 and even levels, wrong for blocks of 256 and"
            " bitsandbytes' levels"
        )
    if not close(answer(torch.full((5,), 3.0), levels, 4), torch.full((5,), 3.0)):
        raise Mistake(
            "equal scales must come back as they are: without their mean nothing is"
            " left, so c₂ is 0. Mind 0 / 0, and let no stand-in for c₂ be multiplied"
            " back"
        )


def _trips(c: Tensor, levels: Tensor, block: int) -> tuple[Tensor, dict[str, Tensor]]:
    """50 scales after their trip through 8 bits, and what mistakes make of them."""

    def trip(shift: Tensor, size: int = block, back: Tensor | None = None) -> Tensor:
        parts = [(p, p.abs().max()) for p in (c - shift).split(size)]
        there = torch.cat(
            [levels[(p[:, None] / c2 - levels).abs().argmin(1)] * c2 for p, c2 in parts]
        )
        return there + (shift if back is None else back)

    def trip_by(code, c2_of=lambda part: part.abs().max(), parts=None, back=None):
        """Another way to code, another c₂, other blocks, or another mean."""
        out = []
        for part in (c - mean).split(block) if parts is None else parts:
            c2 = c2_of(part)
            out.append(code(part / c2) * c2)
        return torch.cat(out)[:50] + (mean if back is None else back)

    def nearest(x):
        return levels[(x[:, None] - levels).abs().argmin(1)]

    def above(x):
        return levels[torch.searchsorted(levels, x).clamp(max=255)]

    def below(x):
        return levels[(torch.searchsorted(levels, x, right=True) - 1).clamp(min=0)]

    mean, zero = c.mean(), torch.zeros(())
    padded = torch.cat([c, torch.zeros(14)])
    joined = [(c - mean)[:16], (c - mean)[16:32], (c - mean)[32:]]
    each = torch.cat([part.mean().expand(len(part)) for part in c.split(block)])
    mistakes = {
        "the mean is not subtracted: half of the levels are negative and stay unused": (
            trip(zero)
        ),
        "the mean is not added again": trip(mean, back=zero),
        "the mean is that of all scales, not of each block": trip(each),
        "one c₂ serves all: each block has its own": trip(mean, 50),
        "the smallest scale is subtracted, not the mean": trip(c.min()),
        "the median is subtracted, not the mean": trip(c.median()),
        "c₂ is not multiplied back": torch.cat(
            [
                levels[(p[:, None] / p.abs().max() - levels).abs().argmin(1)] + mean
                for p in (c - mean).split(block)
            ]
        ),
        "nothing is rounded: these are the scales as they were": c,
        "the last block, which is shorter, is not rounded": torch.cat(
            [trip(mean)[:48], c[48:]]
        ),
        "the last block, which is shorter, is lost in the one before it": trip_by(
            nearest, parts=joined
        ),
        "the zeros that you padded with count in the mean": trip(padded.mean()),
        "the zeros that you padded with count in the mean, and in the last c₂": trip_by(
            nearest,
            parts=(padded - padded.mean()).split(block),
            back=padded.mean(),
        ),
        "the zeros that you padded with count in the last c₂: pad after the mean is"
        " subtracted": trip_by(nearest, parts=(padded - mean).split(block)),
        "c₂ is the largest absolute value: you took the largest value": trip_by(
            nearest, lambda part: part.max()
        ),
        "you took the next level above, not the nearest": trip_by(above),
        "one c₂ serves all, the mean: each block has its own": trip_by(
            nearest,
            lambda part: torch.stack(
                [p.abs().max() for p in (c - mean).split(block)]
            ).mean(),
        ),
        "c₂ is the largest absolute value: you took the standard deviation": trip_by(
            nearest, lambda part: part.std(unbiased=False)
        ),
        "the mean is added twice": trip(mean) + mean,
        "you took the level below, not the nearest": trip_by(below),
        "you rounded to steps of 1/127, as int8 has: take the nearest of `levels`": (
            trip_by(lambda x: (x * 127).round() / 127)
        ),
    }
    return trip(mean), mistakes


@check.exercise(
    points=3,
    minutes=15,
    difficulty=4,
    importance=5,
    hints=(
        "Rebuild Ŵ first. Then h = x Ŵᵀ + s (x Aᵀ) Bᵀ is a chain of matrix products.",
        "x has two ways to h, so its gradient has two terms: g Ŵ, and s g B A.",
        "∂E/∂A = s (g B)ᵀ x and ∂E/∂B = s gᵀ (x Aᵀ): check by shapes.",
    ),
)
def backward(answer):
    """Gradients of x, A and B through a weight that is in 4 bits."""
    n, d, k, r, s = 5, 6, 8, 3, 2.5
    levels = torch.tensor(nf4.NF4)
    codes, scales = torch.randint(0, 16, (3, 16)), torch.rand(3) + 0.5
    g, x, A, B = (
        torch.randn(n, d),
        torch.randn(n, k),
        torch.randn(r, k),
        torch.randn(d, r),
    )
    three = expect(
        answer(g, x, codes, scales, levels, A, B, s),
        kind=(tuple, list),
        what="backward(…)",
    )
    if len(three) != 3:
        raise Mistake(
            f"backward returned {len(three)} things: return ∂E/∂x, ∂E/∂A and ∂E/∂B"
        )
    shapes = ((n, k), (r, k), (d, r))
    if [tuple(getattr(t, "shape", ())) for t in three] == [(n, k), (d, r), (r, k)]:
        raise Mistake("they are in the wrong order: return those of x, A and B")
    got = [
        expect(t, shape=w, dtype=torch.float32, what=f"∂E/∂{m}")
        for t, w, m in zip(three, shapes, "xAB", strict=True)
    ]
    W = (levels[codes] * scales[:, None]).reshape(d, k)
    leaves = [t.clone().requires_grad_() for t in (x, A, B)]
    h = leaves[0] @ W.T + s * leaves[0] @ leaves[1].T @ leaves[2].T
    # the oracle: autograd on the dequantised weight
    right = torch.autograd.grad(h, leaves, g)
    mistakes = _wrong_ways_to_x(g, codes, scales, levels, A, B, s)
    terms = [{"g Ŵ": g @ W, "s g B A": s * g @ B @ A}]
    diagnose(got[0], right=right[0], mistakes=mistakes, terms=terms, what="∂E/∂x")
    diagnose(
        got[1],
        right=right[1],
        mistakes={
            "s is missing in ∂E/∂A": (g @ B).T @ x,
            "s is applied twice in ∂E/∂A": s * s * (g @ B).T @ x,
            "∂E/∂A is averaged over the rows of the batch: they add up": (
                s * (g @ B).T @ x / n
            ),
        },
        what="∂E/∂A",
    )
    diagnose(
        got[2],
        right=right[2],
        mistakes={
            "s is missing in ∂E/∂B": g.T @ (x @ A.T),
            "s is applied twice in ∂E/∂B": s * s * g.T @ (x @ A.T),
            "∂E/∂B is averaged over the rows of the batch: they add up": (
                s * g.T @ (x @ A.T) / n
            ),
            "∂E/∂B comes from what goes into B, x Aᵀ: you took g B": s * g.T @ (g @ B),
        },
        what="∂E/∂B",
    )


def _wrong_ways_to_x(g, codes, scales, levels, A, B, s) -> dict[str, Tensor]:
    """The gradient of x as mistakes make it."""
    r, k = A.shape
    d = len(B)
    W = (levels[codes] * scales[:, None]).reshape(d, k)
    unscaled, by_columns = (
        levels[codes].reshape(d, k),
        (levels[codes] * scales[:, None]).reshape(k, d).T,
    )
    return {
        "the gradient through B A is missing: x has two ways to h": g @ W,
        "the gradient through Ŵ is missing: it is frozen, but x is not": (
            s * g @ B @ A
        ),
        "the scales are missing: Ŵ is the level times the scale of its block": (
            g @ unscaled + s * g @ B @ A
        ),
        "Ŵ is transposed: its codes lie row after row": (
            g @ by_columns + s * g @ B @ A
        ),
        "s is missing in the gradient through B A": g @ W + g @ B @ A,
        "you used the codes as if they were the levels": (
            g @ (codes * scales[:, None]).reshape(d, k) + s * g @ B @ A
        ),
        "s scales the low-rank way alone, not Ŵ": s * (g @ W + g @ B @ A),
        "s is the whole scale: it is not divided by r": (g @ W + s / r * g @ B @ A),
        "s is applied twice in the gradient through B A": (g @ W + s * s * g @ B @ A),
        "the scales are dealt out in turn: the first `block` weights share the first": (
            g @ (levels[codes].flatten() * scales.repeat(16)).reshape(d, k)
            + s * g @ B @ A
        ),
    }
