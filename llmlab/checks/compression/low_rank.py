"""Checks of 06-compression/14-low-rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmlab.checks.telling import telling
from llmlab.compression.low_rank import (
    E2M1,
    MXFP4,
    block_formats,
    float_formats,
    svd,
)
from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect

check = Checks("06-compression/14-low-rank")

LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def two(value: object, what: str, names: str) -> tuple:
    """The pair that was asked for."""
    pair = expect(value, kind=(tuple, list), what=what)
    if len(pair) != 2:
        raise Mistake(f"{what} returned {len(pair)} things: return {names}")
    return tuple(pair)


def product(value: object, W: Tensor, rank: int, what: str) -> Tensor:
    """A B, once both have their shapes."""
    A, B = two(value, what, "A and B")
    every = min(W.shape)
    if isinstance(A, Tensor) and A.shape == (len(W), every) and rank < every:
        raise Mistake(
            f"A has {every} columns: of all {every} singular values keep the first"
            " `rank` alone, in A and in B"
        )
    expect(A, shape=(len(W), rank), dtype=torch.float32, what="A")
    expect(B, shape=(rank, W.shape[1]), dtype=torch.float32, what="B")
    return A @ B


# 1 ------------------------------------------------------------------------------------


def nearest(W: Tensor, rank: int, power: float = 1.0, last: bool = False) -> Tensor:
    """Σ σ_i^power u_i v_iᵀ over the first terms, or the last."""
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    kept = slice(-rank, None) if last else slice(rank)
    return U[:, kept] * sigma[kept] ** power @ Vt[kept]


@check.exercise(
    points=2,
    minutes=8,
    difficulty=2,
    importance=5,
    hints=(
        "`torch.linalg.svd(W, full_matrices=False)` gives U, σ and Vᵀ, largest first.",
        "Of U the first `rank` columns, of σ the first numbers, of Vᵀ the first rows.",
        (
            "`U[:, :rank] * sigma[:rank]` is one way to have A, with `Vt[:rank]` as B:"
            " each singular value is counted once."
        ),
    ),
)
def truncate(answer):
    """The nearest matrix of a rank, as two thin factors."""
    # square, so that V in the place of its transpose fits
    W, rank = telling(lambda: (torch.randn(6, 6), 3), nearest, wrong_truncations)
    what = "truncate(W, 3)"
    got = product(answer(W, rank), W, rank, what)
    mistakes = wrong_truncations(W, rank)
    diagnose(got, right=nearest(W, rank), mistakes=mistakes, tol=1e-4, what="A B")
    for shape, rank in (((5, 9), 2), ((9, 4), 1), ((3, 7), 3)):
        W = torch.randn(shape)
        got = product(answer(W, rank), W, rank, f"truncate(W, {rank})")
        if not close(got, nearest(W, rank), tol=1e-4):
            raise Mistake(
                f"right for 6 × 6 weights and rank 3, wrong for {shape[0]} × {shape[1]}"
                f" and rank {rank}"
            )


def wrong_truncations(W: Tensor, rank: int) -> dict[str, Tensor]:
    """What usual mistakes give for A B."""
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    centred = W - W.mean(0)
    return {
        "the singular values are missing: A or B must carry them": nearest(W, rank, 0),
        "the singular values are counted twice: A or B carries them, or each their"
        " root": nearest(W, rank, 2),
        "only one of the factors has the root of σ: the other needs it, too": nearest(
            W, rank, 0.5
        ),
        "these are the smallest singular values: keep the largest": nearest(
            W, rank, last=True
        ),
        "one singular value too few is kept": nearest(W, rank - 1),
        "the largest singular value is left out": (
            U[:, 1 : rank + 1] * sigma[1 : rank + 1] @ Vt[1 : rank + 1]
        ),
        "the singular values multiply the rows of U: they belong to its columns": (
            (sigma[:, None] * U)[:, :rank] @ Vt[:rank]
        ),
        "W is projected on its first columns (as with QR): project on the first columns"
        " of U": W[:, :rank] @ (torch.linalg.pinv(W[:, :rank]) @ W),
        "the third result of `torch.linalg.svd` is Vᵀ already: do not transpose it": (
            U[:, :rank] * sigma[:rank] @ Vt.T[:rank]
        ),
        "these are rows of U, where its first columns are asked": (
            U.T[:, :rank] * sigma[:rank] @ Vt[:rank]
        ),
        "you took the mean off, as for principal components: take W itself": nearest(
            centred, rank
        ),
        "this keeps the first columns of W: they are not the nearest matrix": (
            W[:, :rank] @ torch.eye(len(W.T))[:rank]
        ),
        "these are factors of Wᵀ": nearest(W, rank).T,
    }


# 2 ------------------------------------------------------------------------------------


def problem(out: int, columns: int, tokens: int = 60) -> tuple[Tensor, Tensor]:
    """W, and X Xᵀ of correlated inputs of unequal size."""
    X = torch.randn(columns, columns) @ torch.randn(columns, tokens)
    X *= torch.logspace(-0.5, 0.5, columns)[torch.randperm(columns), None]
    gram = X @ X.T
    return torch.randn(out, columns), 3 * gram / gram.diagonal().mean()


def whitened(W: Tensor, gram: Tensor, rank: int) -> Tensor:
    """The product of exercise 2."""
    return torch.matmul(*svd.truncate_whitened(W, gram, rank))


@check.exercise(
    points=3,
    minutes=12,
    difficulty=3,
    importance=5,
    hints=(
        (
            "Three steps: S from `torch.linalg.cholesky(gram)`, the SVD of W S, and S"
            " taken out again."
        ),
        "A B S must be the truncated W S: so B is what stands on the right, times S⁻¹.",
        "`B = Vt[:rank] @ torch.linalg.inv(S)`, and A = `U[:, :rank] * sigma[:rank]`.",
    ),
)
def truncate_whitened(answer):
    """The factors that change the layer's outputs least."""

    def draw() -> tuple[Tensor, Tensor, int]:
        return (*problem(6, 6), 2)

    W, gram, rank = telling(draw, whitened, wrong_whitenings)
    got = product(answer(W, gram, rank), W, rank, "truncate_whitened(W, gram, 2)")
    right = whitened(W, gram, rank)
    mistakes = wrong_whitenings(W, gram, rank)
    diagnose(got, right=right, mistakes=mistakes, tol=2e-3, what="A B")
    for (out, columns), rank in (((4, 7), 3), ((9, 5), 1)):
        W, gram = problem(out, columns)
        what = f"truncate_whitened(W, gram, {rank})"
        got = product(answer(W, gram, rank), W, rank, what)
        if not close(got, whitened(W, gram, rank), tol=2e-3):
            raise Mistake(
                f"right for 6 × 6 weights and rank 2, wrong for {out} × {columns} and"
                f" rank {rank}"
            )


def wrong_whitenings(W: Tensor, gram: Tensor, rank: int) -> dict[str, Tensor]:
    """What usual mistakes give for A B."""
    S = torch.linalg.cholesky(gram)
    inverse = torch.linalg.inv(S)

    def through(there: Tensor, back: Tensor, **kept) -> Tensor:
        return nearest(W @ there, rank, **kept) @ back

    root = gram.diagonal().sqrt()
    backwards = torch.linalg.cholesky(torch.linalg.inv(gram.double())).float()
    eye = torch.eye(len(gram))
    return {
        "this is plain truncation: the inputs have no say": nearest(W, rank),
        "S is not taken out again: B must end with S⁻¹": through(S, eye),
        "you multiplied by S again, where S⁻¹ takes it out": through(S, S),
        "this is Sᵀ: with the lower factor S, S Sᵀ = X Xᵀ, it is W S": through(
            S.T, inverse.T
        ),
        "S is taken out transposed: what went in as S leaves as S⁻¹": through(
            S, inverse.T
        ),
        "you took X Xᵀ itself: its factor S is asked": through(
            gram, torch.linalg.inv(gram)
        ),
        "you took X Xᵀ itself, and did not take it out again: decompose W S with its"
        " factor S, and let B end with S⁻¹": through(gram, eye),
        "you multiplied by Sᵀ, where S⁻¹ takes it out": through(S, S.T),
        "S and S⁻¹ are swapped: W S is decomposed": through(inverse, S),
        "only the diagonal of X Xᵀ is used: inputs vary together, too": through(
            root.diag(), (1 / root).diag()
        ),
        "the singular values are missing": through(S, inverse, power=0),
        "the singular values are counted twice": through(S, inverse, power=2),
        "only one of the factors has the root of σ": through(S, inverse, power=0.5),
        "these are the smallest singular values: keep the largest": through(
            S, inverse, last=True
        ),
        "one singular value too few is kept": nearest(W @ S, rank - 1) @ inverse,
        "S comes in twice: W S is decomposed": through(S @ S, inverse),
        "this has the inverse of X Xᵀ in the place of X Xᵀ": through(
            backwards, torch.linalg.inv(backwards)
        ),
        "S stands on the left: W S is decomposed": inverse @ nearest(S @ W, rank),
        "S⁻¹ is at the side of A: S came in on the right, at the side of B": (
            inverse @ nearest(W @ S, rank)
        ),
        "W is truncated first, and nothing is whitened then": nearest(W, rank) @ S,
    }


# 3 ------------------------------------------------------------------------------------


@check.exercise(
    points=3,
    minutes=12,
    difficulty=3,
    importance=4,
    hints=(
        (
            "|x| lies between two levels. The border is the middle between them:"
            " 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5. The code counts the borders passed."
        ),
        (
            "At a border the even code wins: at 0.25, 1.25, 2.5 and 5 the lower, at"
            " 0.75, 1.75 and 3.5 the upper. So `>` for some borders, `>=` for others."
        ),
        (
            "`(size[..., None] > borders[0::2]).sum(-1) + (size[..., None] >="
            " borders[1::2]).sum(-1)`, and 8 more where `x.signbit()`."
        ),
    ),
)
def e2m1_codes(answer):
    """The codes of the nearest E2M1 levels."""
    x = e2m1_inputs()
    what = "e2m1_codes(x)"
    got = expect(answer(x), shape=tuple(x.shape), dtype=torch.uint8, what=what)
    right = float_formats.encode(x, E2M1)
    diagnose(got.int(), right=right.int(), mistakes=wrong_codes(x), what=what)
    for shape in ((5,), (2, 3, 4)):
        x = 3 * torch.randn(shape)
        got = expect(answer(x), shape=shape, dtype=torch.uint8, what=what)
        if not torch.equal(got, float_formats.encode(x, E2M1)):
            raise Mistake(f"right for a matrix, wrong for x of shape {shape}")


def e2m1_inputs() -> Tensor:
    """Ties, levels, values beyond both ends, and others, of both signs: (4, 12)."""
    middle = (LEVELS[1:] + LEVELS[:-1]) / 2
    special = torch.cat([middle, LEVELS[1:], torch.tensor([0.1, 0.6, 7.5, 9.0, 40.0])])
    x = torch.cat([special, -special, torch.zeros(1), torch.randn(9) * 3])  # 48
    return x[torch.randperm(len(x))].reshape(4, 12)


def wrong_codes(x: Tensor) -> dict[str, Tensor]:
    """What usual mistakes give for the codes."""
    size = x.abs()[..., None]
    middle = (LEVELS[1:] + LEVELS[:-1]) / 2
    sign = x.signbit().int() * 8
    code = float_formats.encode(x.abs(), E2M1).int()
    no_half = (size > middle[2:]).sum(-1) + (size > 0.5).sum(-1) * 2
    up, down = (size >= middle).sum(-1), (size > middle).sum(-1)
    even_level = torch.where(LEVELS[up] % 2 == 0, up, down)
    return {
        "ties go to the larger level: they go to the even code": (
            (size >= middle).sum(-1) + sign
        ),
        "ties go to the smaller level: they go to the even code": (
            (size > middle).sum(-1) + sign
        ),
        "ties go to the odd code: they go to the even one": (
            (size > middle[1::2]).sum(-1) + (size >= middle[0::2]).sum(-1) + sign
        ),
        "ties go to the level that is an even number: the even *code* is asked": (
            even_level + sign
        ),
        "ties go to the smaller number, which below 0 is the larger level: they go to"
        " the even code": torch.where(sign > 0, up, down) + sign,
        "ties go to the larger number, which below 0 is the smaller level: they go to"
        " the even code": torch.where(sign > 0, down, up) + sign,
        "these are the levels: their codes are asked": (
            (LEVELS[code] * torch.where(sign > 0, -1, 1)).to(torch.uint8)
        ),
        "the sign adds 4: it is the highest of four bits, 8": code + sign // 2,
        "the sign bit is the wrong way round: it is 1 where x is negative": (
            code + 8 - sign
        ),
        "the sign is missing: negative x has a code 8 larger": code,
        "the sign is the lowest bit here: it is the highest": 2 * code + sign // 8,
        "negative codes are in two's complement: the sign is a bit of its own": (
            torch.where(sign > 0, -code % 16, code)
        ),
        "negative codes are 256 − code: they are code + 8": (
            torch.where(sign > 0, (256 - code) % 256, code)
        ),
        "0 has the code of −0: its sign bit is 0": code + 8 * (x <= 0),
        "these are round(2 |x|): from 2 on the levels are further apart": (
            (2 * x.abs()).round().clamp(max=7).int() + sign
        ),
        "the codes are in the order of the values: the sign is a bit, and 0 has"
        " code 0": torch.where(sign > 0, 7 - code, 8 + code),
        "you cut off to the level below: to the nearest is asked": (
            (size >= LEVELS[1:]).sum(-1) + sign
        ),
        "you went to the level above: to the nearest is asked": (
            (size > LEVELS[:-1]).sum(-1) + sign
        ),
        "these are integers from 0 to 7: the levels are 0, 0.5, 1, 1.5, 2, 3, 4, 6": (
            x.abs().round().clamp(max=7).int() + sign
        ),
        "values beyond 6 must become 6, code 7": (
            torch.where(x.abs() > 7, 8, code) + sign
        ),
        "values beyond 6 wrap around to 0: they must become 6, code 7": (
            torch.where(x.abs() > 7, 0, code) + sign
        ),
        "the level 0.5 is missing, the only subnormal one": no_half + sign,
        "what rounds to 0 loses its sign: −0.1 has code 8": (
            code + torch.where(code > 0, sign, 0)
        ),
    }


# 4 ------------------------------------------------------------------------------------


@check.exercise(
    points=4,
    minutes=18,
    difficulty=4,
    importance=4,
    hints=(
        (
            "`torch.frexp(top)` gives a mantissa in [0.5, 1) and an exponent that is"
            " ⌊log2 top⌋ + 1. A block of zeros needs care: its scale code is 0."
        ),
        (
            "The scale's code is ⌊log2 top⌋ − 2 + 127, clamped to 0 … 254; the elements"
            " are `e2m1_codes(x / 2.0 ** (code - 127.0))`."
        ),
        (
            "Of each pair of codes the first is the low half: `codes[:, 0::2] |"
            " codes[:, 1::2] << 4`."
        ),
    ),
)
def encode_mxfp4(answer):
    """Blocks of 32 as 16 bytes and the code of a power of two."""
    (x,) = telling(lambda: (mx_inputs(),), right_mxfp4, wrong_mxfp4)
    what = "encode_mxfp4(x)"
    got = as_one(answer(x), x, what)
    parts = {"the bytes": slice(0, 16), "the scales": slice(16, 17)}
    diagnose(
        got.T,
        right=right_mxfp4(x).T,
        mistakes={words: value.T for words, value in wrong_mxfp4(x).items()},
        parts=parts,
        what=what,
    )
    for x, on_scales, on_bytes in mx_edges():
        difference = as_one(answer(x), x, what) != right_mxfp4(x)
        if difference[:, 16].any():
            raise Mistake(on_scales)
        if difference.any():
            raise Mistake(on_bytes)


def mx_inputs() -> Tensor:
    """Seven blocks of sizes far apart, some of whose maxima are clipped."""
    x = torch.randn(7, 32)
    x *= 2.0 ** torch.randint(-9, 9, (7, 1))
    x[0] *= 5 / x[0].abs().max()
    x[0, 20] = 7.6  # X is 1: above 6, and above 7
    middle = (LEVELS[1:] + LEVELS[:-1]) / 2
    x[0, :14] = torch.cat([middle, -middle])  # ties
    x[1] *= 6.4 / x[1].abs().max()
    x[2] = x[2].abs() * -1  # the largest value is not the largest |x|
    x[2, 5] *= -0.3
    return x


def mx_edges() -> list[tuple[Tensor, str, str]]:
    """Blocks at the edges; what is wrong when scales differ, and when bytes do."""
    zeros = torch.randn(2, 32)
    zeros[1] = 0
    below = torch.rand(1, 32)
    below[0, 3] = torch.nextafter(torch.tensor(8.0), torch.tensor(0.0))
    large = "right for common sizes, wrong for numbers near 2^120"
    steps = (
        "right for common sizes, wrong where max|x| is just below a power of two: log2"
        " in float32 rounds up to it, torch.frexp does not"
    )
    return [
        (
            zeros,
            "the scale of a block of zeros is to have code 0",
            "the elements of a block of zeros are to have code 0",
        ),
        (below, steps, steps),
        (torch.randn(2, 32) * 2.0**120, large, large),
        (
            torch.randn(2, 32) * 2.0**-130,
            "the code of a scale goes from 0 to 254: where max|x| is below 2^−125, the"
            " exponent plus 127 is less than 0, so clamp it to 0",
            "the code of a scale was clamped to 0, but its elements are not those of"
            " x / 2^−127: divide by the scale that is stored",
        ),
    ]


def as_one(value: object, x: Tensor, what: str) -> Tensor:
    """(blocks, 17): the bytes and the scale of each block, once they fit."""
    packed, scale = two(value, what, "the bytes and the scales")
    expect(packed, shape=(len(x), 16), dtype=torch.uint8, what="the bytes")
    expect(scale, shape=(len(x),), dtype=torch.uint8, what="the scales")
    return torch.cat([packed, scale[:, None]], 1).int()


def mxfp4(
    x: Tensor,
    *,
    top: Tensor | None = None,
    rule: str = "floor",
    e_max: int = 2,
    bias: int = 127,
    pack: Callable[[Tensor], Tensor] = block_formats.pack_nibbles,
    divide: Callable[[Tensor, Tensor], Tensor] = torch.div,
    encode: Callable[[Tensor], Tensor] = lambda x: float_formats.encode(x, E2M1),
) -> Tensor:
    """(blocks, 17) of exercise 4, and what comes out with one thing changed."""
    top = x.abs().amax(1, keepdim=True) if top is None else top
    exponent = block_formats.RULES[rule](top, E2M1) + E2M1.e_max - e_max
    X = torch.ldexp(torch.ones_like(top), exponent)
    codes = encode(divide(x, X))
    scale = (exponent + bias) % 256
    return torch.cat([pack(codes).int(), scale.int().expand(len(x), 1)], 1)


def right_mxfp4(x: Tensor) -> Tensor:
    """(blocks, 17)."""
    stored = block_formats.encode(x, MXFP4)
    packed = block_formats.pack_nibbles(stored.codes)
    return torch.cat([packed, stored.scale], 1).int()


def high_first(codes: Tensor) -> Tensor:
    """Nibbles in the wrong order."""
    return codes[:, 0::2] << 4 | codes[:, 1::2]


def halves(codes: Tensor) -> Tensor:
    """As gguf packs a block."""
    return codes[:, :16] | codes[:, 16:] << 4


def three_bits_on(codes: Tensor) -> Tensor:
    """The second code one bit too low."""
    return codes[:, 0::2] | codes[:, 1::2] << 3


def ties_down(x: Tensor) -> Tensor:
    """Elements whose ties go to the smaller level."""
    middle = (LEVELS[1:] + LEVELS[:-1]) / 2
    code = (x.abs()[..., None] > middle).sum(-1) + 8 * x.signbit()
    return code.to(torch.uint8)


def ties_up(x: Tensor) -> Tensor:
    """Elements whose ties go to the larger level."""
    middle = (LEVELS[1:] + LEVELS[:-1]) / 2
    code = (x.abs()[..., None] >= middle).sum(-1) + 8 * x.signbit()
    return code.to(torch.uint8)


def no_signs(x: Tensor) -> Tensor:
    """Elements without their sign bit."""
    return float_formats.encode(x.abs(), E2M1)


def wrong_mxfp4(x: Tensor) -> dict[str, Tensor]:
    """What usual mistakes give for the bytes and scales."""
    top = x.abs().amax(1, keepdim=True)
    nearest = 2.0 ** top.log2().round()
    return {
        "the first code of a pair is in the high half: it belongs in the low one": (
            mxfp4(x, pack=high_first)
        ),
        "byte i holds elements i and i + 16: here it holds 2 i and 2 i + 1": mxfp4(
            x, pack=halves
        ),
        "the second code of a pair starts at bit 3: the high half starts at bit 4": (
            mxfp4(x, pack=three_bits_on)
        ),
        "ties of the elements go to the smaller level: they go to the even code": (
            mxfp4(x, encode=ties_down)
        ),
        "ties of the elements go to the larger level: they go to the even code": (
            mxfp4(x, encode=ties_up)
        ),
        "the signs of the elements are missing": mxfp4(x, encode=no_signs),
        "the high half of each byte is empty: two codes share it": mxfp4(
            x, pack=lambda codes: codes[:, 0::2]
        ),
        "the elements are those of x / (max|x| / 6): divide by the power of two": mxfp4(
            x, divide=lambda a, X: a / (top / 6)
        ),
        "e_max is subtracted twice": mxfp4(x, e_max=4),
        "the exponent is one too large: ⌊log2 max|x|⌋ is asked, and the exponent of"
        " torch.frexp is one more": mxfp4(x, e_max=1),
        "the exponent is one too small": mxfp4(x, e_max=3),
        "the scale is chosen so that nothing is clipped: the specification takes"
        " ⌊log2 max|x|⌋ − 2": mxfp4(x, rule="ceil"),
        "the scale carries over at 7, as in compressed-tensors: the specification"
        " takes ⌊log2 max|x|⌋ − 2": mxfp4(x, rule="carry"),
        "log2 is rounded to nearest: it is rounded down": mxfp4(x, top=nearest),
        "e_max is missing: the exponent is less by 2, as 6 = 2² · 1.5": mxfp4(
            x, e_max=0
        ),
        "e_max is 2 for E2M1: it is not the largest element, 6": mxfp4(x, e_max=6),
        "the bias is missing: the code is the exponent plus 127": mxfp4(x, bias=0),
        "the bias is 128 here: 127 is asked": mxfp4(x, bias=128),
        "the maximum is that of x, not of |x|": mxfp4(x, top=x.amax(1, keepdim=True)),
        "the largest |x| of all blocks is used: each block has its own": mxfp4(
            x, top=top.max().expand(len(x), 1)
        ),
        "the scale comes from the mean |x|: from the largest is asked": mxfp4(
            x, top=x.abs().mean(1, keepdim=True)
        ),
        "x is not divided by the scale before it is rounded": mxfp4(
            x, divide=lambda a, X: a
        ),
        "x is multiplied by the scale: divide by it": mxfp4(x, divide=torch.mul),
    }
